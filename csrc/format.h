// The 4-bit weight format, for every C++ and CUDA file: layout, index arithmetic, and the decode of one scale.
//
//   flat element i of the row-major [N, K] weight: nibble i of `packed` (even i in the high nibble), block i / block_size
//   scale(b) = absmax[b] in fp32, bf16 or fp16; or scale_code[absmax[b]]; or, double-quantized,
//              scale_code[absmax[b]] * scale_absmax[b / 256] + scale_offset, each operation rounded once
//   weight(i) = code[nibble i] * scale(block of i), rounded once to fp32, then once to the output dtype
//
// Everything here is `static`: a weak symbol compiled with AVX-512 flags could be linked into the whole program.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NF4_HOST_DEVICE __host__ __device__
#else
#define NF4_HOST_DEVICE
#endif

namespace nf4 {

NF4_HOST_DEVICE static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kLevels = 16;
constexpr int kScaleCodes = 256;
constexpr int kSuperblockShift = 8;  // 256 blocks share one scale_absmax
constexpr int kMinBlockSize = 16;
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

// How absmax stands for the blocks' scales: as numbers, or as 8-bit codes of scale_code, which a double-quantized weight
// scales once more by superblocks.
enum class Scales : int32_t { kFloat32, kBFloat16, kFloat16, kCodes, kDouble };

struct Weight {
  const uint8_t* packed;      // [ceil(N*K/2)]
  const void* absmax;         // [blocks], of what `scales` says
  const float* scale_absmax;  // kDouble: [ceil(blocks/256)]
  const float* scale_code;    // kCodes and kDouble: [256]
  const float* scale_offset;  // kDouble: [1]
  const float* code;          // [16]
  int64_t N;
  int64_t K;
  int block_shift;  // log2(block_size)
  Scales scales;

  template <class T>
  NF4_HOST_DEVICE const T* absmax_as() const {
    return static_cast<const T*>(absmax);
  }
};
NF4_HOST_DEVICE static inline bool has_codes(Scales scales) { return scales >= Scales::kCodes; }
NF4_HOST_DEVICE static inline int64_t absmax_bytes(Scales scales) {
  return has_codes(scales) ? 1 : scales == Scales::kFloat32 ? 4 : 2;
}

NF4_HOST_DEVICE static inline float float_of_bits(uint32_t u) {
  float a;
  memcpy(&a, &u, 4);
  return a;
}
NF4_HOST_DEVICE static inline float bf16_value(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }
NF4_HOST_DEVICE static inline float fp16_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {  // subnormal: exact in fp32
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign == 0 ? magnitude : -magnitude;
  }
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

NF4_HOST_DEVICE static inline int nibble(const uint8_t* packed, int64_t i) {
  return i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
}

// The weights [E, N, K] of E experts, each laid out as a weight of its own. They share the codebook, and scale_code
// unless it is all that scales their absmax.
struct Experts {
  Weight first;
  int64_t count, blocks, superblocks;  // blocks and superblocks of one expert

  NF4_HOST_DEVICE Weight operator[](int64_t expert) const {
    Weight w = first;
    w.packed += expert * ((w.N * w.K + 1) / 2);
    w.absmax = w.absmax_as<uint8_t>() + expert * blocks * absmax_bytes(w.scales);
    if (w.scales == Scales::kCodes) w.scale_code += expert * kScaleCodes;
    if (w.scales == Scales::kDouble) {
      w.scale_absmax += expert * superblocks;
      w.scale_offset += expert;
    }
    return w;
  }
};

// Callers compile with -ffp-contract=off, or -fmad=false: an FMA here would change the last bit.
NF4_HOST_DEVICE static inline float block_scale(const Weight& w, int64_t block) {
  switch (w.scales) {
    case Scales::kFloat32: return w.absmax_as<float>()[block];
    case Scales::kBFloat16: return bf16_value(w.absmax_as<uint16_t>()[block]);
    case Scales::kFloat16: return fp16_value(w.absmax_as<uint16_t>()[block]);
    default: break;
  }
  const float value = w.scale_code[w.absmax_as<uint8_t>()[block]];
  if (w.scales == Scales::kCodes) return value;
  const float product = value * w.scale_absmax[block >> kSuperblockShift];
  return product + *w.scale_offset;
}

}  // namespace nf4
