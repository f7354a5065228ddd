// The driver of linear and linear_dgrad, of one weight or of experts: chooses the kernel, packs x, splits over threads.
//
//   few rows, linear    pack x; threads share N (M <= 4, 16 by integers)    linear_gemv.h
//   otherwise           for each 512 rows of x: threads pack x's M tiles;   gemm.h
//                       then they share the C tiles of out
//   where it is chosen  slice by slice, by torch's GEMM                     dequantize_gemm.h
//
// Runtime, the caller's, has parallel_for(begin, end, grain, body), which calls body(begin, end) on parts of the range
// at once; allocate(bytes): memory for a panel, valid until the next call; threads(); and gemm(SliceGemm).
#pragma once

#include "convert.h"
#include "dequantize_gemm.h"
#include "kernels.h"

namespace nf4::cpu {

// The chosen kernels, with what they need of args filled in: args.weight, dtype and M are set.
struct Plan {
  const GemvKernel* gemv;  // or null
  const GemmKernel* gemm;  // null: dequantize + GEMM
};
Plan plan_product(const Product& product, GemmArgs& args);

template <class Runtime>
void multiply_gemv(Runtime& runtime, const GemvKernel& gemv, GemmArgs& args, const void* x) {
  const int64_t N = args.weight.N, K = args.weight.K;
  const int64_t bytes = args.M * gemv.row_bytes(K);
  alignas(kAlignment) char near[kNearPanelBytes];
  void* panel = bytes <= kNearPanelBytes ? near : runtime.allocate(bytes);
  gemv.pack(x, args.dtype, args.M, K, panel);
  args.panel = panel;
  runtime.parallel_for(0, N, gemv_grain(K), [&](int64_t begin, int64_t end) { gemv.run(args, begin, end); });
}

template <class Runtime>
void multiply_gemm(Runtime& runtime, const Product& product, const GemmKernel& gemm, GemmArgs& args, const void* x) {
  const int64_t M = args.M, padded_d = ceil_div(product.D, gemm.step_d) * gemm.step_d;
  const int64_t x_row = product.D * element_bytes(args.dtype), out_row = product.C * element_bytes(args.dtype);
  const int64_t rows_of_tiles = m_tiles(M < kPassM ? M : kPassM, gemm.tile_m) * gemm.tile_m;
  void* panel = runtime.allocate(rows_of_tiles * padded_d * gemm.element_bytes);
  args.panel = panel;
  const auto* rows = static_cast<const char*>(x);
  for (int64_t m = 0; m < M; m += kPassM) {
    args.M = M - m < kPassM ? M - m : kPassM;
    runtime.parallel_for(
        0, m_tiles(args.M, gemm.tile_m), pack_grain(padded_d, gemm.tile_m),
        [&](int64_t begin, int64_t end) { gemm.pack(rows, args.dtype, args.M, product.D, begin, end, panel); });
    runtime.parallel_for(0, ceil_div(product.C, gemm.tile_c), 1, [&](int64_t begin, int64_t end) {
      gemm.run(args, begin, end, thread_workspace(gemm.workspace_bytes));
    });
    rows += args.M * x_row;
    args.out = static_cast<char*>(args.out) + args.M * out_row;
    args.lora_inner += args.M * args.rank;
    args.unscaled_inner =
        static_cast<const char*>(args.unscaled_inner) + args.M * args.rank * element_bytes(args.dtype);
  }
}

// args.out[M, C] of x[M, D], both contiguous; M and C at least 1.
template <class Runtime>
void multiply(Runtime& runtime, const Product& product, GemmArgs& args, const void* x) {
  const Plan plan = plan_product(product, args);
  if (plan.gemm == nullptr)
    multiply_slices(runtime, product, args, x);
  else if (plan.gemv != nullptr)
    multiply_gemv(runtime, *plan.gemv, args, x);
  else
    multiply_gemm(runtime, product, *plan.gemm, args, x);
}

// What experts add to their products, as GemmArgs has it of one weight.
struct GroupedTerms {
  const void* bias;            // [E, C] of dtype, or null
  int64_t rank;                // 0: none
  const float* lora_inner;     // [T, rank], times the scaling
  const void* lora_factor;     // of each expert one, stacked
  const void* unscaled_inner;  // [T, rank] of dtype
  float scaling;
};

// Rows [offsets[e-1], offsets[e]) of x[T, D] times expert e; rows that belong to none become zero. Expert by expert,
// each with all threads, in the bits of a product of its rows alone.
template <class Runtime>
void multiply_grouped(Runtime& runtime, const Product& product, const Experts& experts, const GroupedTerms& terms,
                      const int32_t* offsets, Dtype dtype, int64_t T, const void* x, void* out) {
  const int64_t x_row = product.D * element_bytes(dtype), out_row = product.C * element_bytes(dtype);
  const auto of_expert = [&](const void* stacked, int64_t e) -> const void* {  // bias or factor, by out's columns
    return stacked == nullptr ? nullptr : static_cast<const char*>(stacked) + e * out_row;
  };
  int64_t begin = 0;
  for (int64_t e = 0; e < experts.count; begin = offsets[e], ++e) {
    GemmArgs args{};
    args.weight = experts[e];
    if (is_int8(experts.first)) args.weight.packed = experts.first.packed + e * experts.first.N * experts.first.K;
    args.dtype = dtype;
    args.M = offsets[e] - begin;
    args.out = static_cast<char*>(out) + begin * out_row;
    args.bias = of_expert(terms.bias, e);
    args.rank = terms.rank;
    args.lora_inner = terms.lora_inner + begin * terms.rank;
    args.unscaled_inner = static_cast<const char*>(terms.unscaled_inner) + begin * terms.rank * element_bytes(dtype);
    args.scaling = terms.scaling;
    args.lora_factor = of_expert(terms.lora_factor, e * terms.rank);
    if (args.M > 0) multiply(runtime, product, args, static_cast<const char*>(x) + begin * x_row);
  }
  std::memset(static_cast<char*>(out) + begin * out_row, 0, size_t((T - begin) * out_row));
}

}  // namespace nf4::cpu
