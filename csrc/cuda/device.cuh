// Every intrinsic that the kernels use, under a name of our own; no other file in csrc/cuda calls one. nvcc compiles
// these names to the instructions. A host compiler with NF4_EXECUTOR takes their meaning from
// tests/executor/executor.h, so that the same kernels and launchers run on a CPU, one fiber a thread.
//
// Kernels take shared memory from shared_memory() alone, so that the executor can poison it. They are compiled with
// -fmad=false: a fused multiply-add happens only where fmaf is written.
#pragma once

#include <cstdint>

#include "../format.h"

#ifdef NF4_EXECUTOR
#include "executor.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>

#define NF4_DEVICE __device__ __forceinline__

namespace nf4::cuda {

// Blocks, warps, launches.

// The block's dynamic shared memory, as many bytes as the launch asked for, aligned to 128.
template <class T>
NF4_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char nf4_shared[];
  return reinterpret_cast<T*>(nf4_shared);
}

// threadIdx.x, read anew: what is computed from it need not stay in registers since it was computed before.
NF4_DEVICE unsigned thread_again() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

NF4_DEVICE void sync_block() { __syncthreads(); }
NF4_DEVICE void sync_warp() { __syncwarp(); }

// Warp shuffles. All 32 lanes take part; T has 4 bytes.
template <class T>
NF4_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// Shuffle within groups of four lanes: lane i of the group. A constant i takes no register.
template <class T>
NF4_DEVICE T shuffle_four(T value, int i) {
  return __shfl_sync(0xffffffffu, value, i, 4);
}
template <class T>
NF4_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Ends the launch with `message` on stderr where not ok; the host sees an error when it next waits.
NF4_DEVICE void device_assert(bool ok, const char* message) {
  if (!ok) __assert_fail(message, __FILE__, __LINE__, "nf4kernels");
}

// From sm_120 on, code is compiled for blocks of 99 KB: a kernel that needs more is empty there.
constexpr int kSmallShared = 99 << 10;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMostShared = kSmallShared;
#else
constexpr int kMostShared = 227 << 10;
#endif

// The most shared memory that a block can have on the current device, by the code that it runs.
inline cudaError_t shared_limit(int* bytes) {
  int device, major;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && major >= 12 && *bytes > kSmallShared) *bytes = kSmallShared;
  return error;
}

// Launches `grid` blocks. More than 48 KB of dynamic shared memory must be asked for first.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Args&... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Memory.

// Loads read-only data that this launch reads once: bypasses the L1 and prefetches 128 bytes into the L2.
NF4_DEVICE uint32_t load_streamed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
NF4_DEVICE uint2 load_streamed(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
NF4_DEVICE uint4 load_streamed(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Loads read-only data that other threads read too: through the L1.
template <class V>
NF4_DEVICE V load_cached(const V* p) {
  return __ldg(p);
}

// Loads what another block of this launch has written: from the L2, where all blocks see the same.
template <class V>
NF4_DEVICE V load_l2(const V* p) {
  return __ldcg(p);
}

// Between blocks of a launch. A block writes, fences, arrives; the block that finds by its arrival that all have come
// fences, and then reads what they wrote, with load_l2. Where other threads of a block write or read, sync_block stands
// between them and the one that arrives.
NF4_DEVICE void fence_device() { __threadfence(); }
// The counter's value before this arrival; the one that finds `last` sets it to 0 again.
NF4_DEVICE uint32_t arrive(uint32_t* counter, uint32_t last) { return atomicInc(counter, last); }

// Stores what this launch does not read again.
template <class V>
NF4_DEVICE void store_streamed(V* p, V v) {
  __stcs(p, v);
}

// A 32-bit shared-memory address, and the load of 4 bytes from one: a generic pointer would cost an instruction more.
NF4_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
NF4_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));  // volatile: not moved across a barrier
  return v;
}

// cp.async: copies 16 bytes to shared memory in the background, or zeros where not valid (`global` is then not read).
// This thread sees the bytes after copy_async_wait, the others after a barrier that follows it.
NF4_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared)), bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
NF4_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
NF4_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bits and numbers.

NF4_DEVICE uint32_t bits_of(float a) { return __float_as_uint(a); }
NF4_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// PRMT: byte i of the result is byte (selector >> 4i & 7) of the eight bytes {a, b}. Bit 3 of each selector nibble is
// 0.
NF4_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

NF4_DEVICE float to_float(float a) { return a; }
NF4_DEVICE float to_float(BFloat16 a) { return float_of(uint32_t(a.bits) << 16); }
NF4_DEVICE float to_float(Float16 a) { return __half2float(__ushort_as_half(a.bits)); }

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
NF4_DEVICE T from_float(float a);
template <>
NF4_DEVICE float from_float<float>(float a) {
  return a;
}
template <>
NF4_DEVICE BFloat16 from_float<BFloat16>(float a) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(a))};
}
template <>
NF4_DEVICE Float16 from_float<Float16>(float a) {
  return {__half_as_ushort(__float2half_rn(a))};
}

// Rounds two values and packs them into 32 bits, the first in the low half. T: BFloat16 or Float16. This is one
// instruction; from_float twice is three on sm_100.
template <class T>
NF4_DEVICE uint32_t pack(float low, float high);
template <>
NF4_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
NF4_DEVICE uint32_t pack<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// a * b, element by element of two pairs, each product rounded once to T.
template <class T>
NF4_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
NF4_DEVICE uint32_t multiply_pairs<BFloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 product =
      __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}
template <>
NF4_DEVICE uint32_t multiply_pairs<Float16>(uint32_t a, uint32_t b) {
  const __half2 product = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

// a * b + c (FMA), element by element of pairs, each rounded once to T.
template <class T>
NF4_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c);
template <>
NF4_DEVICE uint32_t multiply_add_pairs<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = const __nv_bfloat162;
  Pair sum = __hfma2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b), reinterpret_cast<Pair&>(c));
  return reinterpret_cast<const uint32_t&>(sum);
}
template <>
NF4_DEVICE uint32_t multiply_add_pairs<Float16>(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = const __half2;
  Pair sum = __hfma2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b), reinterpret_cast<Pair&>(c));
  return reinterpret_cast<const uint32_t&>(sum);
}

// Tensor cores.

// mma.m16n8k16: c[16, 8] += a[16, 16] @ b[16, 8] over a warp, accumulated in fp32. Lane = 4g + t, g = 0..7, t = 0..3.
// A register of a and b holds two elements along the contraction k, of c one element.
//
//   a     k: 2t 2t+1 | 2t+8 2t+9      b    column g          c    column: 2t | 2t+1
//   row g     a[0]   |   a[2]         k: 2t,   2t+1  b0      row g       c[0] | c[1]
//   row g+8   a[1]   |   a[3]         k: 2t+8, 2t+9  b1      row g+8     c[2] | c[3]
//
//   so lane 0 holds rows 0 and 8 of a at k = 0, 1, 8, 9; lane 1 the same rows at k = 2, 3, 10, 11; lane 4 rows 1 and 9.
//
// The sum does not depend on the order of k as long as a and b agree: a kernel may put any 16 k in these places.
template <class T>
NF4_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
NF4_DEVICE void mma_16x8x16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
NF4_DEVICE void mma_16x8x16<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace nf4::cuda

#endif  // NF4_EXECUTOR
