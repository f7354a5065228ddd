// quantize_absmax: scale_offset = mean of absmax; scale_absmax[s] = max |absmax - scale_offset| over superblock s;
// quantized = the 8-bit code of (absmax - scale_offset) / scale_absmax, see scale_bits.h.
//
// Who: three launches. One thread sums a superblock in fp64, one block takes the mean, one warp encodes a superblock.
// Trick: the format defines the sum in one order, left to right, and dependent fp64 additions do not overlap: the 14336
//   superblocks of a 28672 x 8192 weight at 8 cycles each would be 65 us beside the 140 us of its quantize (H200).
//   Where no partial sum of any order is rounded, all orders agree; that holds for all but contrived scales, and one
//   addition a value proves it. The format's order is therefore kept only where it matters.
// Bytes: reads 4 twice and writes 1 a block: 9/64 B a weight, a twentieth of quantize's.
// Needs: scale_code ascends unless it is e4m3.
#include "../scale_bits.h"
#include "kernels.h"

namespace nf4::cuda {
namespace {

constexpr int kWidth = 1 << kSuperblockShift;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxGrid = 8192;

NF4_HOST_DEVICE static inline int64_t superblocks_of(int64_t blocks) { return (blocks + kWidth - 1) / kWidth; }

// kWarps superblocks at a time are staged in shared memory, so that their loads are contiguous.
constexpr int kPitch = kWidth + 1;  // floats from superblock to superblock: the threads that sum read different banks
NF4_DEVICE void sum_superblocks(const QuantizeAbsmaxArgs& args, int64_t first, float* staged) {
  for (int s = 0; s < kWarps; ++s) {
    const int64_t block = (first + s) * kWidth + threadIdx.x;
    if (block < args.blocks) staged[s * kPitch + threadIdx.x] = load_cached(args.absmax + block);
  }
  sync_block();
  const int64_t superblock = first + threadIdx.x;
  if (threadIdx.x < kWarps && superblock < superblocks_of(args.blocks)) {
    const int count = int(min(args.blocks - superblock * kWidth, int64_t(kWidth)));
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += staged[threadIdx.x * kPitch + i];
    args.superblock_sums[superblock] = sum;
  }
  sync_block();
}

__global__ void __launch_bounds__(kThreads) superblock_sums_kernel(QuantizeAbsmaxArgs args) {
  float* staged = shared_memory<float>();  // [kWarps, kPitch]
  const int64_t superblocks = superblocks_of(args.blocks), step = int64_t(gridDim.x) * kWarps;
  for (int64_t first = int64_t(blockIdx.x) * kWarps; first < superblocks; first += step)
    sum_superblocks(args, first, staged);
}

// Tree reduction over the thread block.
NF4_DEVICE double sum_over_block(double value, double* staged) {
  staged[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_block();
    if (int(threadIdx.x) < half) staged[threadIdx.x] += staged[threadIdx.x + half];
  }
  sync_block();
  const double sum = staged[0];
  sync_block();
  return sum;
}

// The mean, by one block. Let L = 4 * (sum of all |v|). If (v + L) - L == v for every v, then every v, and so every
// partial sum, is a multiple of 2^-53 of the binade of L: none needs more than fp64's 53 bits, and none is rounded.
__global__ void __launch_bounds__(kThreads) mean_kernel(QuantizeAbsmaxArgs args) {
  double* staged = shared_memory<double>();  // [kThreads]
  const int64_t superblocks = superblocks_of(args.blocks);
  double sum = 0, size = 0, rounded = 0;
  for (int64_t s = threadIdx.x; s < superblocks; s += kThreads) {
    sum += args.superblock_sums[s];
    size += fabs(args.superblock_sums[s]);
  }
  sum = sum_over_block(sum, staged);
  const double large = 4 * sum_over_block(size, staged);
  for (int64_t s = threadIdx.x; s < superblocks; s += kThreads) {
    const double v = args.superblock_sums[s];
    if (!((v + large) - large == v)) rounded = 1;  // NaN and inf too
  }
  if (sum_over_block(rounded, staged) != 0) {
    sum = 0;
    for (int64_t first = 0; first < superblocks; first += kThreads) {
      if (first + threadIdx.x < superblocks) staged[threadIdx.x] = args.superblock_sums[first + threadIdx.x];
      sync_block();
      const int count = int(min(superblocks - first, int64_t(kThreads)));
      for (int i = 0; i < count; ++i) sum += staged[i];
      sync_block();
    }
  }
  if (threadIdx.x == 0) *args.scale_offset = args.blocks == 0 ? 0.f : float(sum / double(args.blocks));
}

// One warp computes scale_absmax and the codes of one superblock; lane l has scales l, l + 32, ...
NF4_DEVICE void quantize_superblock(const QuantizeAbsmaxArgs& args, int64_t superblock, const float* midpoints) {
  constexpr int kEach = kWidth / 32;
  const float offset = load_cached(args.scale_offset);
  const int64_t first = superblock * kWidth + threadIdx.x % 32;
  float centred[kEach];
  uint32_t largest = 0;  // of the bits as integers, where NaN is the largest
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t block = first + 32 * i;
    centred[i] = block < args.blocks ? load_cached(args.absmax + block) - offset : 0.f;
    largest = max(largest, bits_of(centred[i]) & 0x7fffffffu);
  }
  for (int mask = 1; mask < 32; mask *= 2) largest = max(largest, shuffle_xor(largest, mask));
  const float scale_absmax = float_of(largest);
  if (threadIdx.x % 32 == 0) args.scale_absmax[superblock] = scale_absmax;
  const float factor = args.scale_is_e4m3 ? e4m3_factor(scale_absmax) : sorted_factor(scale_absmax);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float value = centred[i] * factor;
    if (first + 32 * i < args.blocks)
      args.quantized[first + 32 * i] = args.scale_is_e4m3 ? e4m3_bits(value) : sorted_rank(midpoints, value);
  }
}

__global__ void __launch_bounds__(kThreads) quantize_superblocks_kernel(QuantizeAbsmaxArgs args) {
  float* midpoints = shared_memory<float>();  // [kScaleMidpoints]
  if (threadIdx.x < kScaleMidpoints) midpoints[threadIdx.x] = scale_midpoint(args.scale_code, int(threadIdx.x));
  sync_block();
  const int64_t superblocks = superblocks_of(args.blocks), step = int64_t(gridDim.x) * kWarps;
  for (int64_t s = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; s < superblocks; s += step)
    quantize_superblock(args, s, midpoints);
}

}  // namespace

cudaError_t quantize_absmax(const QuantizeAbsmaxArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned(min((superblocks_of(args.blocks) + kWarps - 1) / kWarps, int64_t(kMaxGrid))));
  if (args.blocks > 0) {
    const size_t bytes = kWarps * kPitch * sizeof(float);
    const cudaError_t error = launch(superblock_sums_kernel, grid, kThreads, bytes, stream, args);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = launch(mean_kernel, dim3(1), kThreads, kThreads * sizeof(double), stream, args);
  if (error != cudaSuccess || args.blocks == 0) return error;
  return launch(quantize_superblocks_kernel, grid, kThreads, kScaleMidpoints * sizeof(float), stream, args);
}

}  // namespace nf4::cuda
