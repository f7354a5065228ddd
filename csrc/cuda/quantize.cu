// quantize: absmax[b] = max |w| over block b; code = rank of w * (1 / max(absmax, 2^-126)) among the levels' midpoints.
//
// Who: a warp takes 1024 weights (a whole block where that is longer), 32 a lane, in 16-byte loads that are contiguous
//   over the warp. Lanes that share a block reduce its maximum by shuffles.
// Trick: the values are bucketed. A rank is the number of midpoints below the value's bucket, plus one if the value is
//   above the midpoint in it: two lookups in 32 banks, without conflicts and without a search. Levels too close for
//   that or not ascending (FP4's) take the binary search: 31 instructions a weight instead of 16 (sm_90a).
// Bytes: reads 2 (bf16) and writes 0.5 + 4/block_size a weight: 2.56 B at block size 64, 10 us for 4096 x 4096 at
//   an H200's 4.3 TB/s of copy. In that time its SMs can issue 17.6 instructions a weight (A100 29, 4090
//   about 110), so the 16 just fit, and the search would take 18 us.
// Needs: code is a permutation of 16 ascending levels. Blocks after the last whole 1024, and weights or bytes that are
//   not aligned, go element by element, at any address.
#include <type_traits>

#include "kernels.h"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneWeights = 32;
constexpr int kTile = 32 * kLaneWeights;  // weights that a warp holds at once
constexpr int kMaxGrid = 8192;            // with more tiles a block loops over several and prepares its levels once
constexpr int kBuckets = 32;

// The byte offset (4 * bucket) of a value's bucket, monotone in value for |value| <= 1.03. Midpoints 1/15 apart never
// share a bucket.
NF4_DEVICE int bucket_bytes(float value) {
  const float quarters = fmaf(value, 15.f, 16.f + 0x1p21f);  // the ulp of 2^21 is a quarter
  return int(bits_of(quarters) & (4 * kBuckets - 4));
}

struct Levels {
  float midpoint_in[kBuckets];    // of the bucket; inf where it has none
  uint32_t rank_below[kBuckets];  // number of midpoints in lower buckets
  float sorted[kLevels];
  float midpoints[kLevels];  // 15 are used
  uint32_t code_of_rank[kLevels];
  uint32_t zero_code;
  uint32_t is_bucketed;  // no bucket has two midpoints, and a rank is a code
};

// One warp prepares the levels; a barrier must follow.
NF4_DEVICE void prepare_levels(const float* code, Levels& levels) {
  const int lane = int(threadIdx.x % 32);
  const float level = load_cached(code + lane % kLevels);
  int rank = 0;
  for (int i = 0; i < kLevels; ++i) {
    const float other = shuffle(level, i);
    rank += other < level || (other == level && i < lane % kLevels);
  }
  if (lane < kLevels) {
    levels.sorted[rank] = level;
    levels.code_of_rank[rank] = uint32_t(lane);
  }
  sync_warp();
  if (lane < kLevels - 1) levels.midpoints[lane] = (levels.sorted[lane] + levels.sorted[lane + 1]) / 2;
  sync_warp();

  int below = 0, inside = 0, negative = 0;
  float midpoint = float_of(0x7f800000u);
  for (int i = 0; i < kLevels - 1; ++i) {
    const float m = levels.midpoints[i];
    const int bucket = bucket_bytes(fminf(fmaxf(m, -1.03f), 1.03f)) / 4;
    below += bucket < lane;
    inside += bucket == lane;
    if (bucket == lane) midpoint = m;
    negative += m < 0;
  }
  levels.midpoint_in[lane] = midpoint + 0.f;  // turns -0 into 0: append_code tests the sign of midpoint - value
  levels.rank_below[lane] = uint32_t(below);
  int searched = inside > 1 || rank != lane % kLevels;
  for (int mask = 1; mask < 32; mask *= 2) searched |= shuffle_xor(searched, mask);
  if (lane == 0) {
    levels.is_bucketed = !searched;
    levels.zero_code = levels.code_of_rank[negative];
  }
}

