// What the products share: a lane's place in an mma fragment, a thread block's work, block scales in two steps, stores.
#pragma once

#include "kernels.h"

namespace nf4::cuda {

constexpr int kWarp = 32;
constexpr int kBlockK = 64;  // has_whole_codes: at least so many consecutive k of a row share a scale

// The lane's place in an mma fragment, lane = 4g + t: drawn at mma_16x8x16 in device.cuh.
struct Lane {
  int index, g, t;
  NF4_DEVICE Lane() : index(int(threadIdx.x) % kWarp), g(index / 4), t(index % 4) {}
};

NF4_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NF4_HOST_DEVICE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The grid of a grid-stride loop over `count` elements.
inline unsigned blocks_for(int64_t count, int threads) {
  constexpr int64_t kMost = 4096;
  return unsigned(smaller(ceil_div(count, threads), kMost));
}

// The steps that split `s` of `splits` takes out of `count`.
struct SplitRange {
  int64_t begin, end;
  NF4_HOST_DEVICE SplitRange(int64_t count, int64_t s, int64_t splits)
      : begin(count * s / splits), end(count * (s + 1) / splits) {}
};

// The work of one thread block: a tile of out over one split of the contraction. Index is int in the grouped kernels,
// whose work is computed in registers (one register less a member), and int64_t where the members come from the
// launch's constants, which a conversion would have to copy into registers.
template <class Index>
struct Work {
  const Weight& weight;
  Index tile;            // across out's width: along N in linear, along K in linear_dgrad
  Index m_begin, m_end;  // the tile's first row of x; the end of the rows that belong to the weight
  Index split;
  int64_t rank;  // of the LoRA term
};

// The work of this block in a product with one weight.
NF4_DEVICE Work<int64_t> own_work(const ProductArgs& args, int tile_m, int64_t split) {
  return {args.weight, blockIdx.x, int64_t(blockIdx.y) * tile_m, args.M, split, args.rank};
}

// A block's scale in two steps: stored_scale loads its stored form a step ahead, scale_of decodes it when it is needed.
NF4_DEVICE uint32_t stored_scale(const Weight& w, int64_t block) {
  if (has_codes(w)) return load_cached(w.absmax_as<uint8_t>() + block);
  if (w.scales == Scales::kFloat32) return bits_of(load_cached(w.absmax_as<float>() + block));
  return load_cached(w.absmax_as<uint16_t>() + block);
}
// The scale that is stored as a number, not as a code.
NF4_DEVICE float number_scale(const Weight& w, uint32_t stored) {
  if (w.scales == Scales::kFloat32) return float_of(stored);
  return w.scales == Scales::kBFloat16 ? to_float(BFloat16{uint16_t(stored)}) : to_float(Float16{uint16_t(stored)});
}
// The block_scale of format.h, with the weight's scale_offset already loaded.
NF4_DEVICE float scale_of(const Weight& w, int64_t block, uint32_t stored, float offset) {
  if (!has_codes(w)) return number_scale(w, stored);
  const float value = load_cached(w.scale_code + stored);
  if (w.scales == Scales::kCodes) return value;
  const float product = value * load_cached(w.scale_absmax + (block >> kSuperblockShift));
  return product + offset;
}
NF4_DEVICE float offset_of(const Weight& w) { return w.scales == Scales::kDouble ? load_cached(w.scale_offset) : 0.f; }
NF4_DEVICE float scale_of(const Weight& w, int64_t block, uint32_t stored) {
  return scale_of(w, block, stored, offset_of(w));
}

// The elements of a pair.
template <class T>
NF4_DEVICE float first_of(uint32_t pair) {
  return to_float(T{uint16_t(pair)});
}
template <class T>
NF4_DEVICE float second_of(uint32_t pair) {
  return to_float(T{uint16_t(pair >> 16)});
}

// Elements i and i + 1 of a row of `length` elements, zeros past its end.
template <class T>
NF4_DEVICE uint32_t load_pair(const T* row, int64_t i, int64_t length) {
  const uint32_t low = i < length ? row[i].bits : 0u;
  const uint32_t high = i + 1 < length ? row[i + 1].bits : 0u;
  return low | high << 16;
}

// The epilogue's store to out[M, columns]: bias added and rounded; with splits, the fp32 partial sum, which
// reduce_splits finishes.
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

  // Stores kCount (4 or 8) values from `column` on, a multiple of kCount; columns past the last are left out.
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
