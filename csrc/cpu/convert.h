// What every instruction set needs and none makes faster: the largest magnitude of a run, the midpoints of a binary
// search as lookup tables, the switch over dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../element.h"

namespace nf4::cpu {
namespace {

static inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

static inline int32_t magnitude(float a) { return int32_t(bits_of(a) & 0x7fffffffu); }
static inline int16_t magnitude(BFloat16 a) { return int16_t(a.bits & 0x7fff); }
static inline int16_t magnitude(Float16 a) { return int16_t(a.bits & 0x7fff); }

// max |p[i]| over the bits as integers, which compilers vectorise at every width; NaN > inf > every number.
template <class T>
static inline float max_magnitude(const T* p, int count) {
  auto largest = magnitude(T{});
  for (int i = 0; i < count; ++i) largest = magnitude(p[i]) > largest ? magnitude(p[i]) : largest;
  T element;
  std::memcpy(static_cast<void*>(&element), &largest, sizeof element);
  return to_float(element);
}

// A search step compares with midpoints[rank + by]. Rotated by that, a table of 16 is indexed by the rank itself.
static inline const float* rotate_midpoints(const float midpoints[15], int by, float rotated[16]) {
  for (int i = 0; i < 16; ++i) rotated[i] = (i + by) % 16 < 15 ? midpoints[(i + by) % 16] : 0.f;
  return rotated;
}

// fn(T{}) with the element type of dtype.
template <class Fn>
static inline void with_type(Dtype dtype, Fn&& fn) {
  switch (dtype) {
    case Dtype::kFloat32: return fn(float{});
    case Dtype::kBFloat16: return fn(BFloat16{});
    case Dtype::kFloat16: return fn(Float16{});
  }
}

}  // namespace
}  // namespace nf4::cpu
