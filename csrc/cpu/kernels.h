// The CPU kernels' signatures: raw pointers and sizes, no torch. Threads are the caller's: each function does a range.
//
// What linear and linear_dgrad share speaks of out[M, C] = x[M, D] @ B[D, C]; elsewhere N and K are the weight's.
//
//   linear         x is x     C = N   D = K   B = W^T
//   linear_dgrad   x is dY    C = K   D = N   B = W
#pragma once

#include "../format.h"
#include "../rounded_code.h"
#include "choose.h"

namespace nf4::cpu {

// A weight of 8 bits, int8, has no `code`: each of its bytes is its level, a signed integer.
static inline bool is_int8(const Weight& w) { return w.code == nullptr; }
static inline int64_t packed_bytes(const Weight& w, int64_t weights) { return is_int8(w) ? weights : weights / 2; }

constexpr int kPassM = 512;   // rows of x that one decode of a tile of B serves
constexpr int kSliceD = 256;  // D decoded at a time, whose products are added to the fp32 tile at once

struct QuantizeArgs {
  const void* weight;  // [numel] of dtype
  Dtype dtype;
  int64_t numel;
  const float* code;  // [16], any order; null: int8
  int block_size;
  uint8_t* packed;  // [ceil(numel/2)]; of int8 [numel]
  float* absmax;    // [ceil(numel/block_size)]
};

struct QuantizeAbsmaxArgs {
  const float* absmax;  // [blocks]
  int64_t blocks;
  const float* scale_code;  // [256]
  bool scale_is_e4m3;
  float scale_offset;
  uint8_t* quantized;   // [blocks]
  float* scale_absmax;  // [superblocks]
};

struct GemmArgs {
  Weight weight;
  RoundedCode<BFloat16> bf16_code;  // set where ProductKernels::needs_bf16_code
  RoundedCode<Int13> int_code;      // set where ProductKernels::int_code_run asks for it
  Dtype dtype;                      // of x and out
  const void* panel;                // x as GemvKernel::pack or GemmKernel::pack left it
  int64_t M;                        // at most kPassM (gemm) or GemvKernel::max_m
  const void* bias;                 // [N] of dtype, or null
  void* out;                        // [M, C] of dtype, contiguous
  // The LoRA term, see lora_term.h.
  int64_t rank;                // 0: none
  const float* lora_inner;     // [M, rank], times the scaling
  const void* lora_factor;     // linear: B [N, rank]; linear_dgrad: A [rank, K]; of dtype
  const void* unscaled_inner;  // [M, rank] of dtype, for dequantize + GEMM
  float scaling;
};

// out[M, C] = x[M, D] times the weight.
struct Product {
  bool is_dgrad;
  int64_t C, D;
};

// The gradient of a LoRA factor, see lora_grad.h.
struct LoraGradArgs {
  const void* lora_inner;     // transposed: [rank, lora_inner_stride] of LoraGradKernel::inner_dtype
  int64_t lora_inner_stride;  // M rounded up to even; what is past M is zero
  int64_t rank;
  const void* wide;  // [M, C] of dtype
  Dtype dtype;
  int64_t M, C;
  float scaling;
  void* out;  // [rank, C], or [C, rank] if transposed, of out_dtype
  Dtype out_dtype;
  bool transposed;
};

// LoRA's inner product of one expert's rows, see lora_inner.h.
struct LoraInnerArgs {
  const void* x;  // [M, D] of dtype
  Dtype dtype;
  int64_t M, D;
  const void* factor;  // [rank, D], or [D, rank] if transposed, of dtype
  int64_t rank;
  void* out;  // [M, rank] of dtype
  bool transposed;
};

// The rows of experts [T * top_k, H] and the tokens [T, H] that they are of, see combine_experts.h.
struct CombineArgs {
  int64_t top_k, H;
  const int32_t* positions;  // [T, top_k], each p or ~p with p below T * top_k
  const float* weights;      // [T, top_k]
  const void* rows;          // combine, wgrad: read
  Dtype rows_dtype;
  const void* tokens;  // dgrad, wgrad: dout
  Dtype tokens_dtype;
  void* out;  // combine: tokens; dgrad: rows; wgrad: dweights [T, top_k]
  Dtype out_dtype;
};

using QuantizeFn = void (*)(const QuantizeArgs&, int64_t block_begin, int64_t block_end);
// Flat elements [begin, begin + count) of the weight into out, of dtype.
using DequantizeFn = void (*)(const Weight&, int64_t begin, int64_t count, Dtype dtype, void* out);
// Row-major x [M, K] of dtype into the panel that the gemv reads.
using GemvPackFn = void (*)(const void* x, Dtype dtype, int64_t M, int64_t K, void* panel);
// y[:, n_begin .. n_end).
using GemvFn = void (*)(const GemmArgs&, int64_t n_begin, int64_t n_end);
// Row-major x [M, D] of dtype into the panel that the gemm reads, its M tiles [tile_begin, tile_end); see m_tiles.
using GemmPackFn = void (*)(const void* x, Dtype dtype, int64_t M, int64_t D, int64_t tile_begin, int64_t tile_end,
                            void* panel);
// C tiles [tile_begin, tile_end) of out, each of GemmKernel::tile_c columns; workspace of `workspace_bytes`.
using GemmFn = void (*)(const GemmArgs&, int64_t tile_begin, int64_t tile_end, void* workspace);
// C tiles of out, each of LoraGradKernel::tile_c columns.
using LoraGradFn = void (*)(const LoraGradArgs&, int64_t tile_begin, int64_t tile_end);

// Rows [m_begin, m_end) of out.
using LoraInnerFn = void (*)(const LoraInnerArgs&, int64_t m_begin, int64_t m_end);

// Tokens [t_begin, t_end).
using CombineFn = void (*)(const CombineArgs&, int64_t t_begin, int64_t t_end);

struct CombineKernels {
  CombineFn combine, dgrad, wgrad;
};

struct LoraGradKernel {
  LoraGradFn run;
  int tile_c;
  Dtype inner_dtype;  // of LoraGradArgs::lora_inner
};

// linear or linear_dgrad as a blocked product, see gemm.h.
struct GemmKernel {
  int tile_m;               // most rows of x in a register tile
  int tile_c;               // columns of out in a register tile
  int step_d;               // a panel pads D to whole steps
  int element_bytes;        // of a panel element
  int64_t workspace_bytes;  // per thread
  GemmPackFn pack;
  GemmFn run;
};

constexpr int kGemvMaxM = 4;  // of those whose registers hold a sum for each row of x

// linear at M <= max_m, row by row of W, straight from the packed bytes.
struct GemvKernel {
  int max_m;
  int64_t (*row_bytes)(int64_t K);  // of a row of x in the panel
  GemvPackFn pack;
  GemvFn run;
};

struct ProductKernels {
  const GemvKernel* gemv;
  const GemmKernel* linear;
  const GemmKernel* linear_dgrad;
  const LoraGradKernel* lora_grad;
  LoraInnerFn lora_inner;
  bool needs_bf16_code = false;
  int int_code_run = 0;  // of a gemv in whole numbers, which is for 16-bit x: the least code_run of the weight
};

// Of int8 weights. 16-bit x is multiplied in fp32 where `bf16` has the kernels of `fp32`.
struct Int8Kernels {
  QuantizeFn quantize;
  DequantizeFn dequantize;
  struct Gemms {
    const GemmKernel *linear, *linear_dgrad;
  } fp32, bf16;
  const GemvKernel* gemv;
};

struct CpuKernels {
  const char* name;
  bool (*is_supported)();  // by this CPU and its operating system
  QuantizeFn quantize;
  DequantizeFn dequantize;
  const CombineKernels* combine_experts;
  const Int8Kernels* int8;
  ProductKernels products[4];  // by choose.h's Products, but for dequantize + GEMM; kTiles empty where there are none

