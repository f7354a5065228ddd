// The driver of linear and linear_dgrad, of one weight or of experts: chooses the kernel, packs x, splits over threads.
//
//   few rows, linear    pack x; threads share N (M <= 4, 16 by integers)    linear_gemv.h
//   otherwise           for each 512 rows of x: threads pack x's M tiles;   gemm.h
//                       then they share the C tiles of out, and where these
//                       are few, the rows as well (choose.h's row_parts)
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

// What args says of the rows [m, m + count) of x, whose panel is `panel`.
static inline GemmArgs of_rows(const Product& product, GemmArgs args, int64_t m, int64_t count, const void* panel) {
  const int64_t bytes = element_bytes(args.dtype);
  args.M = count;
  args.panel = panel;
  args.out = static_cast<char*>(args.out) + m * product.C * bytes;
  args.lora_inner += m * args.rank;
  args.unscaled_inner = static_cast<const char*>(args.unscaled_inner) + m * args.rank * bytes;
  return args;
}

// body(part, begin, end) for each part of `size` that [begin, end) reaches into, counted from that part's beginning.
template <class Body>
void by_parts(int64_t begin, int64_t end, int64_t size, Body body) {
  while (begin < end) {
    const int64_t part = begin / size, first = part * size, stop = end < first + size ? end : first + size;
    body(part, begin - first, stop - first);
    begin = stop;
  }
}

template <class Runtime>
void multiply_gemm(Runtime& runtime, const Product& product, const GemmKernel& gemm, const GemmArgs& args,
                   const void* x) {
  const int64_t padded_d = ceil_div(product.D, gemm.step_d) * gemm.step_d, c_tiles = ceil_div(product.C, gemm.tile_c);
  const int64_t x_row = product.D * element_bytes(args.dtype), panel_row = padded_d * gemm.element_bytes;
  const int64_t most = args.M < kPassM ? args.M : kPassM;
  const int64_t parts = row_parts(most, c_tiles, gemm.tile_c, runtime.threads());
  const int64_t part_tiles = ceil_div(m_tiles(most, gemm.tile_m), parts), part_m = part_tiles * gemm.tile_m;
  auto* panel = static_cast<char*>(runtime.allocate(parts * part_m * panel_row));
  for (int64_t pass = 0; pass < args.M; pass += kPassM) {
    const int64_t end_m = args.M - pass < kPassM ? args.M : pass + kPassM;
    const auto part_of = [&](int64_t part) {
      const int64_t m = pass + part * part_m;
      return of_rows(product, args, m, end_m - m < part_m ? end_m - m : part_m, panel + part * part_m * panel_row);
    };
    const auto pack = [&](int64_t part, int64_t begin, int64_t end) {
      const auto* rows = static_cast<const char*>(x) + (pass + part * part_m) * x_row;
      gemm.pack(rows, args.dtype, part_of(part).M, product.D, begin, end, panel + part * part_m * panel_row);
    };
    const auto run = [&](int64_t part, int64_t begin, int64_t end) {
      gemm.run(part_of(part), begin, end, thread_workspace(gemm.workspace_bytes));
    };
    runtime.parallel_for(0, m_tiles(end_m - pass, gemm.tile_m), pack_grain(padded_d, gemm.tile_m),
                         [&](int64_t begin, int64_t end) { by_parts(begin, end, part_tiles, pack); });
    runtime.parallel_for(0, ceil_div(end_m - pass, part_m) * c_tiles, 1,
                         [&](int64_t begin, int64_t end) { by_parts(begin, end, c_tiles, run); });
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
