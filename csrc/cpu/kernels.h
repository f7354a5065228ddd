// The CPU kernels' signatures: raw pointers and sizes, no torch. Threads are the caller's: each function does a range.
#pragma once

#include "../format.h"
#include "../rounded_code.h"

namespace nf4 {

constexpr int kGemvRows = 4;          // linear with M <= kGemvRows goes row by row of W straight from the packed bytes
constexpr int kDgradCodesRows = 128;  // above, scaling dy anew for each 64 columns costs more than decoding once
constexpr int kGemmRows = 512;        // rows of x per pass: what one decode of a weight tile is used for
constexpr int kGemmDepth = 256;       // contraction length decoded at a time and added to the fp32 tile at once

struct QuantizeArgs {
  const void* weight;  // [numel] of dtype
  Dtype dtype;
  int64_t numel;
  const float* code;  // [16], any order
  int block_size;
  uint8_t* packed;  // [ceil(numel/2)]
  float* absmax;    // [ceil(numel/block_size)]
};

// One matrix product against the weight. linear: rows of x are K long and y's are N; dgrad: dy's are N, dx's are K.
struct GemmArgs {
  Weight weight;
  RoundedCode<BFloat16> bf16_code;  // set for ProductKernels of codes
  Dtype dtype;
  const void* panel;  // packed rows of x or dy, as GemvKernel::pack or GemmKernel::pack left them
  int64_t rows;       // at most kGemmRows (gemm) or kGemvRows (gemv)
  const void* bias;   // [N] of dtype, or null
  void* out;          // [rows, N] or [rows, K] of dtype, contiguous
  // LoRA's term, see low_rank.h.
  int64_t rank;                 // 0: none
  const float* low_rank_x;      // [rows, rank], times the scaling
  const void* low_rank_factor;  // linear: B [N, rank]; linear_dgrad: A [rank, K]; of dtype
};

// The gradient of a LoRA factor, see lora_grad.h.
struct LoraGradArgs {
  const void* small;     // [rank, small_stride], of LoraGradKernel::small
  int64_t small_stride;  // rows, rounded up to even; what is past the rows is zero
  int64_t rank;
  const void* wide;  // [rows, columns] of dtype
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  float scaling;
  void* out;  // [rank, columns], or [columns, rank] if transposed, of out_dtype
  Dtype out_dtype;
  bool transposed;
};

using QuantizeFn = void (*)(const QuantizeArgs&, int64_t block_begin, int64_t block_end);
// Flat elements [begin, begin + count) of the weight into out, of dtype.
using DequantizeFn = void (*)(const Weight&, int64_t begin, int64_t count, Dtype dtype, void* out);
// Row-major [rows, depth] of dtype into the layout that the product reads.
using PackFn = void (*)(const void* x, Dtype dtype, int64_t rows, int64_t depth, void* panel);
// Row tiles [tile_begin, tile_end) of x; see row_tiles.
using GemmPackFn = void (*)(const void* x, Dtype dtype, int64_t rows, int64_t depth, int64_t tile_begin,
                            int64_t tile_end, void* panel);
// Rows [n_begin, n_end) of W.
using GemvFn = void (*)(const GemmArgs&, int64_t n_begin, int64_t n_end);
// Column tiles [tile_begin, tile_end) of the output, each of `tile_cols`; workspace of `workspace_bytes`.
using GemmFn = void (*)(const GemmArgs&, int64_t tile_begin, int64_t tile_end, void* workspace);

// Tiles of 2L columns.
using LoraGradFn = void (*)(const LoraGradArgs&, int64_t tile_begin, int64_t tile_end);

struct LoraGradKernel {
  LoraGradFn run;
  int tile_cols;
  Dtype small;  // what LoraGradArgs::small is
};

// linear or linear_dgrad as a blocked product, see gemm.h.
struct GemmKernel {
  int max_tile_rows;        // rows of x per register tile
  int tile_cols;            // columns of the output per register tile
  int depth_step;           // a panel's rows are padded to whole steps of the contraction
  int element_bytes;        // of a panel element
  int64_t workspace_bytes;  // per thread
  GemmPackFn pack;
  GemmFn run;
};

// linear at M <= kGemvRows.
struct GemvKernel {
  int depth_step;     // as above
  int element_bytes;  // of a panel element
  PackFn pack;
  GemvFn run;
};

struct ProductKernels {
  const GemvKernel* gemv;
  const GemmKernel* linear;
  const GemmKernel* linear_dgrad;
  const LoraGradKernel* lora_grad;
  bool codes = false;  // whether they read GemmArgs::bf16_code
};

struct CpuKernels {
  const char* name;
  bool (*supported)();  // by this CPU and its operating system
  QuantizeFn quantize;
  DequantizeFn dequantize;
  ProductKernels any;         // fp32 products, any activation dtype
  ProductKernels bf16;        // for bf16 activations
  ProductKernels bf16_codes;  // the same where has_whole_codes(weight); linear_dgrad up to kDgradCodesRows
};

// Rows of x are split evenly over as few register tiles as can hold them; tile t begins at row_of_tile.
static inline int64_t row_tiles(int64_t rows, int64_t max_tile_rows) {
  return (rows + max_tile_rows - 1) / max_tile_rows;
}
static inline int64_t row_of_tile(int64_t tile, int64_t tiles, int64_t rows) { return tile * rows / tiles; }

// The scales' own quantization: 1/block_size of the data, so one portable version is enough.
double superblock_sum(const float* absmax, int64_t count);
float superblock_absmax(const float* absmax, int64_t count, float scale_offset);
void quantize_superblock_e4m3(const float* absmax, int64_t count, float scale_offset, float scale_absmax, uint8_t* out);
void quantize_superblock_sorted(const float* absmax, int64_t count, float scale_offset, float scale_absmax,
                                const float* scale_code, uint8_t* out);

// fp32 out[i] = small[i] * scaling, for GemmArgs::low_rank_x.
void scale_low_rank(const void* small, Dtype dtype, int64_t count, float scaling, float* out);
// [rank, stride] of out_dtype (fp32, or dtype itself) from small [rows, rank], for LoraGradArgs::small.
void transpose_low_rank(const void* small, Dtype dtype, int64_t rows, int64_t rank, int64_t stride, Dtype out_dtype,
                        void* out);

#define NF4_DECLARE_ISA(isa)                                                                  \
  void quantize_##isa(const QuantizeArgs&, int64_t block_begin, int64_t block_end);           \
  void dequantize_##isa(const Weight&, int64_t begin, int64_t count, Dtype dtype, void* out); \
  extern const GemvKernel kGemv_##isa;                                                        \
  extern const GemmKernel kLinear_##isa, kLinearDgrad_##isa;                                  \
  extern const LoraGradKernel kLoraGrad_##isa;

NF4_DECLARE_ISA(scalar)
NF4_DECLARE_ISA(avx2)
NF4_DECLARE_ISA(avx512)
extern const GemvKernel kGemvCodes_avx512_bf16;
extern const GemmKernel kLinear_avx512_bf16, kLinearDgrad_avx512_bf16;
extern const GemmKernel kLinearCodes_avx512_bf16, kLinearDgradCodes_avx512_bf16;
extern const LoraGradKernel kLoraGrad_avx512_bf16;  // bf16 wide and small

// dispatch.cpp
const CpuKernels& active_kernels();

}  // namespace nf4
