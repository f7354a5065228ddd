// Kernels that the executor's own tests run: each mistake beside its correct twin.
#include "../../csrc/cuda/device.cuh"

#define NF4_TEST_API extern "C" __attribute__((visibility("default")))

namespace nf4::cuda {
namespace {

constexpr int kThreads = 128;

// out[i] = in[kThreads - 1 - i] through shared memory, within a block.
template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  float* staged = shared_memory<float>();
  staged[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) sync_block();
  out[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
}

// d[16, 8] = c + a[16, 16] @ b[16, 8], a row-major, b by columns: a warp.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t fragment[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_16x8x16<T>(sum, fragment, b[g * 8 + t], b[g * 8 + t + 4]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

}  // namespace

NF4_TEST_API int run_reverse(bool barrier, const float* in, float* out) {
  return launch(barrier ? reverse_kernel<true> : reverse_kernel<false>, 1, kThreads, kThreads * 4, nullptr, in, out);
}
NF4_TEST_API int run_mma(bool bf16, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  return launch(bf16 ? mma_kernel<BFloat16> : mma_kernel<Float16>, 1, 32, 0, nullptr, a, b, c, d);
}

}  // namespace nf4::cuda