// Appends the code of value to codes, four bits to the left.
template <bool kBucketed>
NF4_DEVICE uint32_t append_code(uint32_t codes, const Levels& levels, float value) {
  if constexpr (kBucketed) {
    const int bytes = bucket_bytes(value);
    const auto in_bucket = [&](const auto* table) {
      using Entry = std::remove_reference_t<decltype(*table)>;
      return *reinterpret_cast<Entry*>(reinterpret_cast<const char*>(table) + bytes);
    };
    const uint32_t above = bits_of(in_bucket(levels.midpoint_in) - value) >> 31;  // the sign of a difference is exact
    return (codes << 4) + in_bucket(levels.rank_below) + above;
  } else {
    int rank = 0;
    for (int step = 8; step > 0; step /= 2) rank += value > levels.midpoints[rank + step - 1] ? step : 0;
    return (codes << 4) + levels.code_of_rank[rank];
  }
}

// A block's absmax and its reciprocal from the bits of its largest magnitude; NaN and 0 where that is not finite.
NF4_DEVICE float absmax_of(uint32_t bits) { return float_of(bits < 0x7f800000u ? bits : 0x7fc00000u); }
NF4_DEVICE float inverse_of(uint32_t bits) { return bits < 0x7f800000u ? 1.f / fmaxf(float_of(bits), 0x1p-126f) : 0.f; }

// A warp's 1024 weights in registers: w[j][e] is element e of this lane's 16 bytes of load j.
template <class T>
struct Tile {
  static constexpr int kPer = int(16 / sizeof(T));
  static constexpr int kLoads = kLaneWeights / kPer;
  using Codes = std::conditional_t<kPer == 8, uint32_t, uint16_t>;

  float w[kLoads][kPer];

  // The offset of w[j][0] from the tile's first weight.
  NF4_DEVICE static int offset(int j) { return (j * 32 + int(threadIdx.x % 32)) * kPer; }

  NF4_DEVICE void load(const void* weight, int64_t begin) {
    uint4 raw[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      raw[j] = load_streamed(reinterpret_cast<const uint4*>(static_cast<const T*>(weight) + begin + offset(j)));
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const uint32_t words[4] = {raw[j].x, raw[j].y, raw[j].z, raw[j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          w[j][i] = float_of(words[i]);
        } else {
          w[j][2 * i] = to_float(T{uint16_t(words[i])});
          w[j][2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
        }
      }
    }
  }

  // largest[j] = max of `least` and of |w| over the block of w[j], as far as it lies in this tile. The maxima are of
  // the bits as integers, where NaN > inf > every number.
  NF4_DEVICE void block_maxima(int block_shift, uint32_t least, uint32_t (&largest)[kLoads]) const {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      largest[j] = least;
#pragma unroll
      for (int e = 0; e < kPer; ++e) largest[j] = max(largest[j], bits_of(w[j][e]) & 0x7fffffffu);
    }
    const int lanes = min(32, (1 << block_shift) / kPer), loads = (1 << block_shift) / (32 * kPer);
    for (int mask = 1; mask < lanes; mask *= 2) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) largest[j] = max(largest[j], shuffle_xor(largest[j], mask));
    }
#pragma unroll
    for (int step = 1; step < kLoads; step *= 2) {
      if (step >= loads) break;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if ((j & step) == 0) largest[j] = largest[j + step] = max(largest[j], largest[j + step]);
    }
  }

  // At least kLoads lanes share a block: each divides for one load and shuffles its quotient to the others.
  template <bool kBucketed>
  NF4_DEVICE void encode(const QuantizeArgs& args, const Levels& levels, int64_t begin,
                         const uint32_t (&largest)[kLoads]) const {
    const int lane = int(threadIdx.x % 32), mine = lane % kLoads, base = lane - mine;
    uint32_t bits = largest[0];
#pragma unroll
    for (int j = 1; j < kLoads; ++j) bits = mine == j ? largest[j] : bits;
    const int first = (mine * 32 + base) * kPer;
    if (((uint32_t(begin) + first) & ((1u << args.block_shift) - 1)) == 0)
      args.absmax[(begin >> args.block_shift) + (first >> args.block_shift)] = absmax_of(bits);
    const float scale = inverse_of(bits);

    uint8_t* packed = args.packed + (begin >> 1) + lane * (kPer / 2);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const float of_load = shuffle(scale, base + j);
      uint32_t codes = 0;
#pragma unroll
      for (int e = kPer - 1; e >= 0; --e)  // an even element has the high nibble
        codes = append_code<kBucketed>(codes, levels, w[j][e ^ 1] * of_load);
      if (of_load == 0) codes = levels.zero_code * 0x11111111u;
      store_streamed(reinterpret_cast<Codes*>(packed + j * (32 * kPer / 2)), Codes(codes));
    }
  }
};

