// The CUDA launchers' signatures: device pointers, sizes and a stream, no torch. A launcher neither allocates nor
// synchronizes, so that a CUDA graph can capture it.
#pragma once

#if defined(__CUDACC__) || defined(NF4_EXECUTOR)
#include "device.cuh"
#else  // a binding, which a host compiler compiles
#include <cuda_runtime_api.h>

#include "../format.h"
#endif

namespace nf4::cuda {

struct QuantizeArgs {
  const void* weight;  // [numel] of dtype
  Dtype dtype;
  int64_t numel;
  const float* code;  // [16], in any order
  int block_shift;
  uint8_t* packed;  // [ceil(numel/2)]
  float* absmax;    // [ceil(numel/block_size)]
};
cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream);

struct QuantizeAbsmaxArgs {
  const float* absmax;  // [blocks]
  int64_t blocks;
  const float* scale_code;  // [256], ascending unless scale_is_e4m3
  bool scale_is_e4m3;
  double* superblock_sums;  // [superblocks], scratch
  uint8_t* quantized;       // [blocks]
  float* scale_absmax;      // [superblocks]
  float* scale_offset;      // [1]
};
cudaError_t quantize_absmax(const QuantizeAbsmaxArgs& args, cudaStream_t stream);

struct DequantizeArgs {
  Weight weight;
  int64_t row_begin, row_end, col_begin, col_end;
  Dtype dtype;
  void* out;          // [row_end - row_begin, col_end - col_begin] of dtype
  int64_t stride;     // elements from row to row of out
  bool keep = false;  // in the L2: a workspace that the next launch reads
};
cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream);

// Codebooks whose levels the host has rounded to the product's dtype (../rounded_code.h). They are passed by value and
// the kernel looks its weight's `code` up among them, because the host would have to wait for the device to read
// `code`.
struct KnownCodes {
  static constexpr int kMost = 8;
  struct Entry {
    float code[kLevels];
    uint16_t levels[kLevels];  // bits of the dtype; scale * levels approximates code
    float scale;               // multiplied into the block scales
  } entries[kMost];
  int count;
};

// One product with the weight. linear: out[M, N] = x[M, K] @ W^T; linear_dgrad: x is dY[M, N], out is dX[M, K].
struct ProductArgs {
  Weight weight;
  Dtype dtype;
  int tile;  // of the tiled kernels, see tiles.h
  const void* x;
  int64_t M;
  const void* bias;  // linear: [N] of dtype, or null
  void* out;
  // The LoRA term that out gains: scaling * P[M, rank] @ B[N, rank]^T in linear, scaling * Q[M, rank] @ A[rank, K] in
  // linear_dgrad.
  int64_t rank;             // 0: no term
  const void* lora_inner;   // P or Q
  const void* lora_factor;  // B or A
  float scaling;
  int splits;         // split-K: each part of the contraction writes its own partial sums; reduce_splits adds them
  float* partial;     // null where splits is 1; [splits, M, N or K], or with arrivals: of linear_small see
                      // small_partial_floats, of tiled see split_sums.cuh
  KnownCodes known;   // for the tensor-core products
  int blocks;         // linear_small: thread blocks that share the work out
  int arrivals = -1;  // the stream's slot of arrival counters (arrivals.cuh); -1: none, and sums take a second launch
};

// Whether every 64 consecutive weights of a row share a scale, in a form that the kernels which scale sums know. Else the
// tensor-core kernels scale the levels (product.cuh).
inline bool scales_sums(const Weight& w) {
  return w.block_shift >= 6 && (w.scales == Scales::kFloat32 || w.scales == Scales::kDouble);
}

// Any shape, dtype and alignment, without tensor cores and without splits.
cudaError_t linear_any(const ProductArgs& args, cudaStream_t stream);
cudaError_t linear_dgrad_any(const ProductArgs& args, cudaStream_t stream);
// The tensor-core products: bf16 or fp16, K % 64 == 0, every pointer aligned to 16 bytes.
cudaError_t linear_small(const ProductArgs& args, cudaStream_t stream);  // M <= kSmallM
cudaError_t linear_tiled(const ProductArgs& args, cudaStream_t stream);
cudaError_t linear_dgrad_tiled(const ProductArgs& args, cudaStream_t stream);  // N % 8 == 0

// A grouped product: each expert's weight multiplies its own rows of x. The device alone knows which rows these are, so
// a launch has a thread block for every tile that can exist, and each block finds its tile (grouped.cuh).
struct GroupedArgs {
  ProductArgs product;     // weight: the first expert's; M: rows of x and out in this launch; each expert has a bias,
                           // [experts, N], and a lora_factor, [experts, N, rank] or [experts, rank, K], of its own
  int64_t m_begin;         // the launch's first row, as the offsets count rows
  Experts experts;         // the first is product.weight
  const int32_t* offsets;  // [experts]: where each expert's rows end; rows past the last offset become zeros
  int64_t m_per_expert;    // mean rows an expert: small has 8 or 16 rows by it
};
cudaError_t grouped_linear_any(const GroupedArgs& args, cudaStream_t stream);
cudaError_t grouped_linear_dgrad_any(const GroupedArgs& args, cudaStream_t stream);
// These need of each expert what linear_small and so on need of a weight; M is not bounded.
cudaError_t grouped_linear_small(const GroupedArgs& args, cudaStream_t stream);
cudaError_t grouped_linear_tiled(const GroupedArgs& args, cudaStream_t stream);
cudaError_t grouped_linear_dgrad_tiled(const GroupedArgs& args, cudaStream_t stream);

