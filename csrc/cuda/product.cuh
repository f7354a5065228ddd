// What the tensor-core products share: who a thread is, the scale of a block in two steps, LoRA's operands.
#pragma once

#include "kernels.h"

namespace nf4::cuda {

constexpr int kWarp = 32;
constexpr int kBlockK =
    64;  // weights of a row that share a scale, at least: the kernels' condition, see has_whole_codes

// A thread's place in the fragments of mma_16x8x16.
struct Lane {
  int index, g, t;  // g: row of a and c, column of b; t: which columns of a, rows of b
  NF4_DEVICE Lane() : index(int(threadIdx.x) % kWarp), g(index / 4), t(index % 4) {}
};

NF4_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NF4_HOST_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks of threads for `count` elements in a stride over the grid.
inline unsigned blocks_for(int64_t count, int threads) {
  constexpr int64_t kMost = 4096;
  return unsigned(smaller(ceil_div(count, threads), kMost));
}

// The part of `count` steps that split `s` of `splits` takes.
struct Part {
  int64_t begin, end;
  NF4_HOST_DEVICE Part(int64_t count, int64_t s, int64_t splits)
      : begin(count * s / splits), end(count * (s + 1) / splits) {}
};

// What a block of threads does: one tile of out, in one part of the contraction. Rows of x beyond `end` are not the
// weight's. Index is int where these are in registers, two less a number; constants of the launch are int64_t as they
// are, or the conversions would take some.
template <class Index>
struct Work {
  const Weight& weight;
  Index column_tile;
  Index row, end;  // of x: the tile's first, and where the weight's rows end
  Index split;
  int64_t rank;  // of LoRA's term
};

// Of a product with one weight, tiles of so many rows.
NF4_DEVICE Work<int64_t> own_work(const ProductArgs& args, int rows, int64_t split) {
  return {args.weight, blockIdx.x, int64_t(blockIdx.y) * rows, args.M, split, args.rank};
}

// A block's scale as stored, on its way from memory: taken early, decoded by scale_of when it is needed.
NF4_DEVICE uint32_t stored_scale(const Weight& w, int64_t block) {
  return w.absmax_u8 == nullptr ? bits_of(load_cached(w.absmax + block)) : load_cached(w.absmax_u8 + block);
}
// block_scale of format.h, of a weight with this scale_offset.
NF4_DEVICE float scale_of(const Weight& w, int64_t block, uint32_t stored, float offset) {
  if (w.absmax_u8 == nullptr) return float_of(stored);
  const float product = load_cached(w.scale_code + stored) * load_cached(w.scale_absmax + (block >> kSuperblockShift));
  return product + offset;
}
NF4_DEVICE float scale_of(const Weight& w, int64_t block, uint32_t stored) {
  return w.absmax_u8 == nullptr ? float_of(stored) : scale_of(w, block, stored, load_cached(w.scale_offset));
}
NF4_DEVICE float offset_of(const Weight& w) { return w.absmax_u8 == nullptr ? 0.f : load_cached(w.scale_offset); }

// The two elements of a pair.
template <class T>
NF4_DEVICE float first_of(uint32_t pair) {
  return to_float(T{uint16_t(pair)});
}
template <class T>
NF4_DEVICE float second_of(uint32_t pair) {
  return to_float(T{uint16_t(pair >> 16)});
}

// Elements column and column + 1 of a row of `length` elements, zeros past its end.
template <class T>
NF4_DEVICE uint32_t load_pair(const T* row, int64_t column, int64_t length) {
  const uint32_t low = column < length ? row[column].bits : 0u;
  const uint32_t high = column + 1 < length ? row[column + 1].bits : 0u;
  return low | high << 16;
}

// Where an output goes: rounded, bias and all, or as one of `splits` fp32 partial sums that reduce_splits finishes.
template <class T>
struct Store {
  T* out;
  float* partial;  // null: not split
  const T* bias;   // null: none
  int64_t columns;
  NF4_DEVICE Store(const ProductArgs& args, int64_t columns, int64_t split)
      : out(static_cast<T*>(args.out)),
        partial(args.splits > 1 ? args.partial + split * args.M * columns : nullptr),
        bias(static_cast<const T*>(args.bias)),
        columns(columns) {}

  NF4_DEVICE void one(int64_t row, int64_t column, float value) const {
    const int64_t i = row * columns + column;
    if (partial != nullptr)
      partial[i] = value;
    else
      out[i] = from_float<T>(bias == nullptr ? value : value + to_float(bias[column]));
  }

  // kCount (4 or 8) in a row from `column`, a multiple of kCount; those past the last column are left out.
  template <int kCount>
  NF4_DEVICE void run(int64_t row, int64_t column, const float (&values)[kCount]) const {
    const int64_t i = row * columns + column;
    if (columns % kCount != 0) {
      for (int j = 0; j < kCount; ++j)
        if (column + j < columns) one(row, column + j, values[j]);
    } else if (column >= columns) {
      return;
    } else if (partial != nullptr) {
      for (int j = 0; j < kCount; j += 4)
        *reinterpret_cast<uint4*>(partial + i + j) =
            make_uint4(bits_of(values[j]), bits_of(values[j + 1]), bits_of(values[j + 2]), bits_of(values[j + 3]));
    } else {
      uint32_t packed[kCount / 2];
      for (int j = 0; j < kCount; j += 2) {
        const float add0 = bias == nullptr ? 0.f : to_float(bias[column + j]);
        const float add1 = bias == nullptr ? 0.f : to_float(bias[column + j + 1]);
        packed[j / 2] = pack<T>(values[j] + add0, values[j + 1] + add1);
      }
      for (int j = 0; j < kCount / 2; j += 2)
        *reinterpret_cast<uint2*>(out + i + 2 * j) = make_uint2(packed[j], packed[j + 1]);
    }
  }
};

}  // namespace nf4::cuda
