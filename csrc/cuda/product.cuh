// What the products share: a lane's place in an mma fragment, a thread block's work, block scales in two steps, stores.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace nf4::cuda {

constexpr int kWarp = 32;
constexpr int kBlockK = 64;  // consecutive k of a row that a warp of a tensor-core product multiplies at a time

// What the scales of a tensor-core product multiply, chosen at launch by scales_sums.
//   ScaledSums     the fp32 sums of each kBlockK, which is exact: one scale for 64 weights, in fp32 or double-quantized
//   ScaledLevels   the levels, rounded once more: one scale for 16 weights or more, in any form
struct ScaledSums {};
struct ScaledLevels {};
template <class Scaled>
constexpr bool kScalesSums = std::is_same_v<Scaled, ScaledSums>;

// Calls launch(ScaledSums or ScaledLevels) for this weight.
template <class F>
cudaError_t launch_scaled(const Weight& w, F&& launch) {
  return scales_sums(w) ? launch(ScaledSums()) : launch(ScaledLevels());
}

// The lane's place in an mma fragment, lane = 4g + t: drawn at mma_16x8x16 in device.cuh.
struct Lane {
  int index, g, t;
  NF4_DEVICE explicit Lane(unsigned thread = threadIdx.x) : index(int(thread) % kWarp), g(index / 4), t(index % 4) {}
};

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
  Index expert;  // 0 in a product with one weight

  // The expert's part of an operand of `size` elements an expert.
  template <class T>
  NF4_DEVICE const T* own(const void* operand, int64_t size) const {
    return static_cast<const T*>(operand) + (std::is_same_v<Index, int> ? expert * size : 0);
  }
  // Whether this block adds the LoRA term, and the bias, which only one split does.
  NF4_DEVICE bool is_first_split() const { return split == 0; }
  // Experts are split where a sum would be too long and nowhere else: a second launch may add those up.
  static constexpr bool kMayAddInLaunch = !std::is_same_v<Index, int>;
};

// The work of this block in a product with one weight.
NF4_DEVICE Work<int64_t> own_work(const ProductArgs& args, int tile_m, int64_t split) {
  return {args.weight, blockIdx.x, int64_t(blockIdx.y) * tile_m, args.M, split, 0};
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

// Scales in two steps: load_scales loads their stored form a step ahead, decode_scales decodes it when it is needed.
// block(i) is the i-th scale's block. `scales` is what w.scales can be in the kernel that asks, so that what it cannot
// be takes no instructions.
template <class Scaled>
NF4_DEVICE Scales scales_in(const Weight& w) {
  if (kScalesSums<Scaled>) return w.scales == Scales::kDouble ? Scales::kDouble : Scales::kFloat32;
  return w.scales;
}
NF4_DEVICE float offset_of(const Weight& w) { return w.scales == Scales::kDouble ? load_cached(w.scale_offset) : 0.f; }

template <int kCount>
struct StoredScales {
  uint32_t of[kCount];
};
template <int kCount, class Block>
NF4_DEVICE StoredScales<kCount> load_scales(const Weight& w, Scales scales, Block&& block) {
  StoredScales<kCount> stored;
  const auto load = [&](auto* absmax) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto number = load_cached(absmax + block(i));
      if constexpr (std::is_same_v<decltype(number), const float>)
        stored.of[i] = bits_of(number);
      else
        stored.of[i] = number;
    }
  };
  if (has_codes(scales))
    load(w.absmax_as<uint8_t>());
  else if (scales == Scales::kFloat32)
    load(w.absmax_as<float>());
  else
    load(w.absmax_as<uint16_t>());
  return stored;
}
// The block_scale of format.h, with the weight's scale_offset already loaded, and scale_code read by scale_code(index).
template <int kCount, class Block, class ScaleCode>
NF4_DEVICE void decode_scales(float (&values)[kCount], const Weight& w, Scales scales,
                              const StoredScales<kCount>& stored, float offset, Block&& block, ScaleCode&& scale_code) {
  const auto for_each = [&](auto&& value_of) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = value_of(i);
  };
  if (has_codes(scales)) {
    for_each([&](int i) { return scale_code(stored.of[i]); });
    if (scales == Scales::kCodes) return;
    for_each([&](int i) {
      const float product = values[i] * load_cached(w.scale_absmax + (block(i) >> kSuperblockShift));
      return product + offset;
    });
  } else if (scales == Scales::kFloat32) {
    for_each([&](int i) { return float_of(stored.of[i]); });
  } else if (scales == Scales::kBFloat16) {
    for_each([&](int i) { return to_float(BFloat16{uint16_t(stored.of[i])}); });
  } else {
    for_each([&](int i) { return to_float(Float16{uint16_t(stored.of[i])}); });
  }
}
template <int kCount, class Block>
NF4_DEVICE void decode_scales(float (&values)[kCount], const Weight& w, Scales scales,
                              const StoredScales<kCount>& stored, float offset, Block&& block) {
  decode_scales(values, w, scales, stored, offset, block, [&](uint32_t i) { return load_cached(w.scale_code + i); });
}

