// The CUDA launchers' signatures: device pointers, sizes and a stream, no torch. A launcher allocates nothing and waits
// for nothing, so that it can be captured in a graph.
#pragma once

#if defined(__CUDACC__) || defined(NF4_EXECUTOR)
#include "device.cuh"
#else  // the binding, which a host compiler compiles
#include <cuda_runtime_api.h>

#include "../format.h"
#endif

namespace nf4::cuda {

struct QuantizeArgs {
  const void* weight;  // [numel] of dtype
  Dtype dtype;
  int64_t numel;
  const float* code;  // [16], any order
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
  double* superblock_sums;  // [superblocks] of scratch
  uint8_t* quantized;       // [blocks]
  float* scale_absmax;      // [superblocks]
  float* scale_offset;      // [1]
};
cudaError_t quantize_absmax(const QuantizeAbsmaxArgs& args, cudaStream_t stream);

struct DequantizeArgs {
  Weight weight;
  int64_t row_begin, row_end, col_begin, col_end;
  Dtype dtype;
  void* out;       // [row_end - row_begin, col_end - col_begin] of dtype
  int64_t stride;  // elements from row to row of out
};
cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream);

// Codebooks whose levels the host has rounded to the product's dtype, see ../rounded_code.h. They come by value: the host
// cannot look at the weight's `code` without waiting for the device, so the kernel finds out which of them it is.
struct KnownCodes {
  static constexpr int kMost = 8;
  struct Entry {
    float code[kLevels];
    uint16_t levels[kLevels];  // bits of the dtype; scale * levels is about code
    float scale;               // goes into the block scales
  } entries[kMost];
  int count;
};

// One product with the weight. linear: x [M, K] to out [M, N]; linear_dgrad: x is dY [M, N], out is dX [M, K].
struct ProductArgs {
  Weight weight;
  Dtype dtype;
  const void* x;
  int64_t M;
  const void* bias;  // linear: [N] of dtype, or null
  void* out;
  // LoRA's term, scaling * low_rank_x @ factor: linear P [M, rank] and B [N, rank], dgrad Q [M, rank] and A [rank, K].
  int64_t rank;  // 0: none
  const void* low_rank_x;
  const void* low_rank_factor;
  float scaling;
  // The contraction in `splits` parts, each to partial [splits, M, columns of out], then added up in order.
  int splits;
  float* partial;    // null where splits is 1
  KnownCodes known;  // of the tensor-core products
};

// Any shape, dtype and alignment, without tensor cores, unsplit.
cudaError_t linear_any(const ProductArgs& args, cudaStream_t stream);
cudaError_t linear_dgrad_any(const ProductArgs& args, cudaStream_t stream);
// The tensor-core products: bf16 or fp16, has_whole_codes(weight), every pointer aligned to 16 bytes.
cudaError_t linear_small(const ProductArgs& args, cudaStream_t stream);  // M <= kSmallRows
cudaError_t linear_tiled(const ProductArgs& args, cudaStream_t stream);
cudaError_t linear_dgrad_tiled(const ProductArgs& args, cudaStream_t stream);  // N % 8 == 0

// Products with the weights of experts, row by row the one whose rows these are. It takes the device to know them, so a
// launch has a block of threads for every tile that there can be, and each finds its own: grouped.cuh.
struct GroupedArgs {
  ProductArgs product;     // weight: the first expert's; no bias, no rank; M: the rows of x and out given here
  int64_t first_row;       // of these rows, as the offsets count them
  Experts experts;         // the first is product.weight
  const int32_t* offsets;  // [experts]: the row past each expert's last; rows past the last one's become zeros
  int64_t rows_each;       // of an expert, about: the tile's height
};
cudaError_t grouped_linear_any(const GroupedArgs& args, cudaStream_t stream);
cudaError_t grouped_linear_dgrad_any(const GroupedArgs& args, cudaStream_t stream);
// As linear_small and so on of each expert, any number of rows.
cudaError_t grouped_linear_small(const GroupedArgs& args, cudaStream_t stream);
cudaError_t grouped_linear_tiled(const GroupedArgs& args, cudaStream_t stream);
cudaError_t grouped_linear_dgrad_tiled(const GroupedArgs& args, cudaStream_t stream);

// For a product that torch does, which takes no offsets but sound ones: `sound` [experts] is what the offsets count as.
cudaError_t sound_offsets(const GroupedArgs& args, int32_t* sound, cudaStream_t stream);
// Rows of out [M, columns], bf16, from the last of the sound `offsets` on become zeros.
cudaError_t zero_rows_of_none(const GroupedArgs& args, int64_t columns, cudaStream_t stream);

// Ŵ[range] of every expert that has rows by sound offsets, as bf16, each `out_size` elements after the one before.
struct DequantizeExpertsArgs {
  DequantizeArgs first;  // of the first expert
  Experts experts;
  const int32_t* offsets;
  int64_t out_size;
};
cudaError_t dequantize_experts(const DequantizeExpertsArgs& args, cudaStream_t stream);  // aligned to 16 bytes

// out [rows, width] of rows `stride` elements apart = scaling * small [rows, rank], zeros beyond rank; bf16 or fp16.
struct ScaleLowRankArgs {
  const void* small;
  Dtype dtype;
  int64_t rows, rank;
  float scaling;
  void* out;
  int64_t width, stride;
};
cudaError_t scale_low_rank(const ScaleLowRankArgs& args, cudaStream_t stream);

// out [rows, columns] = scaling * small [depth, rows]^T @ wide [depth, columns], or its transpose [columns, rows].
struct LoraGradArgs {
  const void* small;
  const void* wide;
  Dtype dtype;  // of both
  int64_t depth, rows, columns;
  float scaling;
  void* out;
  Dtype out_dtype;
  bool transposed;
  int splits;      // of the depth; lora_grad alone
  float* partial;  // [splits, rows, columns], also where splits is 1
};
cudaError_t lora_grad_any(const LoraGradArgs& args, cudaStream_t stream);
cudaError_t lora_grad(const LoraGradArgs& args, cudaStream_t stream);  // bf16 or fp16, columns % 8 == 0, aligned to 16

// out = the sum over the splits of partial [splits, rows, columns], in order, times scaling, plus bias, rounded once.
struct ReduceArgs {
  const float* partial;
  int splits;
  int64_t rows, columns;
  float scaling;
  const void* bias;  // [columns] of dtype, or null
  Dtype dtype;
  void* out;
  bool transposed;  // out is [columns, rows]
};
cudaError_t reduce_splits(const ReduceArgs& args, cudaStream_t stream);

}  // namespace nf4::cuda