// torch's grouped product takes sound offsets only: sound[e] = offset e clamped to 0..M and to at least offset e - 1.
cudaError_t sound_offsets(const GroupedArgs& args, int32_t* sound, cudaStream_t stream);
// Zeroes the rows of out[M, columns] (bf16) that no expert owns: those from the last of the sound `offsets` on.
cudaError_t zero_rows_of_none(const GroupedArgs& args, int64_t columns, cudaStream_t stream);

// Ŵ[range] in bf16 of every expert that owns rows by the sound offsets; expert e's goes to out + e * out_size.
struct DequantizeExpertsArgs {
  DequantizeArgs first;  // of the first expert
  Experts experts;
  const int32_t* offsets;
  int64_t out_size;
};
cudaError_t dequantize_experts(const DequantizeExpertsArgs& args, cudaStream_t stream);  // aligned to 16 bytes

// out[rows, width] = scaling * in[rows, columns], padded with zeros; rows of out are `stride` elements apart. bf16 or
// fp16.
struct ScaledCopyArgs {
  const void* in;
  Dtype dtype;
  int64_t rows, columns;
  float scaling;
  void* out;
  int64_t width, stride;
};
cudaError_t scaled_copy(const ScaledCopyArgs& args, cudaStream_t stream);

// out[M, columns] = bias + scaling * inner[M, rank] @ factor, whose rows are `factor_stride` elements apart and those of
// out `stride`. bf16 or fp16.
struct LoraTermArgs {
  const void* inner;
  const void* factor;  // [rank, columns], or transposed [columns, rank]
  int64_t factor_stride;
  bool transposed;
  const void* bias;  // [columns], or null
  Dtype dtype;
  int64_t M, columns, rank;
  float scaling;
  void* out;
  int64_t stride;
};
cudaError_t lora_term(const LoraTermArgs& args, cudaStream_t stream);

// out[rank, columns] = scaling * small[M, rank]^T @ wide[M, columns], or its transpose [columns, rank].
struct LoraGradArgs {
  const void* small;
  const void* wide;
  Dtype dtype;  // of both
  int64_t M, rank, columns;
  float scaling;
  void* out;
  Dtype out_dtype;
  bool transposed;
  int splits;         // of M; lora_grad alone
  float* partial;     // [splits, rank, columns], null where splits is 1
  int arrivals = -1;  // the stream's slot of arrival counters (arrivals.cuh); -1: none, and sums take a second launch
};
cudaError_t lora_grad_any(const LoraGradArgs& args, cudaStream_t stream);
cudaError_t lora_grad(const LoraGradArgs& args, cudaStream_t stream);  // bf16 or fp16, columns % 8 == 0, aligned to 16

// The row of each of `count` choices of an expert, see sort_by_expert.cu.
struct SortArgs {
  const int64_t* experts_of;  // [count], in 0..experts
  int64_t count;
  int experts;
  int32_t* offsets;    // [experts]
  int32_t* positions;  // [count]
  int32_t* counts;     // [sort_chunks(count), experts + 1], scratch
};
int64_t sort_chunks(int64_t count);
cudaError_t sort_by_expert(const SortArgs& args, cudaStream_t stream);

// The rows of experts [T * top_k, H] and the tokens [T, H] that they are of, see combine_experts.cu.
struct CombineArgs {
  int64_t T, top_k, H;
  const int32_t* positions;  // [T, top_k]
  const void* weights;       // [T, top_k], or null: 1
  Dtype weights_dtype;
  const void* rows;  // combine, wgrad
  Dtype rows_dtype;
  const void* tokens;  // dgrad, wgrad: dout
  Dtype tokens_dtype;
  void* out;  // combine: tokens; dgrad: rows; wgrad: dweights [T, top_k]
  Dtype out_dtype;
  bool aligned;  // rows and tokens, to 16 bytes
};
cudaError_t combine_experts(const CombineArgs& args, cudaStream_t stream);
cudaError_t combine_experts_dgrad(const CombineArgs& args, cudaStream_t stream);
cudaError_t combine_experts_wgrad(const CombineArgs& args, cudaStream_t stream);

// Each expert's rows of small and wide: out[experts, rank, columns], or transposed [experts, columns, rank].
struct GroupedLoraGradArgs {
  LoraGradArgs grad;  // M: rows of all experts; no splits
  int64_t experts;
  const int32_t* offsets;
};
cudaError_t grouped_lora_grad_any(const GroupedLoraGradArgs& args, cudaStream_t stream);
cudaError_t grouped_lora_grad(const GroupedLoraGradArgs& args, cudaStream_t stream);  // as lora_grad

// LoRA's inner product of experts: out[M, rank], each row of x[M, depth] times its expert's factor[rank, depth]^T, or
// factor[depth, rank].
struct GroupedLoraInnerArgs {
  const void* x;
  Dtype dtype;  // of all three
  int64_t M, depth, rank;
  const void* factor;  // [experts, rank, depth], or transposed [experts, depth, rank]
  bool transposed;
  void* out;
  int64_t experts;
  const int32_t* offsets;
};
cudaError_t grouped_lora_inner_any(const GroupedLoraInnerArgs& args, cudaStream_t stream);
// bf16 or fp16, depth % 8 == 0, depth <= kLoraInnerDepth, x and factor aligned to 16.
constexpr int64_t kLoraInnerDepth = 8 * 512 * 16;
cudaError_t grouped_lora_inner(const GroupedLoraInnerArgs& args, cudaStream_t stream);

// out = scaling * (sum over s, in order, of partial[s, rows, columns]) + bias, rounded once.
struct ReduceArgs {
  const float* partial;
  int splits;
  int64_t rows, columns;
  float scaling;
  Dtype dtype;
  void* out;
  bool transposed;   // out is [columns, rows], and there is no bias
  const void* bias;  // [columns] of dtype, or null
};
cudaError_t reduce_splits(const ReduceArgs& args, cudaStream_t stream);

}  // namespace nf4::cuda
