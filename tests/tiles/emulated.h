// AMX's tile instructions in plain C++, so that the kernels on tiles run where a CPU has none. Included first, before the
// kernels, whose names for them it takes over; it ends the program where real tiles would fault.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_storeconfig emulated::store_config
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stream_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply

namespace emulated {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
  uint8_t config[64] = {};
  uint8_t data[kTiles][kRows][kRowBytes] = {};
};
inline thread_local State state;

// A tile of palette 1 in full size: the kernels use no other.
inline uint8_t (&tile(int number)) [kRows][kRowBytes] {
  uint16_t row_bytes;
  std::memcpy(&row_bytes, state.config + 16 + 2 * number, 2);
  if (state.config[0] != 1 || row_bytes != kRowBytes || state.config[48 + number] != kRows) std::abort();
  return state.data[number];
}

inline void load_config(const void* from) {
  std::memcpy(state.config, from, sizeof state.config);
  std::memset(state.data, 0, sizeof state.data);
}
inline void store_config(void* to) { std::memcpy(to, state.config, sizeof state.config); }
inline void zero(int number) { std::memset(tile(number), 0, kRows * kRowBytes); }
inline void load(int number, const void* from, int64_t stride) {
  for (int r = 0; r < kRows; ++r) std::memcpy(tile(number)[r], static_cast<const char*>(from) + r * stride, kRowBytes);
}
inline void store(int number, void* to, int64_t stride) {
  for (int r = 0; r < kRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(number)[r], kRowBytes);
}

inline float element(const uint8_t* row, int index) {
  const uint32_t bits = uint32_t(row[2 * index]) << 16 | uint32_t(row[2 * index + 1]) << 24;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// Even and odd elements in sums of their own, which are added to the tile's at the end.
inline void multiply(int sums, int first, int second) {
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kRowBytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < kRows; ++k) {
        even += element(tile(first)[m], 2 * k) * element(tile(second)[k], 2 * n);
        odd += element(tile(first)[m], 2 * k + 1) * element(tile(second)[k], 2 * n + 1);
      }
      std::memcpy(&sum, tile(sums)[m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(tile(sums)[m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated
