// Which expert and which of its rows a thread block takes: what the grouped products add to those of one weight.
//
// Who: the grid has as many tiles along M as can exist: first every expert's tiles in order, then those of the rows
//   that no expert owns, which become zeros, then tiles that have nothing to do.
// Trick: every warp finds the block's tile by itself. A lane reads the offsets of experts / 32 consecutive experts, and
//   two warp scans then serve any number of experts without a barrier: about 20 shuffles and three loads, under a
//   microsecond. Rejected: a kernel that writes the tiles down first, which is one launch more.
// Bytes: 4 an expert and thread block, from the L2.
#pragma once

#include "product.cuh"

namespace nf4::cuda {

struct Group {
  int expert;          // E: rows that no expert owns
  int m_begin, m_end;  // the tile's first row, the end of the expert's rows; m_begin >= m_end: nothing to do
};

// Inclusive warp scan.
template <class F>
NF4_DEVICE int inclusive_scan(int value, int lane, F&& combine) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = shuffle(value, (lane - step) & (kWarp - 1));
    if (lane >= step) value = combine(value, other);
  }
  return value;
}

// Where the experts' rows of a launch end.
struct Offsets {
  const int32_t* of;  // [count], as the caller gave them
  int count;
  int64_t begin, rows;  // of the launch

  NF4_DEVICE Offsets(const int32_t* of, int64_t count, int64_t begin, int64_t rows)
      : of(of), count(int(count)), begin(begin), rows(rows) {}
  NF4_DEVICE explicit Offsets(const GroupedArgs& args)
      : Offsets(args.offsets, args.experts.count, args.m_begin, args.product.M) {}

  // Relative to the launch's first row and clamped to its rows.
  NF4_DEVICE int operator[](int expert) const {
    const int64_t row = load_cached(of + expert) - begin;
    return int(row < 0 ? 0 : smaller(row, rows));
  }
};

// Finds the expert and rows of tile `tile` along M. Offsets that decrease or exceed M count as the contract in ops.py
// says.
template <int kTileM>
NF4_DEVICE Group find_group(const Offsets& offsets, int tile) {
  const int lane = int(threadIdx.x) % kWarp;
  const int count = offsets.count, rows = int(offsets.rows), each = (count + kWarp - 1) / kWarp;
  const auto offset = [&](int expert) { return offsets[expert]; };
  const auto tiles = [](int begin, int end) { return (end - begin + kTileM - 1) / kTileM; };

  const int first = min(lane * each, count), last = min(first + each, count);  // this lane's experts
  int reach = 0;
  for (int e = first; e < last; ++e) reach = max(reach, offset(e));
  reach = inclusive_scan(reach, lane, [](int a, int b) { return max(a, b); });
  const int reach_before = shuffle(reach, (lane - 1) & (kWarp - 1));
  const int before = lane == 0 ? 0 : reach_before;  // where the lane's rows begin
  int own = 0;
  for (int e = first, begin = before; e < last; ++e) {
    const int end = max(begin, offset(e));
    own += tiles(begin, end);
    begin = end;
  }
  const int sum = inclusive_scan(own, lane, [](int a, int b) { return a + b; });

  int owner = 0;  // binary search for the lane whose experts own the tile
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    if (shuffle(sum, owner + step - 1) <= tile) owner += step;
  const int all = shuffle(sum, kWarp - 1), end_of_all = shuffle(reach, kWarp - 1);
  if (tile >= all) return {count, int(smaller(end_of_all + int64_t(tile - all) * kTileM, rows)), rows};
  tile -= shuffle(sum - own, owner);
  int begin = shuffle(before, owner);
  for (int e = owner * each;; ++e) {
    const int end = max(begin, offset(e)), here = tiles(begin, end);
    if (tile < here) return {e, begin + tile * kTileM, end};
    tile -= here;
    begin = end;
  }
}

// The rows of one expert, for every warp by itself.
NF4_DEVICE Group rows_of(const Offsets& offsets, int expert) {
  int begin = 0;
  for (int e = int(threadIdx.x) % kWarp; e < expert; e += kWarp) begin = max(begin, offsets[e]);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) begin = max(begin, shuffle_xor(begin, mask));
  return {expert, begin, max(begin, offsets[expert])};
}

// Calls multiply(work) for this block's tile, kTileM x kTileWidth of out[M, width]; stores zeros where no expert owns
// the rows. The width is N in grouped_linear and K in grouped_linear_dgrad.
template <class T, int kTileM, int kTileWidth, class Scaled, class F>
NF4_DEVICE void multiply_group(const GroupedArgs& args, int64_t width, F&& multiply) {
  const unsigned across = unsigned(ceil_div(width, kTileWidth));
  const Group group = find_group<kTileM>(Offsets(args), int(blockIdx.x / across));
  const int tile = int(blockIdx.x % across), split = int(blockIdx.y);
  if (group.m_begin >= group.m_end) return;
  if (group.expert < args.experts.count) {
    Weight weight = args.experts[group.expert];
    if (kScalesSums<Scaled>) weight.scale_code = args.experts.first.scale_code;  // in no register: all experts share it
    multiply(Work<int>{weight, tile, group.m_begin, group.m_end, split, group.expert});
    return;
  }
  const Store<T> store(args.product, width, split, nullptr);
  for (int i = int(threadIdx.x); i < kTileM * kTileWidth; i += int(blockDim.x)) {
    const int64_t m = group.m_begin + i / kTileWidth, column = int64_t(tile) * kTileWidth + i % kTileWidth;
    if (m < group.m_end && column < width) store.one(m, column, 0);
  }
}

// The most tiles that can exist: each expert that owns rows, and the rows of none, may end in a tile that is not full.
inline int64_t most_tiles(int64_t M, int64_t experts, int tile_m) {
  return (M + smaller(experts + 1, M) * (tile_m - 1)) / tile_m;
}
template <int kTileM, int kTileWidth>
dim3 grouped_grid(const GroupedArgs& args, int64_t width) {
  const int64_t tiles = most_tiles(args.product.M, args.experts.count, kTileM);
  return dim3(unsigned(tiles * ceil_div(width, kTileWidth)), unsigned(args.product.splits));
}

}  // namespace nf4::cuda