NF4_HOST_DEVICE static inline int64_t unit_size(int block_shift) {
  return (1 << block_shift) > kTile ? 1 << block_shift : kTile;
}

// One warp quantizes weights [unit * unit_size, (unit + 1) * unit_size), all of which exist and are aligned.
template <class T, bool kBucketed>
NF4_DEVICE void quantize_unit(const QuantizeArgs& args, const Levels& levels, int64_t unit) {
  const int64_t size = unit_size(args.block_shift), begin = unit * size;
  Tile<T> tile;
  uint32_t largest[Tile<T>::kLoads], of_block = 0;
  if (size > kTile) {  // the block is read twice, the second time from the L2
    for (int64_t t = begin; t < begin + size; t += kTile) {
      tile.load(args.weight, t);
      tile.block_maxima(args.block_shift, of_block, largest);
      of_block = largest[0];
    }
  }
  for (int64_t t = begin; t < begin + size; t += kTile) {
    tile.load(args.weight, t);
    tile.block_maxima(args.block_shift, of_block, largest);
    tile.template encode<kBucketed>(args, levels, t, largest);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) quantize_units_kernel(QuantizeArgs args, int64_t units) {
  Levels& levels = *shared_memory<Levels>();
  if (threadIdx.x < 32) prepare_levels(args.code, levels);
  sync_block();
  int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t step = int64_t(gridDim.x) * kWarps;
  if (levels.is_bucketed) {
    for (; unit < units; unit += step) quantize_unit<T, true>(args, levels, unit);
  } else {
    for (; unit < units; unit += step) quantize_unit<T, false>(args, levels, unit);
  }
}

// One warp quantizes one block, full or not, an element or a byte at a time.
template <class T>
NF4_DEVICE void quantize_block(const QuantizeArgs& args, const Levels& levels, int64_t block) {
  const int64_t begin = block << args.block_shift;
  const int count = int(min(args.numel - begin, int64_t(1) << args.block_shift)), lane = int(threadIdx.x % 32);
  const T* weight = static_cast<const T*>(args.weight) + begin;
  uint32_t largest = 0;
  for (int i = lane; i < count; i += 32) largest = max(largest, bits_of(to_float(weight[i])) & 0x7fffffffu);
  for (int mask = 1; mask < 32; mask *= 2) largest = max(largest, shuffle_xor(largest, mask));
  if (lane == 0) args.absmax[block] = absmax_of(largest);
  const float scale = inverse_of(largest);
  const auto append = [&](uint32_t codes, int i) {  // past the end 0, whose code fills an odd tail nibble
    return append_code<false>(codes, levels, i < count && scale != 0 ? to_float(weight[i]) * scale : 0.f);
  };
  for (int i = 2 * lane; i < count; i += 64) args.packed[(begin + i) >> 1] = uint8_t(append(append(0, i), i + 1));
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_blocks_kernel(QuantizeArgs args, int64_t begin, int64_t end) {
  Levels& levels = *shared_memory<Levels>();
  if (threadIdx.x < 32) prepare_levels(args.code, levels);
  sync_block();
  int64_t block = begin + int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (; block < end; block += int64_t(gridDim.x) * kWarps) quantize_block<T>(args, levels, block);
}

template <class T>
cudaError_t quantize_from(const QuantizeArgs& args, cudaStream_t stream) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && reinterpret_cast<uintptr_t>(args.packed) % 4 == 0;
  const bool shared = 1 << args.block_shift >= kLaneWeights;  // by as many lanes as encode() needs, not blocks of 16
  const int64_t size = unit_size(args.block_shift), units = aligned && shared ? args.numel / size : 0;
  const int64_t blocks = ceil_div(args.numel, 1 << args.block_shift), in_units = units * (size >> args.block_shift);
  const auto grid = [](int64_t warps) { return dim3(unsigned(min(ceil_div(warps, kWarps), int64_t(kMaxGrid)))); };
  cudaError_t error = cudaSuccess;
  if (units > 0) error = launch(quantize_units_kernel<T>, grid(units), kThreads, sizeof(Levels), stream, args, units);
  if (error == cudaSuccess && in_units < blocks)
    error = launch(quantize_blocks_kernel<T>, grid(blocks - in_units), kThreads, sizeof(Levels), stream, args, in_units,
                   blocks);
  return error;
}

}  // namespace

cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat32: return quantize_from<float>(args, stream);
    case Dtype::kBFloat16: return quantize_from<BFloat16>(args, stream);
    case Dtype::kFloat16: return quantize_from<Float16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nf4::cuda
