// linear_dgrad: dX[m, k] = sum_n dY[m, n] * W[n, k]
//
// Read first   gemm.h.
// Work split   K tiles of 2L consecutive k. The caller splits them over threads.
// Inner loop   2L codes of one row of W are one load and two lookups: L even k, then L odd k. The tile keeps that order
//              of columns through the product; the store, which writes pairs, undoes it.
// The trick    4 K tiles are decoded together, since their 4L bytes of a row of W share a cache line.
// Flops        2*M*N*K; decoding takes as long as the bf16 products of 16 rows of dY (one core of a Zen 4 EPYC).
// Needs        K % 2L == 0 for the vector path; other K decode whole spans first.
//
//   slice[n], fp32     | k 0  2  4 ... 2L-2 | k 1  3  5 ... 2L-1 |       vector v holds every second k, from v on
#pragma once

#include "decode_span.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

constexpr int kTileK = kDecodedTileC;
constexpr int kDgradGroup = 4;  // K tiles that are decoded together

struct EvenThenOdd {
  static constexpr int first_k(int vector) { return vector; }
};

// W[n, k .. k + 2L], even k apart from odd k; k_count of them exist.
static inline void decode_even_odd(const Weight& w, const Isa::Table& table, int64_t n, int64_t k, int64_t k_count,
                                   Isa::F& even, Isa::F& odd) {
  const int64_t flat = n * w.K + k;
  if (w.K % (2 * Isa::L) == 0) {
    const Isa::F scale = scales_of_pairs(w, flat);
    Isa::decode_pairs(w.packed + flat / 2, table, even, odd);
    even = Isa::mul(even, scale);
    odd = Isa::mul(odd, scale);
    return;
  }
  float decoded[kTileK] = {}, halves[kTileK];
  decode_span(w, flat, k_count, decoded);
  for (int i = 0; i < kTileK; ++i) halves[i / 2 + i % 2 * Isa::L] = decoded[i];
  even = Isa::load(halves);
  odd = Isa::load(halves + Isa::L);
}

// Rows of W are K/2 bytes apart, further than the hardware looks ahead: 2.9 to 2.65 ms at M = 1 (4096x4096, one Zen 4
// core).
static inline void prefetch_row(const Weight& w, int64_t n, int64_t k) {
  constexpr int64_t kAhead = 24;
  __builtin_prefetch(w.packed + ((n + kAhead) * w.K + k) / 2);
}

struct DgradFp32 : Fp32Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kDgradGroup;
  // All slices of a group, row by row, where 64 k have one scale: 4096x256 in a cache, AVX2, M = 1: 243 to 151 us, M = 8:
  // 372 to 283 (one core of a Zen 4 EPYC). A group may begin and end anywhere in those 64.
  static void decode_slices(const Weight& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, Slice* slices) {
    const Isa::Table table = Isa::load_table(w.code);
    for (int64_t i = 0; i < n_count; ++i) {
      prefetch_row(w, n + i, k);
      const int64_t flat = (n + i) * w.K + k;
      Isa::F scale = Isa::zero();
      for (int64_t tile = 0; tile * kTileK < k_count; ++tile) {
        const int64_t at = flat + tile * kTileK;
        if (tile == 0 || at % 64 == 0) scale = Isa::set1(block_scale(w, at >> w.block_shift));
        Isa::F even, odd;
        Isa::decode_pairs(w.packed + at / 2, table, even, odd);
        float* out = slices[tile] + i * kTileK;
        Isa::store(out, Isa::mul(even, scale));
        Isa::store(out + Isa::L, Isa::mul(odd, scale));
      }
    }
  }
  static void decode_slice(const Weight& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, float* slice) {
    const Isa::Table table = Isa::load_table(w.code);
    for (int64_t i = 0; i < n_count; ++i) {
      prefetch_row(w, n + i, k);
      Isa::F even, odd;
      decode_even_odd(w, table, n + i, k, k_count, even, odd);
      Isa::store(slice + i * kTileK, even);
      Isa::store(slice + i * kTileK + Isa::L, odd);
    }
  }
};

// dX[m, k .. k + k_count] from its finished fp32 sums.
template <class T>
void store_dx(const GemmArgs& args, int64_t m, int64_t k, int64_t k_count, const float* sums) {
  T* dx = static_cast<T*>(args.out) + m * args.weight.K + k;
  const Isa::F even = Isa::load(sums), odd = Isa::load(sums + Isa::L);
  if (k_count == kTileK) return Isa::store_pairs(dx, even, odd);
  T whole[kTileK];
  Isa::store_pairs(whole, even, odd);
  std::memcpy(static_cast<void*>(dx), whole, size_t(k_count) * sizeof(T));
}

template <class Core>
void linear_dgrad_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    const auto decode = [&](int64_t k, int64_t k_count, int64_t n, int64_t n_count, typename Core::Slice* slices) {
      if constexpr (Core::kStep == 1)
        if (code_run(w) == 64) return Core::decode_slices(w, k, k_count, n, n_count, slices);
      for (int64_t c = 0; c < k_count; c += kTileK)
        Core::decode_slice(w, k + c, k_count - c < kTileK ? k_count - c : kTileK, n, n_count, *slices++);
    };
    const auto store = [&](int64_t m, int64_t k, int64_t k_count, const float* sums) {
      store_dx<T>(args, m, k, k_count, sums);
    };
    gemm<Core>(args, /*D=*/w.N, /*C=*/w.K, tile_begin, tile_end, workspace, decode, store);
  });
}

}  // namespace
}  // namespace nf4::cpu
