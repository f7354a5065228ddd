// Which kernels multiply on a CPU, and how finely the work is split over threads: pure arithmetic, no torch, no state.
#pragma once

#include "../format.h"

namespace nf4::cpu {

// How a row of the table in dispatch.cpp multiplies. kFp32 takes any activation dtype.
enum class Products : int32_t { kFp32, kBf16, kBf16Codes };
constexpr const char* kProductsNames[] = {"fp32", "bf16", "bf16_codes"};

// How many consecutive weights of a row, on multiples of it, certainly share a scale: 64, 32 or 16; 0 where K is no
// multiple of 64. What the products of unscaled codes need.
static inline int code_run(const Weight& w) {
  if (w.K == 0 || w.K % 64 != 0) return 0;
  return w.block_shift < 6 ? 1 << w.block_shift : 64;
}

struct Problem {
  bool is_dgrad;
  Dtype dtype;  // of the activations
  int64_t M;
  int code_run;
};

struct Choice {
  Products products;
  bool is_gemv;  // linear row by row of W, straight from the packed bytes; else a blocked product
  const char* reason;
};

constexpr int kGemvMaxM = 4;
// Above, scaling dY anew for each run of k costs more than decoding W once. 128 was measured on a Zen 4 EPYC; for the
// shorter runs it is less by what they cost more: 4 and 10 % of the products at M = 64 (2048x2048, one Xeon core).
constexpr int dgrad_codes_max_m(int run) { return run == 64 ? 128 : run == 32 ? 96 : 64; }

static inline Choice choose(const Problem& p) {
  const bool is_gemv = !p.is_dgrad && p.M <= kGemvMaxM;
  if (p.dtype != Dtype::kBFloat16) return {Products::kFp32, is_gemv, "fp32 and fp16 activations: fp32 products"};
  if (p.code_run == 0) return {Products::kBf16, is_gemv, "rows of W are not whole runs of 64 codes: W is scaled"};
  if (p.is_dgrad && p.M > dgrad_codes_max_m(p.code_run))
    return {Products::kBf16, is_gemv,
            "dgrad of M > 128, 96 or 64 at 64, 32 or 16 weights a scale: W is scaled, not dY"};
  return {Products::kBf16Codes, is_gemv, "16 to 64 weights share a scale: products of codes, scaled later"};
}
// Of lora_inner and lora_grad.
static inline Products choose_lora(Dtype inputs) {
  return inputs == Dtype::kBFloat16 ? Products::kBf16 : Products::kFp32;
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t at_least_1(int64_t a) { return a > 1 ? a : 1; }

// The least work of one thread: items of a parallel loop.
constexpr int64_t kDecodeGrain = 16384;  // weights, whole cache lines of packed bytes; for quantize and dequantize
constexpr int64_t kSuperblockGrain = 16;
static inline int64_t gemv_grain(int64_t K) { return ceil_div(65536, at_least_1(K)); }                     // n; 5 us
static inline int64_t pack_grain(int64_t D, int64_t tile_m) { return ceil_div(32768, (D + 1) * tile_m); }  // M tiles
static inline int64_t lora_grad_grain(int64_t M, int64_t rank, int64_t tile_c) {                           // C tiles
  return ceil_div(1 << 19, at_least_1(M * rank * tile_c));
}
static inline int64_t lora_inner_grain(int64_t rows, int64_t rank, int64_t D) {  // parts of `rows`
  return ceil_div(1 << 17, at_least_1(rows * rank * D));
}

static inline int64_t combine_grain(int64_t top_k, int64_t H) {  // tokens
  return ceil_div(1 << 15, at_least_1(top_k * H));
}

}  // namespace nf4::cpu
