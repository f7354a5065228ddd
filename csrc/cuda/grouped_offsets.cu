// What dequantize + GEMM of experts needs besides torch's product: sound offsets, and zeros in the rows of no expert.
//
// Who: one warp scans the offsets, 32 at a time, for the largest so far; a grid-stride loop zeroes one element of out a
//   thread. Bytes: 8 an expert; 2 an element of the rows of no expert.
#include "grouped.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kWarp) sound_offsets_kernel(const GroupedArgs args, int32_t* sound) {
  const Offsets offsets(args);
  const int lane = int(threadIdx.x), count = offsets.count;
  int reach = 0;
  for (int chunk = 0; chunk < count; chunk += kWarp) {
    const int expert = chunk + lane;
    const int own = expert < count ? offsets[expert] : 0;
    const int most = inclusive_scan(own, lane, [](int a, int b) { return max(a, b); });
    if (expert < count) sound[expert] = max(reach, most);
    reach = max(reach, shuffle(most, kWarp - 1));
  }
}

__global__ void __launch_bounds__(kThreads) zero_rows_of_none_kernel(const GroupedArgs args, int64_t columns) {
  const int64_t end = args.product.M * columns, first = args.offsets[args.experts.count - 1] * columns;
  for (int64_t i = first + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < end; i += int64_t(gridDim.x) * kThreads)
    static_cast<BFloat16*>(args.product.out)[i] = {0};
}

}  // namespace

cudaError_t sound_offsets(const GroupedArgs& args, int32_t* sound, cudaStream_t stream) {
  return launch(sound_offsets_kernel, dim3(1), kWarp, 0, stream, args, sound);
}

cudaError_t zero_rows_of_none(const GroupedArgs& args, int64_t columns, cudaStream_t stream) {
  return launch(zero_rows_of_none_kernel, dim3(blocks_for(args.product.M * columns, kThreads)), kThreads, 0, stream,
                args, columns);
}

}  // namespace nf4::cuda