  const ProductKernels& operator[](Products which) const { return products[int(which)]; }
};

// The M rows of x are split evenly over as few tiles as can hold them; tile t begins at first_m(t, tiles, M).
static inline int64_t m_tiles(int64_t M, int64_t tile_m) { return ceil_div(M, tile_m); }
static inline int64_t first_m(int64_t tile, int64_t tiles, int64_t M) { return tile * M / tiles; }

// quantize_absmax.cpp: the scales are 1/block_size of the data, so one portable version is enough.
int64_t superblocks_of(int64_t blocks);
// The fp64 sums of superblocks [begin, end), then the mean of all from them.
void sum_superblocks(const QuantizeAbsmaxArgs&, int64_t begin, int64_t end, double* sums);
float mean_absmax(const QuantizeAbsmaxArgs&, const double* sums);
// Superblocks [begin, end) of quantized and scale_absmax, by scale_offset.
void quantize_superblocks(const QuantizeAbsmaxArgs&, int64_t begin, int64_t end);

// fp32 out[i] = lora_inner[i] * scaling, for GemmArgs::lora_inner.
void scale_lora_inner(const void* lora_inner, Dtype dtype, int64_t count, float scaling, float* out);
// [rank, stride] of out_dtype (fp32, or dtype itself) from lora_inner [M, rank], for LoraGradArgs::lora_inner.
void transpose_lora_inner(const void* lora_inner, Dtype dtype, int64_t M, int64_t rank, int64_t stride, Dtype out_dtype,
                          void* out);

// sort_by_expert.cpp: positions [count] and offsets [experts] as ops.py says them of the expert of each choice. Returns
// the first choice whose expert is outside 0..experts, or -1; the outputs are then not written.
int64_t sort_by_expert(const int64_t* experts_of, int64_t count, int64_t experts, int32_t* offsets, int32_t* positions);

#define NF4_DECLARE_ISA(isa)                                                                       \
  void quantize_##isa(const QuantizeArgs&, int64_t block_begin, int64_t block_end);                \
  void dequantize_##isa(const Weight&, int64_t begin, int64_t count, Dtype dtype, void* out);      \
  void quantize_int8_##isa(const QuantizeArgs&, int64_t block_begin, int64_t block_end);           \
  void dequantize_int8_##isa(const Weight&, int64_t begin, int64_t count, Dtype dtype, void* out); \
  extern const GemvKernel kGemv_##isa, kGemvInt8_##isa;                                            \
  extern const GemmKernel kLinear_##isa, kLinearDgrad_##isa;                                       \
  extern const GemmKernel kLinearInt8_##isa, kLinearDgradInt8_##isa;                               \
  extern const CombineKernels kCombineExperts_##isa;                                               \
  extern const LoraGradKernel kLoraGrad_##isa;                                                     \
  void lora_inner_##isa(const LoraInnerArgs&, int64_t m_begin, int64_t m_end);

NF4_DECLARE_ISA(scalar)
NF4_DECLARE_ISA(avx2)
NF4_DECLARE_ISA(avx512)
NF4_DECLARE_ISA(neon)
extern const GemvKernel kGemvInt_avx2, kGemvInt_avx512, kGemvInt_amx_bf16;
extern const GemvKernel kGemvCodes_avx512_bf16;
extern const GemmKernel kLinear_avx512_bf16, kLinearDgrad_avx512_bf16;
extern const GemmKernel kLinearInt8_avx512_bf16, kLinearDgradInt8_avx512_bf16;
extern const GemmKernel kLinearCodes_avx512_bf16, kLinearDgradCodes_avx512_bf16;
extern const GemmKernel kLinear_amx_bf16, kLinearDgrad_amx_bf16;
extern const LoraGradKernel kLoraGrad_avx512_bf16;                                  // bf16 wide and lora_inner
void lora_inner_avx512_bf16(const LoraInnerArgs&, int64_t m_begin, int64_t m_end);  // bf16
void dequantize_neon_bf16(const Weight&, int64_t begin, int64_t count, Dtype dtype, void* out);
extern const GemvKernel kGemv_neon_bf16, kGemvCodes_neon_bf16;
extern const GemmKernel kLinear_neon_bf16, kLinearDgrad_neon_bf16;
extern const LoraGradKernel kLoraGrad_neon_bf16;                                  // bf16 wide and lora_inner
void lora_inner_neon_bf16(const LoraInnerArgs&, int64_t m_begin, int64_t m_end);  // bf16

// dispatch.cpp
const CpuKernels& active_kernels();
bool runs_best_isa();  // that this CPU supports: none that is slower was forced

// torch_gemm.cpp
int32_t detect_amx(const char** why_not);  // choose.h's bits, of this CPU and its operating system
int32_t amx_of_torch();                    // the same of torch's GEMM, none where a slower instruction set is forced
Forced forced_products();
void note(Products);  // what ran, for tests

// Scratch memory of this thread, kept between calls: a slice and a tile of one product, at most 1 MB; or the slice of
// dequantize + GEMM.
void* thread_workspace(int64_t bytes);

}  // namespace nf4::cpu
