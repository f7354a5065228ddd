// The 4-bit weight format, for every C++ and CUDA file: layout, index arithmetic, and the decode of one scale.
//
//   flat element i of the row-major [N, K] weight: nibble i of `packed` (even i in the high nibble), block i / block_size
//   scale(b) = absmax[b], or scale_code[absmax[b]] * scale_absmax[b / 256] + scale_offset, each operation rounded once
//   weight(i) = code[nibble i] * scale(block of i), rounded once to fp32, then once to the output dtype
//
// Everything here is `static`: a weak symbol compiled with AVX-512 flags could be linked into the whole program.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NF4_HOST_DEVICE __host__ __device__
#else
#define NF4_HOST_DEVICE
#endif

namespace nf4 {

constexpr int kLevels = 16;
constexpr int kSuperblockShift = 8;  // 256 blocks share one scale_absmax
constexpr int kMinBlockSize = 32;
constexpr int kMaxBlockSize = 4096;

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  static constexpr uint16_t kFraction = 0x7f;  // the significand's stored bits
  uint16_t bits;
};
struct Float16 {
  static constexpr uint16_t kFraction = 0x3ff;
  uint16_t bits;
};
static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2 && sizeof(float) == 4, "element sizes of the format");

struct Weight {
  const uint8_t* packed;      // [ceil(N*K/2)]
  const float* absmax;        // [blocks], or null when double-quantized
  const uint8_t* absmax_u8;   // [blocks], or null
  const float* scale_absmax;  // [ceil(blocks/256)], or null
  const float* scale_code;    // [256], or null
  const float* scale_offset;  // [1], or null
  const float* code;          // [16]
  int64_t N;
  int64_t K;
  int block_shift;  // log2(block_size)
};

NF4_HOST_DEVICE static inline int nibble(const uint8_t* packed, int64_t i) {
  return i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
}

// The weights [E, N, K] of E experts, each laid out as a weight of its own; the codebooks are shared.
struct Experts {
  Weight first;
  int64_t count, blocks, superblocks;  // blocks and superblocks of one expert

  NF4_HOST_DEVICE Weight operator[](int64_t expert) const {
    Weight w = first;
    w.packed += expert * ((w.N * w.K + 1) / 2);
    if (w.absmax_u8 == nullptr) {
      w.absmax += expert * blocks;
      return w;
    }
    w.absmax_u8 += expert * blocks;
    w.scale_absmax += expert * superblocks;
    w.scale_offset += expert;
    return w;
  }
};

// Callers compile with -ffp-contract=off, or -fmad=false: an FMA here would change the last bit.
NF4_HOST_DEVICE static inline float block_scale(const Weight& w, int64_t block) {
  if (w.absmax_u8 == nullptr) return w.absmax[block];
  const float product = w.scale_code[w.absmax_u8[block]] * w.scale_absmax[block >> kSuperblockShift];
  return product + *w.scale_offset;
}

// Whether every 64 consecutive weights of a row share a scale: what the products of unscaled codes need.
static inline bool has_whole_codes(const Weight& w) { return w.K > 0 && w.K % 64 == 0 && w.block_shift >= 6; }

}  // namespace nf4
