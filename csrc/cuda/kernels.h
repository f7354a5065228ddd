// The CUDA launchers' signatures: device pointers, sizes and a stream, no torch. A launcher allocates nothing and waits
// for nothing, so that it can be captured in a graph.
#pragma once

#if defined(__CUDACC__) || defined(NF4_SIMT)
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

}  // namespace nf4::cuda
