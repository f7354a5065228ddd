// linear_dgrad of int8 weights: dX[m, k] = sum_n dY[m, n] * W[n, k]
//
// Read first   linear_dgrad.h, of whose products this is the decoder.
// Inner loop   2L bytes of a row of W are L words of 16 bits: their low bytes are the even k, their high ones the odd.
// Needs        K % 2L == 0 for the vector path; other K decode whole spans first.
#pragma once

#include "decode_int8.h"
#include "linear_dgrad.h"

namespace nf4::cpu {
namespace {

constexpr int kInt8Group = 64 / kTileK;  // K tiles of a cache line of W
static_assert(kInt8Group >= 1, "a tile is at most a cache line");

// W[n, k .. k + 2L], even k apart from odd k; k_count of them exist.
static inline void decode_even_odd_int8(const Weight& w, int64_t n, int64_t k, int64_t k_count, Isa::F& even,
                                        Isa::F& odd) {
  const int64_t flat = n * w.K + k;
  if (w.K % (2 * Isa::L) == 0) {
    const Isa::F scale = scales_of_pairs(w, flat);
    const Isa::I words = Isa::load_words16(w.packed + flat);
    even = Isa::mul(Isa::template signed_byte<0>(words), scale);
    odd = Isa::mul(Isa::template signed_byte<1>(words), scale);
    return;
  }
  float decoded[kTileK] = {}, halves[kTileK];
  decode_int8(w, flat, k_count, decoded);
  for (int i = 0; i < kTileK; ++i) halves[i / 2 + i % 2 * Isa::L] = decoded[i];
  even = Isa::load(halves);
  odd = Isa::load(halves + Isa::L);
}

struct DgradInt8Fp32 : Fp32Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kInt8Group;
  // A row of W into row i of a slice.
  static void store_rows(float* slice, const Isa::F (&even)[1], const Isa::F (&odd)[1]) {
    Isa::store(slice, even[0]);
    Isa::store(slice + Isa::L, odd[0]);
  }
};

// GemmFn. Rows of W in turn, each through all slices of a group: a row's line is read once.
template <class Core>
void linear_dgrad_int8_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  constexpr int64_t kAhead = 24;  // rows, as in prefetch_row
  const auto decode = [&](int64_t k, int64_t k_count, int64_t n, int64_t n_count, typename Core::Slice* slices) {
    for (int64_t i = 0; i < n_count; i += Core::kStep) {
      for (int s = 0; s < Core::kStep; ++s) __builtin_prefetch(w.packed + (n + i + s + kAhead) * w.K + k);
      for (int64_t c = 0; c < k_count; c += kTileK) {
        const int64_t here = k_count - c < kTileK ? k_count - c : kTileK;
        Isa::F even[Core::kStep], odd[Core::kStep];
        for (int s = 0; s < Core::kStep; ++s) {
          if (n + i + s < w.N) {
            decode_even_odd_int8(w, n + i + s, k + c, here, even[s], odd[s]);
          } else {
            even[s] = Isa::zero();
            odd[s] = Isa::zero();
          }
        }
        Core::store_rows(slices[c / kTileK] + i * kTileK, even, odd);
      }
    }
  };
  with_type(args.dtype, [&](auto t) {
    const auto store = [&](int64_t m, int64_t k, int64_t k_count, const float* sums) {
      store_dx<decltype(t)>(args, m, k, k_count, sums);
    };
    gemm<Core>(args, /*D=*/w.N, /*C=*/w.K, tile_begin, tile_end, workspace, decode, store);
  });
}

}  // namespace
}  // namespace nf4::cpu
