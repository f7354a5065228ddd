// The drivers of grouped_lora_inner and grouped_lora_grad: cut the experts' rows into parts for the threads.
//
//   inner   parts of kPartM rows of one expert; a thread takes those side by side at once
//   grad    the experts' C tiles, whose sums take all rows of the expert
//
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
void multiply_lora_inner(ParallelFor parallel_for, const LoraInnerArgs& args, const int32_t* offsets, int64_t experts);

// args of all experts: wide[T, C], M = T, and out[E, rank, C], transposed [E, C, rank]; lora_inner[T, rank] of dtype.
void sum_lora_grads(ParallelFor parallel_for, const LoraGradArgs& args, const void* lora_inner, const int32_t* offsets,
                    int64_t experts);

}  // namespace nf4::cpu
