// linear, M > 4: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]
//
// Read first   gemm.h.
// Work split   N tiles of 2L rows of W. The caller splits them over threads.
// Inner loop   16 bytes (32 codes) of each of L rows of W are transposed before they are decoded, so that each lookup
//              yields one k of L columns of y. (Transposing decoded fp32 would move 8 times the bytes.)
// Prefetch     The next slice of each row: the rows lie K/2 bytes apart, further than the hardware looks ahead (5.0 to
//              4.2 ms at M = 16 out of cache; 4096x4096, one core of a Zen 4 EPYC).
// Flops        2*M*N*K; decoding takes as long as the bf16 products of 11 rows of x (the same machine).
// Needs        K % 32 == 0 for the vector path; other K decode whole spans first.
//
//   16 bytes of each row of W                 load_transposed: words[j], L lanes
//     n      | k 0-7 | 8-15 | 16-23 | 24-31 |   words[0]  | k 0-7 of n  | k 0-7 of n+1  | ...
//     n+1    | k 0-7 | 8-15 | 16-23 | 24-31 |   words[1]  | k 8-15 of n | k 8-15 of n+1 | ...
//
//   Byte b of a lane of words[j] holds k = 8j + 2b in its high nibble and 8j + 2b + 1 in its low one: two lookups,
//   which give two rows k of the slice.
#pragma once

#include "decode_span.h"
#include "gemm.h"

namespace nf4::cpu {
namespace {

constexpr int kTileN = kDecodedTileC;

// The scales at k of rows [n, n + n_count) of W; the last one again in the lanes past them.
static inline Isa::F scales_of_rows(const Weight& w, int64_t n, int64_t n_count, int64_t k) {
  float scales[Isa::L];
  for (int64_t r = 0; r < Isa::L; ++r) {
    const int64_t row = n + (r < n_count ? r : n_count - 1);
    scales[r] = block_scale(w, (row * w.K + k) >> w.block_shift);
  }
  return Isa::load(scales);
}

// Byte BYTE of each lane, decoded and scaled: two consecutive k of L rows of W.
template <int BYTE>
static inline void decode_byte(const Isa::Table& table, Isa::I codes, Isa::F scale, Isa::F& even, Isa::F& odd) {
  Isa::template lookup_nibbles<BYTE>(table, codes, even, odd);
  even = Isa::mul(even, scale);
  odd = Isa::mul(odd, scale);
}

// fp32 slices are [k][kTileN]. store_k_pair writes k and k+1 of the L columns from `out` on.
struct LinearFp32 : Fp32Core {
  using Factor = LoraB;
  static constexpr int kGroup = 1;
  static void store_k_pair(float* out, Isa::F even, Isa::F odd) {
    Isa::store(out, even);
    Isa::store(out + kTileN, odd);
  }
};

// W[n .. n + n_count, k .. k + k_count], transposed, into a slice; its columns past n_count repeat the last one.
template <class Core>
void decode_tile(const Weight& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                 typename Core::Element* slice) {
  const Isa::Table table = Isa::load_table(w.code);
  const bool scale_changes_inside = w.K % (int64_t(1) << w.block_shift) != 0;
  const int64_t block_mask = (int64_t(1) << w.block_shift) - 1;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = n + v * Isa::L < n + n_count ? n + v * Isa::L : n + n_count - 1;
    const int64_t here = n + n_count - first < Isa::L ? n + n_count - first : Isa::L;
    const uint8_t* rows[Isa::L];
    for (int64_t r = 0; r < Isa::L; ++r) {
      rows[r] = w.packed + (first + (r < here ? r : here - 1)) * (w.K / 2);
      for (int64_t line = 0; line < k_count / 2; line += 64) __builtin_prefetch(rows[r] + (k + k_count) / 2 + line);
    }
    Isa::F scale = scales_of_rows(w, first, here, k);
    for (int64_t i = 0; i < k_count; i += 32) {
      Isa::I words[4];
      Isa::load_transposed(rows, (k + i) / 2, words);
      typename Core::Element* out = slice + i * kTileN + v * Isa::L * Core::kStep;
      for (int j = 0; j < 4; ++j, out += 8 * kTileN) {
        const int64_t at = i + 8 * j;
        if (at > 0 && j % 2 == 0 && (((k + at) & block_mask) == 0 || (scale_changes_inside && j == 0)))
          scale = scales_of_rows(w, first, here, k + at);
        Isa::F even, odd;
        decode_byte<0>(table, words[j], scale, even, odd);
        Core::store_k_pair(out, even, odd);
        decode_byte<1>(table, words[j], scale, even, odd);
        Core::store_k_pair(out + 2 * kTileN, even, odd);
        decode_byte<2>(table, words[j], scale, even, odd);
        Core::store_k_pair(out + 4 * kTileN, even, odd);
        decode_byte<3>(table, words[j], scale, even, odd);
        Core::store_k_pair(out + 6 * kTileN, even, odd);
      }
    }
  }
}

// The same for any K: each row of W is decoded as a span, by span(begin, count, out), then spread over the slice's
// column.
template <class Core, class Span>
void spread_spans(const Weight& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                  typename Core::Element* slice, Span span) {
  typename Core::Element decoded[kSliceD];
  const int64_t inside = w.K - k < k_count ? w.K - k : k_count;
  std::memset(static_cast<void*>(decoded), 0, sizeof decoded);
  for (int64_t c = 0; c < kTileN; ++c) {
    if (c < n_count) span((n + c) * w.K + k, inside, decoded);
    typename Core::Element* out = slice + c * Core::kStep;
    for (int64_t i = 0; i < k_count; i += Core::kStep, out += kTileN * Core::kStep)
      std::memcpy(static_cast<void*>(out), decoded + i, Core::kStep * sizeof *out);
  }
}
template <class Core>
void decode_tile_spans(const Weight& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                       typename Core::Element* slice) {
  spread_spans<Core>(w, n, n_count, k, k_count, slice,
                     [&](int64_t begin, int64_t count, auto* out) { decode_span(w, begin, count, out); });
}

// y[m, n .. n + n_count] from its finished fp32 sums, with bias.
static inline void store_y(const GemmArgs& args, int64_t m, int64_t n, int64_t n_count, const float* sums) {
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.out) + m * args.weight.N + n;
    int64_t c = 0;
    for (; c + Isa::L <= n_count; c += Isa::L) {
      const Isa::F sum = Isa::load(sums + c);
      Isa::store(y + c, bias == nullptr ? sum : Isa::add(sum, Isa::load(bias + n + c)));
    }
    for (; c < n_count; ++c) y[c] = from_float<T>(sums[c] + (bias == nullptr ? 0.f : to_float(bias[n + c])));
  });
}

template <class Core>
void linear_tiles(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  const Weight& w = args.weight;
  const auto decode = [&](int64_t n, int64_t n_count, int64_t k, int64_t k_count, typename Core::Slice* slice) {
    if (w.K % 32 == 0)
      decode_tile<Core>(w, n, n_count, k, k_count, *slice);
    else
      decode_tile_spans<Core>(w, n, n_count, k, k_count, *slice);
  };
  const auto store = [&](int64_t m, int64_t n, int64_t n_count, const float* sums) {
    store_y(args, m, n, n_count, sums);
  };
  gemm<Core>(args, /*D=*/w.K, /*C=*/w.N, tile_begin, tile_end, workspace, decode, store);
}

}  // namespace
}  // namespace nf4::cpu
