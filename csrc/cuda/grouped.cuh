// Which expert, and which of its rows, a block of threads takes: what the grouped products add to those of one weight.
//
// Who: the grid has as many tiles of rows as there can be. The experts' tiles come one after the other, then those of the
//   rows of no expert, which become zeros, then some that have nothing to do.
// Trick: every warp finds the block's tile by itself, each lane reading the offsets of experts / 32 experts in a row, so
//   that two scans over the lanes do for any number of experts and no barrier is needed: about 20 shuffles and three
//   loads, under a microsecond. Rejected: a kernel before, that writes the tiles down: a launch more.
// Bytes: 4 an expert and block of threads, from the L2.
#pragma once

#include "product.cuh"

namespace nf4::cuda {

struct Group {
  int expert;    // E: none's
  int row, end;  // of x: the tile's first, and where the expert's rows end; row >= end: nothing to do
};

// Of lane i: combine of the values of lanes 0 to i.
template <class F>
NF4_DEVICE int scan(int value, int lane, F&& combine) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = shuffle(value, (lane - step) & (kWarp - 1));
    if (lane >= step) value = combine(value, other);
  }
  return value;
}

// An offset of an expert, as a row of those given here.
NF4_DEVICE int row_of_offset(const GroupedArgs& args, int expert) {
  const int64_t row = load_cached(args.offsets + expert) - args.first_row;
  return int(row < 0 ? 0 : smaller(row, args.product.M));
}

// Tile `tile` of kRows rows. Offsets that fall or exceed M count as the contract in ops.py says.
template <int kRows>
NF4_DEVICE Group find_group(const GroupedArgs& args, int tile) {
  const int lane = int(threadIdx.x) % kWarp;
  const int count = int(args.experts.count), rows = int(args.product.M), each = (count + kWarp - 1) / kWarp;
  const auto offset = [&](int expert) { return row_of_offset(args, expert); };
  const auto tiles = [](int begin, int end) { return (end - begin + kRows - 1) / kRows; };

  const int first = min(lane * each, count), last = min(first + each, count);  // the lane's experts
  int reach = 0;
  for (int e = first; e < last; ++e) reach = max(reach, offset(e));
  reach = scan(reach, lane, [](int a, int b) { return max(a, b); });
  const int reach_before = shuffle(reach, (lane - 1) & (kWarp - 1));
  const int before = lane == 0 ? 0 : reach_before;  // where the lane's rows begin
  int own = 0;
  for (int e = first, begin = before; e < last; ++e) {
    const int end = max(begin, offset(e));
    own += tiles(begin, end);
    begin = end;
  }
  const int sum = scan(own, lane, [](int a, int b) { return a + b; });

  int owner = 0;  // how many lanes' tiles all come before
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    if (shuffle(sum, owner + step - 1) <= tile) owner += step;
  const int all = shuffle(sum, kWarp - 1), end_of_all = shuffle(reach, kWarp - 1);
  if (tile >= all) return {count, int(smaller(end_of_all + int64_t(tile - all) * kRows, rows)), rows};
  tile -= shuffle(sum - own, owner);
  int begin = shuffle(before, owner);
  for (int e = owner * each;; ++e) {
    const int end = max(begin, offset(e)), here = tiles(begin, end);
    if (tile < here) return {e, begin + tile * kRows, end};
    tile -= here;
    begin = end;
  }
}

// multiply(work) for this block's tile of kRows by kColumns of out [M, columns]; zeros where the rows are no expert's.
template <class T, int kRows, int kColumns, class F>
NF4_DEVICE void multiply_group(const GroupedArgs& args, int64_t columns, F&& multiply) {
  const unsigned across = unsigned(ceil_div(columns, kColumns));
  const Group group = find_group<kRows>(args, int(blockIdx.x / across));
  const int column_tile = int(blockIdx.x % across), split = int(blockIdx.y);
  if (group.row >= group.end) return;
  if (group.expert < args.experts.count) {
    const Weight weight = args.experts[group.expert];
    multiply(Work<int>{weight, column_tile, group.row, group.end, split, 0});
    return;
  }
  const Store<T> store(args.product, columns, split);
  for (int i = int(threadIdx.x); i < kRows * kColumns; i += int(blockDim.x)) {
    const int64_t row = group.row + i / kColumns, column = int64_t(column_tile) * kColumns + i % kColumns;
    if (row < group.end && column < columns) store.one(row, column, 0);
  }
}

// Tiles of kRows by kColumns: each expert that has rows, and the rows of none, may end in a tile that is not full.
template <int kRows, int kColumns>
dim3 grouped_grid(const GroupedArgs& args, int64_t columns) {
  const int64_t rows = args.product.M, ends = smaller(args.experts.count + 1, rows);
  const int64_t tiles = (rows + ends * (kRows - 1)) / kRows;
  return dim3(unsigned(tiles * ceil_div(columns, kColumns)), unsigned(args.product.splits));
}

}  // namespace nf4::cuda
