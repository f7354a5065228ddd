// One element between fp32 and bf16 or fp16 in portable C++, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "format.h"

namespace nf4 {
namespace {

static inline uint32_t bits_of(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float a;
  std::memcpy(&a, &u, 4);
  return a;
}

static inline float to_float(float a) { return a; }
static inline float to_float(BFloat16 a) { return bf16_value(a.bits); }
static inline float to_float(Float16 a) { return fp16_value(a.bits); }

template <class T>
static inline T from_float(float a);
template <>
inline float from_float<float>(float a) {
  return a;
}
template <>
inline BFloat16 from_float<BFloat16>(float a) {
  const uint32_t u = bits_of(a);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BFloat16{0x7fc0};  // rounding up could carry a NaN into -0
  return BFloat16{uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float a) {
  const uint32_t u = bits_of(a), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Float16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return Float16{uint16_t(sign | 0x7c00)};  // 65520 and up round to inf
  if (magnitude < 0x38800000u) {  // below 2^-14: the ulp of 0.5f is the subnormals' 2^-24, so the FPU rounds for us
    return Float16{uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return Float16{uint16_t(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

}  // namespace
}  // namespace nf4
