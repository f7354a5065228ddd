// Which kernels multiply on a CPU, and how finely the work is split over threads: pure arithmetic, no torch, no state.
#pragma once

#include "../format.h"

namespace nf4::cpu {

// How a row of the table in dispatch.cpp multiplies, the last apart, which is torch's GEMM. kFp32 takes any activation
// dtype.
enum class Products : int32_t { kFp32, kBf16, kBf16Codes, kTiles, kDequantizeGemm };
constexpr const char* kProductsNames[] = {"fp32", "bf16", "bf16_codes", "tiles", "dequantize_gemm"};

// What a user can force of 16-bit products: from the packed bytes, or dequantize + GEMM. True fp32 is always fused: no
// vendor's GEMM is faster there, and the bits of MKL's depend on the number of threads.
enum class Forced : int32_t { kNothing, kFused, kDequantizeGemm };
constexpr const char* kForcedNames[] = {"", "fused", "dequantize_gemm"};

// What torch's GEMM multiplies with here: bits. Both have sums in fp32.
constexpr int32_t kAmxBf16 = 1, kAmxFp16 = 2;

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
  int64_t weights;  // N * K
  bool has_tiles;   // kernels on AMX tiles
  int32_t amx;      // of torch's GEMM
  Forced forced;
};

struct Choice {
  Products products;
  const char* reason;
};

// Above, scaling dY anew for each run of k costs more than decoding W once. 128 was measured on a Zen 4 EPYC; for the
// shorter runs it is less by what they cost more: 4 and 10 % of the products at M = 64 (2048x2048, one Xeon core).
constexpr int dgrad_codes_max_m(int run) { return run == 64 ? 128 : run == 32 ? 96 : 64; }

// From where torch's GEMM on AMX is faster than the fused products, which are on tiles in bf16 alone. Measured in bf16
// with vdpbf16ps: both take as long at 15 rows (linear) and 22 (linear_dgrad), at 32 the GEMM is 1.4 to 1.5 times as
// fast (4096x4096 and 2048x2048, two Xeon cores). A slice costs some 25 us more in calls, which 2^24 products on four
// cores make up for.
constexpr int64_t kAmxMinM = 32, kAmxMinProducts = 1 << 24;

// Tiles have 16 rows, so that M <= 16 takes as long as 16: 1.43 ms for linear of 4096x4096, where codes in whole numbers
// take 1.29 at M = 4; and 2.3 for linear_dgrad, where the codes take 2.1 at M = 2 and 2.4 at 3. The same in small layers
// (576x1536: 99 us, and 98 and 121). Rows that are spread meet the codes just below 16 (one Xeon core).
constexpr int64_t tiles_min_m(bool is_dgrad, int run) { return run != 64 ? 16 : is_dgrad ? 3 : 5; }

static inline Choice choose(const Problem& p) {
  const int32_t wanted = p.dtype == Dtype::kBFloat16 ? kAmxBf16 : p.dtype == Dtype::kFloat16 ? kAmxFp16 : 0;
  if (wanted != 0 && p.forced == Forced::kDequantizeGemm) return {Products::kDequantizeGemm, "forced"};
  if (p.has_tiles && p.dtype == Dtype::kBFloat16 && p.M >= tiles_min_m(p.is_dgrad, p.code_run))
    return {Products::kTiles, "products on AMX tiles"};
  if ((p.amx & wanted) != 0 && p.forced == Forced::kNothing && p.M >= kAmxMinM && p.M * p.weights >= kAmxMinProducts)
    return {Products::kDequantizeGemm, "torch's GEMM has AMX: predicted to be faster from M = 32 on"};
  if (p.dtype != Dtype::kBFloat16) return {Products::kFp32, "fp32 and fp16 activations: fp32 products"};
  if (p.code_run == 0) return {Products::kBf16, "rows of W are not whole runs of 64 codes: W is scaled"};
  if (p.is_dgrad && p.M > dgrad_codes_max_m(p.code_run))
    return {Products::kBf16, "dgrad of M > 128, 96 or 64 at 64, 32 or 16 weights a scale: W is scaled, not dY"};
  return {Products::kBf16Codes, "16 to 64 weights share a scale: products of codes, where the CPU has such"};
}
// Of lora_inner and lora_grad.
static inline Products choose_lora(Dtype inputs) {
  return inputs == Dtype::kBFloat16 ? Products::kBf16 : Products::kFp32;
}

static inline int64_t at_least_1(int64_t a) { return a > 1 ? a : 1; }

// In how many parts threads share the rows of a pass, beside its C tiles: what has the least work for the thread that has
// the most, counted in rows of a C tile. Each part decodes B anew, which takes as long as some 40 rows (AMX) or fewer;
// and a row that another thread has packed comes from that core's cache, which takes as long as 160 columns (AMX).
constexpr int64_t kDecodeRows = 40, kForeignColumns = 160, kLeastPartRows = 64;
static inline int64_t row_parts(int64_t rows, int64_t c_tiles, int64_t tile_c, int64_t threads) {
  int64_t best = 1, least = 0;
  for (int64_t parts = 1; parts == 1 || ceil_div(rows, parts) >= kLeastPartRows; ++parts) {
    const int64_t part_rows = ceil_div(rows, parts), own_rows = rows / threads;
    const int64_t foreign_rows = part_rows > own_rows ? part_rows - own_rows : 0;
    const int64_t work =
        ceil_div(c_tiles * parts, threads) * (part_rows + kDecodeRows) + foreign_rows * kForeignColumns / tile_c;
    if (parts == 1 || work < least) {
      best = parts;
      least = work;
    }
  }
  return best;
}

// dequantize + GEMM: the bytes of a slice that a thread has, as a core's L2 of a CPU with AMX, and the most of all. The
// columns of out that a slice of linear_dgrad has at least: narrower ones read W in pieces that are too short, 7.5 ms
// for a whole 4096x4096 at 128 columns, 3.7 at 256 and 2.8 at 512, where rows take 2.0 (one Zen 4 core).
constexpr int64_t kSliceBytes = 2 << 20, kMostSliceBytes = 32 << 20, kDgradSliceColumns = 512;
constexpr int64_t kSliceStep = 64;  // columns of out
constexpr int64_t kTermStep = 32;   // of the contraction: what AMX multiplies at once of 16 bits
constexpr int64_t kAlignment = 64;
constexpr int64_t kNearPanelBytes = 4096;  // up to which a packed x lies on the stack: torch's allocator takes 0.5 us

// The least work of one thread: items of a parallel loop.
constexpr int64_t kDecodeGrain = 16384;  // weights, whole cache lines of packed bytes; for quantize and dequantize
constexpr int64_t kSuperblockGrain = 16;
// n; 5 us of the bf16 products in a cache. A second thread costs 4 to 5 us: at half of this grain a layer of 192x576
// took 24.6 us with one and 26.6 with two, out of the caches (a Zen 4 EPYC, beside other processes).
static inline int64_t gemv_grain(int64_t K) { return ceil_div(1 << 17, at_least_1(K)); }
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
