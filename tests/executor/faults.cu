// Kernels for the test of the host executor itself (tests/csrc/test_executor.py). Each has a correct variant, and
// variants with one mistake that the executor must catch.
#include "../../csrc/cuda/device.cuh"

#define NF4_TEST_API extern "C" __attribute__((visibility("default")))

namespace nf4::cuda {
namespace {

constexpr int kThreads = 128;

// out[i] = in[i + by], or in[i] past the ends, through shared memory. A thread's neighbour may be in another warp, so
// sync_warp is not enough.
enum class Shift { kCorrect, kNoBarrier, kWarpBarrier, kHalfWritten };
template <Shift kVariant>
__global__ void shift_kernel(const float* in, float* out, int by) {
  float* staged = shared_memory<float>();
  const int i = threadIdx.x, from = i + by >= 0 && i + by < kThreads ? i + by : i;
  if (kVariant != Shift::kHalfWritten || i < kThreads / 2) staged[i] = in[i];
  if (kVariant == Shift::kCorrect || kVariant == Shift::kHalfWritten) sync_block();
  if (kVariant == Shift::kWarpBarrier) sync_warp();
  out[i] = staged[from];
}

// Block reduction: out[block] = sum of in[block * kThreads..], by warp shuffles, then through shared memory.
enum class Sum { kCorrect, kDivergentShuffle, kDivergentBarrier, kEarlyExit, kOtherBarrier, kBlockOrder };
template <Sum kVariant>
__global__ void sum_kernel(const float* in, float* out) {
  float* sums = shared_memory<float>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t block = blockIdx.x + gridDim.x * int64_t(blockIdx.y + gridDim.y * blockIdx.z);
  float sum = in[block * kThreads + threadIdx.x];
  if (kVariant == Sum::kDivergentShuffle && lane >= 16) {
    sum += shuffle_xor(sum, 16);
  } else {
    sum += shuffle_xor(sum, 16);
  }
  for (int mask = 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) sums[warp] = sum;
  if (kVariant == Sum::kEarlyExit && warp == 2) return;
  if (kVariant == Sum::kDivergentBarrier && lane >= 16) {
    sync_block();
  } else if (kVariant == Sum::kOtherBarrier && warp >= 2) {
    sync_block();
  } else {
    sync_block();
  }
  const float of_block_before = kVariant == Sum::kBlockOrder && block > 0 ? out[block - 1] : 0;
  if (threadIdx.x == 0) out[block] = (sums[0] + sums[1]) + (sums[2] + sums[3]) + of_block_before;
}

// out[i] = in of lane from[i] % 32 of the warp; out[kThreads + i] = in of its lane 5.
__global__ void shuffle_kernel(const uint32_t* in, const int* from, uint32_t* out) {
  out[threadIdx.x] = shuffle(in[threadIdx.x], from[threadIdx.x]);
  out[kThreads + threadIdx.x] = shuffle(in[threadIdx.x], 5);
}

// One warp: d[16, 8] = c + a[16, 16] @ b[16, 8], a row-major and b column-major, two elements a word.
enum class Mma { kCorrect, kSwappedA, kSwappedB, kHalfWarp };
template <class T, Mma kVariant>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  if (kVariant == Mma::kHalfWarp && threadIdx.x >= 16) return;
  constexpr int kLowerLeft = kVariant == Mma::kSwappedA ? 2 : 1, kFirst = kVariant == Mma::kSwappedB ? 4 : 0;
  uint32_t fragment[4] = {a[g * 8 + t], 0, 0, a[(g + 8) * 8 + t + 4]};
  fragment[kLowerLeft] = a[(g + 8) * 8 + t];
  fragment[3 - kLowerLeft] = a[g * 8 + t + 4];
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_16x8x16<T>(sum, fragment, b[g * 8 + t + kFirst], b[g * 8 + t + 4 - kFirst]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The same from each lane's fragments: a[lane][4], b[lane][2], c[lane][4], d[lane][4].
template <class T>
__global__ void mma_registers_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  uint32_t fragment[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) fragment[i] = a[lane * 4 + i], sum[i] = c[lane * 4 + i];
  mma_16x8x16<T>(sum, fragment, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// out[i] = sum over steps of in[step][kThreads - 1 - i], by a pipeline of two stages. A copy has 4 floats, so the first
// quarter of the block copies. The last step's copy is past the end and gives zeros.
enum class Pipeline {
  kCorrect,
  kNoWait,
  kWaitTooFew,
  kNoBarrier,
  kCopyTooSoon,
  kUnfinished,
  kMisaligned,
  kOutside,
  kStoreTooSoon,
  kTwice
};
template <Pipeline kVariant>
__global__ void pipeline_kernel(const float* in, float* out, int steps) {
  float* stages = shared_memory<float>();
  const int i = threadIdx.x;
  const auto copy = [&](int step) {
    float* to = stages + step % 2 * kThreads + 4 * i;
    if (kVariant == Pipeline::kMisaligned) to += 1;
    if (kVariant == Pipeline::kOutside) to += 2 * kThreads;
    for (int time = 0; time < (kVariant == Pipeline::kTwice ? 2 : 1); ++time)
      if (i < kThreads / 4) copy_async_16(to, step < steps ? in + step * kThreads + 4 * i : in, step < steps);
    copy_async_commit();
    if (kVariant == Pipeline::kStoreTooSoon && i < kThreads / 4) to[0] = 0;
  };
  float sum = 0;
  copy(0);
  for (int step = 0; step <= steps; ++step) {
    if (kVariant == Pipeline::kCopyTooSoon) copy(step + 1);
    constexpr int kPending = kVariant == Pipeline::kCopyTooSoon || kVariant == Pipeline::kWaitTooFew ? 1 : 0;
    if (kVariant != Pipeline::kNoWait) copy_async_wait<kPending>();
    if (kVariant != Pipeline::kNoBarrier) sync_block();  // this step has arrived, and all are done with the one before
    if (kVariant != Pipeline::kCopyTooSoon && step < steps) copy(step + 1);
    sum += stages[step % 2 * kThreads + kThreads - 1 - i];
  }
  if (kVariant == Pipeline::kUnfinished) copy(steps + 1);
  if (kVariant == Pipeline::kNoWait || kVariant == Pipeline::kWaitTooFew || kVariant == Pipeline::kCopyTooSoon) {
    copy_async_wait<0>();
  }
  out[i] = sum;
}

// out[i] = in[i] in words of V. The last two variants read shared memory past its end, or as if it were global.
enum class Read { kStreamed, kCached, kStored, kSharedEnd, kSharedAsGlobal };
template <class V, Read kVariant>
__global__ void read_kernel(const uint32_t* in, uint32_t* out) {
  const V* from = reinterpret_cast<const V*>(in) + threadIdx.x;
  V* to = reinterpret_cast<V*>(out) + threadIdx.x;
  if (kVariant == Read::kStreamed) *to = load_streamed(from);
  if (kVariant == Read::kCached) *to = load_cached(from);
  if (kVariant == Read::kStored) store_streamed(to, *from);
  if (kVariant == Read::kSharedEnd) *to = shared_memory<V>()[threadIdx.x];
  if (kVariant == Read::kSharedAsGlobal) *to = load_cached(shared_memory<V>() + threadIdx.x);
}

// out = sum of in[block * kThreads..] over all blocks, added in their order by the block that arrives last.
enum class Arrival {
  kCorrect,
  kFirst,
  kCorrectByOne,  // one thread fences for its block, as far as a barrier lies between
  kNoFenceBefore,
  kNoFenceAfter,
  kFenceTooLate,
  kNoBarrierBefore,
  kCachedLoad,
  kPlainLoad,
  kPlainCounter
};
template <Arrival kVariant>
__global__ void arrival_kernel(const float* in, float* partial, uint32_t* counter, float* out) {
  constexpr bool kByOne = kVariant == Arrival::kCorrectByOne || kVariant == Arrival::kNoBarrierBefore;
  uint32_t* before = shared_memory<uint32_t>();
  const unsigned last = gridDim.x - 1;
  partial[blockIdx.x * kThreads + threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (!kByOne && kVariant != Arrival::kNoFenceBefore && kVariant != Arrival::kFenceTooLate) fence_device();
  if (kVariant != Arrival::kNoBarrierBefore) sync_block();
  if (threadIdx.x == 0) {
    if (kByOne) fence_device();
    *before = arrive(counter, last);
    if (kVariant == Arrival::kFenceTooLate) fence_device();
    if (kVariant == Arrival::kPlainCounter) *before += *counter;
    if (kByOne) fence_device();
  }
  sync_block();
  if (*before != (kVariant == Arrival::kFirst ? 0 : last)) return;
  if (!kByOne && kVariant != Arrival::kNoFenceAfter) fence_device();
  float sum = 0;
  for (unsigned block = 0; block <= last; ++block) {
    const float* of_block = partial + block * kThreads + threadIdx.x;
    if (kVariant == Arrival::kCachedLoad)
      sum += load_cached(of_block);
    else if (kVariant == Arrival::kPlainLoad)
      sum += *of_block;
    else
      sum += load_l2(of_block);
  }
  out[threadIdx.x] = sum;
}

// out[i] = in of the other lane of a pair, through shared memory; kAcrossWarps: of another warp.
enum class Pair { kCorrect, kNothing, kShuffle, kMma, kAcrossWarps, kWrittenAgain, kSameWord };
template <Pair kVariant>
__global__ void pair_kernel(const float* in, float* out) {
  float* staged = shared_memory<float>();
  const int i = threadIdx.x;
  staged[kVariant == Pair::kSameWord ? i / 2 * 2 : i] = in[i];
  if (kVariant == Pair::kShuffle) {
    shuffle(i, 0);
  } else if (kVariant == Pair::kMma) {
    float sum[4] = {};
    mma_16x8x16<Float16>(sum, {0, 0, 0, 0}, 0, 0);
  } else if (kVariant != Pair::kNothing) {
    sync_warp();
  }
  const float other = staged[i ^ (kVariant == Pair::kAcrossWarps ? 32 : 1)];
  if (kVariant == Pair::kWrittenAgain) staged[i] = other;
  out[i] = other;
}

// out[i] = byte i of in, through shared memory, a byte a thread; kSamePair: both threads of a pair write both bytes.
enum class Bytes { kCorrect, kSamePair };
template <Bytes kVariant>
__global__ void bytes_kernel(const uint8_t* in, uint8_t* out) {
  uint8_t* staged = shared_memory<uint8_t>();
  const int i = threadIdx.x;
  if (kVariant == Bytes::kSamePair) staged[i ^ 1] = in[i ^ 1];
  staged[i] = in[i];
  sync_block();
  out[i] = staged[i];
}

// inout[i] += 1 for each block's own kThreads.
enum class InPlace { kCorrect, kOfOneBlock, kCachedThenWritten, kWrittenThenCached, kCopied };
template <InPlace kVariant>
__global__ void in_place_kernel(float* inout) {
  float* own = inout + (kVariant == InPlace::kOfOneBlock ? 0 : blockIdx.x * kThreads) + threadIdx.x;
  if (kVariant == InPlace::kCopied && threadIdx.x < kThreads / 4) {
    copy_async_16(shared_memory<float>() + 4 * threadIdx.x, inout + blockIdx.x * kThreads + 4 * threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
  }
  if (kVariant == InPlace::kCopied) sync_block();
  *own = 1 + (kVariant == InPlace::kCachedThenWritten ? load_cached(own) : *own);
  if (kVariant == InPlace::kWrittenThenCached) *own = load_cached(own);
}

// out[i] = in[i] in words of 8 bytes through shared memory of kThreads words, with one wrong address.
enum class Address { kCorrect, kPastEnd, kBeforeBegin, kMisalignedShared, kMisalignedGlobal };
template <Address kVariant>
__global__ void address_kernel(const uint32_t* in, uint32_t* out) {
  constexpr bool kReadsPast = kVariant == Address::kPastEnd, kWritesBefore = kVariant == Address::kBeforeBegin;
  constexpr bool kWritesHalf = kVariant == Address::kMisalignedShared,
                 kReadsHalf = kVariant == Address::kMisalignedGlobal;
  uint2* staged = shared_memory<uint2>();
  uint2* to = reinterpret_cast<uint2*>(shared_memory<uint32_t>() + kWritesHalf) + threadIdx.x - kWritesBefore;
  *to = *(reinterpret_cast<const uint2*>(in + kReadsHalf) + threadIdx.x);
  sync_block();
  *(reinterpret_cast<uint2*>(out) + threadIdx.x) = staged[threadIdx.x + kReadsPast];
}

// out[0] = permute_bytes(a, b), out[1] = a * b in bf16, out[2] = a * b in fp16; each of kThreads words.
__global__ void numbers_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* selector, uint32_t* out) {
  const int i = threadIdx.x;
  out[i] = permute_bytes(a[i], b[i], selector[i]);
  out[kThreads + i] = multiply_pairs<BFloat16>(a[i], b[i]);
  out[2 * kThreads + i] = multiply_pairs<Float16>(a[i], b[i]);
}

// out[0] = a * b + c in bf16, out[1] = a * b + c in fp16, out[2] = a * b in bf16; each of blocks * kThreads words.
__global__ void fused_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x, count = gridDim.x * kThreads;
  out[i] = multiply_add_pairs<BFloat16>(a[i], b[i], c[i]);
  out[count + i] = multiply_add_pairs<Float16>(a[i], b[i], c[i]);
  out[2 * count + i] = multiply_pairs<BFloat16>(a[i], b[i]);
}

__global__ void empty_kernel() {}

}  // namespace

NF4_TEST_API int run_shift(int variant, const float* in, float* out, int by) {
  constexpr decltype(&shift_kernel<Shift::kCorrect>) kKernels[] = {
      shift_kernel<Shift::kCorrect>, shift_kernel<Shift::kNoBarrier>, shift_kernel<Shift::kWarpBarrier>,
      shift_kernel<Shift::kHalfWritten>};
  return launch(kKernels[variant], 1, kThreads, kThreads * 4, nullptr, in, out, by);
}
NF4_TEST_API int run_sum(int variant, const float* in, float* out, int x, int y, int z) {
  constexpr decltype(&sum_kernel<Sum::kCorrect>) kKernels[] = {
      sum_kernel<Sum::kCorrect>,   sum_kernel<Sum::kDivergentShuffle>, sum_kernel<Sum::kDivergentBarrier>,
      sum_kernel<Sum::kEarlyExit>, sum_kernel<Sum::kOtherBarrier>,     sum_kernel<Sum::kBlockOrder>};
  return launch(kKernels[variant], dim3(x, y, z), kThreads, 4 * 4, nullptr, in, out);
}
NF4_TEST_API int run_shuffle(const uint32_t* in, const int* from, uint32_t* out) {
  return launch(shuffle_kernel, 1, kThreads, 0, nullptr, in, from, out);
}
NF4_TEST_API int run_mma(bool bf16, int variant, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  constexpr decltype(&mma_kernel<BFloat16, Mma::kCorrect>) kKernels[][2] = {
      {mma_kernel<Float16, Mma::kCorrect>, mma_kernel<BFloat16, Mma::kCorrect>},
      {mma_kernel<Float16, Mma::kSwappedA>, mma_kernel<BFloat16, Mma::kSwappedA>},
      {mma_kernel<Float16, Mma::kSwappedB>, mma_kernel<BFloat16, Mma::kSwappedB>},
      {mma_kernel<Float16, Mma::kHalfWarp>, mma_kernel<BFloat16, Mma::kHalfWarp>},
      {mma_registers_kernel<Float16>, mma_registers_kernel<BFloat16>}};
  return launch(kKernels[variant][bf16], 1, 32, 0, nullptr, a, b, c, d);
}
NF4_TEST_API int run_pipeline(int variant, const float* in, float* out, int steps) {
  constexpr decltype(&pipeline_kernel<Pipeline::kCorrect>) kKernels[] = {
      pipeline_kernel<Pipeline::kCorrect>,      pipeline_kernel<Pipeline::kNoWait>,
      pipeline_kernel<Pipeline::kWaitTooFew>,   pipeline_kernel<Pipeline::kNoBarrier>,
      pipeline_kernel<Pipeline::kCopyTooSoon>,  pipeline_kernel<Pipeline::kUnfinished>,
      pipeline_kernel<Pipeline::kMisaligned>,   pipeline_kernel<Pipeline::kOutside>,
      pipeline_kernel<Pipeline::kStoreTooSoon>, pipeline_kernel<Pipeline::kTwice>};
  return launch(kKernels[variant], 1, kThreads, 2 * kThreads * 4, nullptr, in, out, steps);
}
NF4_TEST_API int run_read(int variant, int threads, int shared_bytes, const uint32_t* in, uint32_t* out) {
  constexpr decltype(&read_kernel<uint4, Read::kStreamed>) kKernels[] = {
      read_kernel<uint4, Read::kStreamed>, read_kernel<uint4, Read::kCached>, read_kernel<uint4, Read::kStored>,
      read_kernel<uint32_t, Read::kSharedEnd>, read_kernel<uint32_t, Read::kSharedAsGlobal>};
  return launch(kKernels[variant], 1, threads, shared_bytes, nullptr, in, out);
}
NF4_TEST_API int run_arrival(int variant, int blocks, const float* in, float* partial, uint32_t* counter, float* out) {
  constexpr decltype(&arrival_kernel<Arrival::kCorrect>) kKernels[] = {
      arrival_kernel<Arrival::kCorrect>,         arrival_kernel<Arrival::kFirst>,
      arrival_kernel<Arrival::kCorrectByOne>,    arrival_kernel<Arrival::kNoFenceBefore>,
      arrival_kernel<Arrival::kNoFenceAfter>,    arrival_kernel<Arrival::kFenceTooLate>,
      arrival_kernel<Arrival::kNoBarrierBefore>, arrival_kernel<Arrival::kCachedLoad>,
      arrival_kernel<Arrival::kPlainLoad>,       arrival_kernel<Arrival::kPlainCounter>};
  return launch(kKernels[variant], blocks, kThreads, 4, nullptr, in, partial, counter, out);
}
NF4_TEST_API int run_pair(int variant, const float* in, float* out) {
  constexpr decltype(&pair_kernel<Pair::kCorrect>) kKernels[] = {
      pair_kernel<Pair::kCorrect>, pair_kernel<Pair::kNothing>,     pair_kernel<Pair::kShuffle>,
      pair_kernel<Pair::kMma>,     pair_kernel<Pair::kAcrossWarps>, pair_kernel<Pair::kWrittenAgain>,
      pair_kernel<Pair::kSameWord>};
  return launch(kKernels[variant], 1, kThreads, kThreads * 4, nullptr, in, out);
}
NF4_TEST_API int run_bytes(int variant, const uint8_t* in, uint8_t* out) {
  return launch(variant == 0 ? bytes_kernel<Bytes::kCorrect> : bytes_kernel<Bytes::kSamePair>, 1, kThreads, kThreads,
                nullptr, in, out);
}
NF4_TEST_API int run_in_place(int variant, int blocks, float* inout) {
  constexpr decltype(&in_place_kernel<InPlace::kCorrect>) kKernels[] = {
      in_place_kernel<InPlace::kCorrect>, in_place_kernel<InPlace::kOfOneBlock>,
      in_place_kernel<InPlace::kCachedThenWritten>, in_place_kernel<InPlace::kWrittenThenCached>,
      in_place_kernel<InPlace::kCopied>};
  return launch(kKernels[variant], blocks, kThreads, kThreads * 4, nullptr, inout);
}
NF4_TEST_API int run_address(int variant, const uint32_t* in, uint32_t* out) {
  constexpr decltype(&address_kernel<Address::kCorrect>) kKernels[] = {
      address_kernel<Address::kCorrect>, address_kernel<Address::kPastEnd>, address_kernel<Address::kBeforeBegin>,
      address_kernel<Address::kMisalignedShared>, address_kernel<Address::kMisalignedGlobal>};
  return launch(kKernels[variant], 1, kThreads, kThreads * 8, nullptr, in, out);
}
NF4_TEST_API int run_numbers(const uint32_t* a, const uint32_t* b, const uint32_t* selector, uint32_t* out) {
  return launch(numbers_kernel, 1, kThreads, 0, nullptr, a, b, selector, out);
}
NF4_TEST_API int run_fused(int blocks, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out) {
  return launch(fused_kernel, blocks, kThreads, 0, nullptr, a, b, c, out);
}
NF4_TEST_API int run_empty(int x, int y, int z, int threads, int shared_bytes) {
  return launch(empty_kernel, dim3(x, y, z), threads, shared_bytes, nullptr);
}
NF4_TEST_API const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace nf4::cuda
