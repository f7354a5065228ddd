// The drivers of grouped_lora_inner and grouped_lora_grad: cut the experts' rows into parts for the threads.
//
//   inner   parts of at most kPartM rows of one expert. With a factor [r, D] by lora_inner's kernel, whose sums run
//           along D of both; with its transpose [D, r] by lora_grad's, to which it is `wide` and x's rows are ranks
//   grad    the experts' C tiles, whose sums take all rows of the expert
//
// Rejected  A transposed copy of each factor: 708 us for one row of each of 8 experts against 181, though 7.9 ms for
//           256 rows of each against 11.7 (bf16, r = 16, D = 2048, a shared core).
// offsets are as in multiply_grouped of product.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace nf4::cpu {

// The runtime's threads: body(state, first, last) for parts of [begin, end), each of `grain` at least.
using ParallelBody = void (*)(const void* state, int64_t first, int64_t last);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, const void* state);

// args of all experts: x[T, D] and out[T, rank], M = T, and factor[E, rank, D], transposed [E, D, rank]. Rows of no
// expert become zero.
void multiply_lora_inner(ParallelFor parallel_for, const LoraInnerArgs& args, const int32_t* offsets, int64_t experts,
                         bool is_transposed);

// args of all experts: wide[T, C], M = T, and out[E, rank, C], transposed [E, C, rank]; lora_inner[T, rank] of dtype.
void sum_lora_grads(ParallelFor parallel_for, const LoraGradArgs& args, const void* lora_inner, const int32_t* offsets,
                    int64_t experts);

}  // namespace nf4::cpu
