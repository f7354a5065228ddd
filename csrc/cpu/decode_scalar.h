// The vocabulary of the kernels in portable C++: 8 lanes as arrays, which a compiler may vectorise for any machine.
//
// Each decode_<isa>.h defines one `Isa` with the same functions; the algorithms (quantize.h, decode_span.h, gemm.h and
// its cores, linear_gemv.h, lora_term.h, lora_grad.h, lora_inner.h) are written once against it. All of it lives in an
// unnamed namespace, see format.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "../format.h"
#include "convert.h"

namespace nf4::cpu {
namespace {

struct Isa {
  static constexpr int L = 8;       // fp32 lanes
  static constexpr int kTileM = 4;  // rows of x in a register tile, see gemm.h
  struct F {
    float v[L];
  };
  struct I {
    uint32_t v[L];
  };
  struct Table {
    float v[16];
  };

  static F set1(float a) {
    F r;
    for (int i = 0; i < L; ++i) r.v[i] = a;
    return r;
  }
  // low in the first half of the lanes, high in the second
  static F set_halves(float low, float high) {
    F r;
    for (int i = 0; i < L; ++i) r.v[i] = i < L / 2 ? low : high;
    return r;
  }
  static F zero() { return set1(0.f); }
  template <class T>
  static F load(const T* p) {
    F r;
    for (int i = 0; i < L; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  // even[i] = p[2i], odd[i] = p[2i+1]
  template <class T>
  static void load_pairs(const T* p, F& even, F& odd) {
    for (int i = 0; i < L; ++i) {
      even.v[i] = to_float(p[2 * i]);
      odd.v[i] = to_float(p[2 * i + 1]);
    }
  }
  template <class T>
  static void store(T* p, F a) {
    for (int i = 0; i < L; ++i) p[i] = from_float<T>(a.v[i]);
  }
  // p[2i] = even[i], p[2i+1] = odd[i]
  template <class T>
  static void store_pairs(T* p, F even, F odd) {
    for (int i = 0; i < L; ++i) {
      p[2 * i] = from_float<T>(even.v[i]);
      p[2 * i + 1] = from_float<T>(odd.v[i]);
    }
  }
  static F add(F a, F b) {
    for (int i = 0; i < L; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < L; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < L; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static float reduce_add(F a) {
    for (int w = L / 2; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) a.v[i] += a.v[i + w];
    return a.v[0];
  }

  // max |p[i]|, compared as integers: NaN if there is one, else inf if there is one. `count` is a multiple of 2L.
  template <class T>
  static float max_abs(const T* p, int count) {
    return max_magnitude(p, count);
  }

  static Table load_table(const float* p) {
    Table t;
    std::memcpy(&t, p, sizeof t);
    return t;
  }
  // The low 4 bits of each lane index the table.
  static F lookup(const Table& t, I index) {
    F r;
    for (int i = 0; i < L; ++i) r.v[i] = t.v[index.v[i] & 15];
    return r;
  }
  // Byte BYTE of each lane: the values of its high nibble and of its low one.
  template <int BYTE>
  static void lookup_nibbles(const Table& t, I words, F& high, F& low) {
    for (int i = 0; i < L; ++i) high.v[i] = t.v[words.v[i] >> (8 * BYTE + 4) & 15];
    for (int i = 0; i < L; ++i) low.v[i] = t.v[words.v[i] >> 8 * BYTE & 15];
  }
  // L bytes -> the 2L codes' values: even elements (high nibbles) and odd ones.
  static void decode_pairs(const uint8_t* p, const Table& t, F& even, F& odd) {
    for (int i = 0; i < L; ++i) {
      even.v[i] = t.v[p[i] >> 4];
      odd.v[i] = t.v[p[i] & 15];
    }
  }
  // L bytes as signed integers.
  static F load_int8(const uint8_t* p) {
    F r;
    for (int i = 0; i < L; ++i) r.v[i] = float(int8_t(p[i]));
    return r;
  }
  // L little-endian words of 16 bits.
  static I load_words16(const uint8_t* p) {
    I r;
    for (int i = 0; i < L; ++i) r.v[i] = uint32_t(p[2 * i]) | uint32_t(p[2 * i + 1]) << 8;
    return r;
  }
  // Byte BYTE of each lane as a signed integer.
  template <int BYTE>
  static F signed_byte(I words) {
    F r;
    for (int i = 0; i < L; ++i) r.v[i] = float(int8_t(words.v[i] >> 8 * BYTE & 255));
    return r;
  }
  // The nearest integers, ties to even, as signed bytes; |a| is at most 127, but for a rounding.
  static void store_int8(uint8_t* p, F a) {
    constexpr float kRounds = 0x1.8p23f;  // the ulp of numbers around it is 1, and its low bits are the integer
    for (int i = 0; i < L; ++i) p[i] = uint8_t(bits_of(a.v[i] + kRounds) & 255);
  }
  // 16 bytes of each of L rows of W, transposed: lane r of words[j] is the little-endian u32 j of row r.
  static void load_transposed(const uint8_t* const rows[L], int64_t byte, I words[4]) {
    for (int r = 0; r < L; ++r) {
      const uint8_t* p = rows[r] + byte;
      for (int j = 0; j < 4; ++j)
        words[j].v[r] = uint32_t(p[4 * j]) | uint32_t(p[4 * j + 1]) << 8 | uint32_t(p[4 * j + 2]) << 16 |
                        uint32_t(p[4 * j + 3]) << 24;
    }
  }

  // Rank among 15 ascending midpoints: how many are strictly below.
  struct Ranker {
    float midpoints[15];
    explicit Ranker(const float* m) { std::memcpy(midpoints, m, sizeof midpoints); }
    I rank(F a) const {
      I r;
      for (int i = 0; i < L; ++i) {
        uint32_t k = a.v[i] > midpoints[7] ? 8 : 0;
        k += a.v[i] > midpoints[k + 3] ? 4 : 0;
        k += a.v[i] > midpoints[k + 1] ? 2 : 0;
        r.v[i] = k + (a.v[i] > midpoints[k] ? 1 : 0);
      }
      return r;
    }
  };
  // fn(ranker), the quickest that is exact for these midpoints when |a| is at most 1, but for a rounding.
  template <class Fn>
  static void with_ranker(const float* midpoints, Fn&& fn) {
    fn(Ranker(midpoints));
  }
  static I as_bits(F a) {
    I r;
    std::memcpy(&r, &a, sizeof r);
    return r;
  }
  // 2L codes -> L bytes, the even code in the high nibble.
  static void store_nibbles(uint8_t* p, I even, I odd) {
    for (int i = 0; i < L; ++i) p[i] = uint8_t(even.v[i] << 4 | odd.v[i]);
  }
};

}  // namespace
}  // namespace nf4::cpu