// Two scales as pairs of T: the nearest, and the rest. Their sum is exact to 16 bits or more, so that a level times it
// is rounded once in all.
template <class T>
struct ScalePair {
  uint32_t high, low;
  ScalePair() = default;
  NF4_DEVICE ScalePair(float first, float second)
      : high(pack<T>(first, second)), low(pack<T>(first - first_of<T>(high), second - second_of<T>(high))) {}
  NF4_DEVICE uint32_t times(uint32_t pair) const {
    return multiply_add_pairs<T>(pair, high, multiply_pairs<T>(pair, low));
  }
};

// The ranks that a lane holds of one mma of the LoRA term, as two pairs: four where rows are whole fours of ranks, which
// are one load, else two, and zeros. Past the last rank they are zeros, too, and the row's first ranks are loaded, so that
// no load is in a branch and none waits for another.
template <bool kFours>
constexpr int kLaneRanks = kFours ? 4 : 2;
template <bool kFours, class T>
NF4_DEVICE uint2 load_ranks(const T* row, int r, int rank) {
  if constexpr (kFours) {
    const uint2 four = load_cached(reinterpret_cast<const uint2*>(row + (r < rank ? r : 0)));
    return make_uint2(r < rank ? four.x : 0, r < rank ? four.y : 0);
  } else {
    const auto load = [&](int i) { return load_cached(reinterpret_cast<const uint16_t*>(row + (i < rank ? i : 0))); };
    const uint32_t first = load(r), second = load(r + 1);
    return make_uint2((r < rank ? first : 0) | (r + 1 < rank ? second << 16 : 0), 0);
  }
}
// Whether the rows [.., rank] are whole fours of ranks, aligned to their 8 bytes.
template <class T>
NF4_DEVICE bool has_fours(const T* rows, int64_t rank) {
  return rank % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 8 == 0;
}

// The epilogue's store to out[M, columns]: bias added and rounded; with splits, the fp32 partial sum, which
// reduce_splits finishes. The first split's has the bias in it. A total is the sum over all splits.
template <class T>
struct Store {
  T* out;
  float* partial;  // null: not split
  const T* bias;   // null: none
  int64_t columns;
  NF4_DEVICE Store(const ProductArgs& args, int64_t columns, int64_t split, const T* bias)
      : out(static_cast<T*>(args.out)),
        partial(args.splits > 1 ? args.partial + split * args.M * columns : nullptr),
        bias(bias),
        columns(columns) {}
  template <class Work>
  NF4_DEVICE Store(const ProductArgs& args, int64_t columns, const Work& work)
      : Store(args, columns, work.split, work.is_first_split() ? bias_of(args, columns, work) : nullptr) {}

  // Of totals, whatever this block's split.
  template <class Work>
  NF4_DEVICE static Store of_totals(const ProductArgs& args, int64_t columns, const Work& work) {
    Store store(args, columns, work.split, bias_of(args, columns, work));
    store.partial = nullptr;
    return store;
  }

  template <class Work>
  NF4_DEVICE static const T* bias_of(const ProductArgs& args, int64_t columns, const Work& work) {
    return args.bias != nullptr ? work.template own<T>(args.bias, columns) : nullptr;
  }

  NF4_DEVICE void one(int64_t row, int64_t column, float value) const {
    const int64_t i = row * columns + column;
    if (bias != nullptr) value += to_float(bias[column]);
    if (partial != nullptr)
      partial[i] = value;
    else
      out[i] = from_float<T>(value);
  }

  // Stores kCount (4 or 8) values from `column` on, a multiple of kCount; columns past the last are left out.
  template <int kCount>
  NF4_DEVICE void run(int64_t row, int64_t column, const float (&without_bias)[kCount]) const {
    const int64_t i = row * columns + column;
    if (columns % kCount != 0) {
      for (int j = 0; j < kCount; ++j)
        if (column + j < columns) one(row, column + j, without_bias[j]);
      return;
    }
    if (column >= columns) return;
    float values[kCount];
    for (int j = 0; j < kCount; ++j) values[j] = without_bias[j] + (bias == nullptr ? 0.f : to_float(bias[column + j]));
    if (partial != nullptr) {
      for (int j = 0; j < kCount; j += 4)
        *reinterpret_cast<uint4*>(partial + i + j) =
            make_uint4(bits_of(values[j]), bits_of(values[j + 1]), bits_of(values[j + 2]), bits_of(values[j + 3]));
    } else {
      uint32_t packed[kCount / 2];
      for (int j = 0; j < kCount; j += 2) packed[j / 2] = pack<T>(values[j], values[j + 1]);
      for (int j = 0; j < kCount / 2; j += 2)
        *reinterpret_cast<uint2*>(out + i + 2 * j) = make_uint2(packed[j], packed[j + 1]);
    }
  }
};

}  // namespace nf4::cuda
