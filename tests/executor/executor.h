// The host executor: the CUDA execution model on a CPU. It gives device.cuh's names their meaning for a host compiler
// (-DNF4_EXECUTOR, -x c++). Blocks run one after the other, each thread as a fiber that a schedule resumes. It checks
// divergence, deadlocks, addresses, alignment and unfinished copies, and poisons shared memory with NaN.
// A build with races=True also sees every access of a kernel: races/races.h says which of them it refuses, races/counts.h
// what it counts. It cannot see: caches, launch bounds, registers and time.
//
// A fiber runs until a collective (barrier, shuffle, mma), where it waits for the other threads of its block or warp;
// the last one to arrive performs it for all. A missing barrier shows as a wrong value under one of the schedules. All
// threads of a collective must arrive at the same source line, which is stricter than the hardware. The first mistake
// ends the launch with a message (cudaGetErrorString) that names kernel, block, threads and lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#include "element.h"
#include "format.h"

// CUDA's syntax.

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Always inlined, as on the device: the linker would merge two files' inline functions of one name.
#define NF4_DEVICE inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
const char* cudaGetErrorString(cudaError_t error);  // for an error: the message of the last failed launch

namespace nf4::cuda {

using std::max;
using std::min;

namespace executor {

constexpr int kLanes = 32;

// The caller's source line, as the default of a parameter.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch with a printf message, to which kernel, block and thread are prepended.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Collectives: suspend the thread until all threads of its block, or the 32 lanes of its warp, are at this site. Before
// a warp resumes, `perform` is called once with the operands of its lanes.
void meet_block(const char* what, Site site);
void meet_warp(const char* what, Site site, void* operands, void (*perform)(void* const lanes[kLanes]));

// How a mutant changes the calls at one site of one kernel (nf4_executor_change). A call that a mutant can change asks
// for it, which also records that the kernel has come there.
enum class Change {
  kNone,
  kRemoved,    // it does nothing; arrive() says that all have come
  kUnordered,  // sync_warp: a rendezvous that orders no memory, as a shuffle is
  kLate,       // a barrier of the block or warp: after the copies that follow it, at their commit
  kShort,      // copy_async_wait: leaves one group more unfinished
};
Change reach(const char* what, Site site);
extern int source_mutant;  // which of the mutants that mutants.py has compiled into a copy of csrc is on

void sync_block(Site site);
void sync_warp(Site site);
void* shared_arena();
void check_global(const void* p, size_t bytes, const char* what, Site site);
void copy_async_wait(int pending, Site site);
void fence_device(Site site);
uint32_t arrive(uint32_t* counter, uint32_t last, Site site);

// How memory is accessed. kReadOnly: as what the launch does not write. kReadL2: as what another block may have written.
enum class Access { kRead, kWrite, kReadOnly, kReadL2, kCopy, kArrive };

// A global load by the function `what` of device.cuh.
void load(void* to, const void* from, size_t bytes, Access access, const char* what, Site site);
template <class V>
NF4_DEVICE V load(const V* p, Access access, const char* what, Site site) {
  V v;
  load(&v, p, sizeof v, access, what, site);
  return v;
}

int shared_limit();

cudaError_t run(const void* kernel, dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& thread);

template <class T>
struct ShuffleLane {
  T value;
  int source;
  T result;
};

template <class T>
T exchange(const char* what, T value, int source, Site site) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  ShuffleLane<T> self{value, source, {}};
  meet_warp(what, site, &self, [](void* const lanes[kLanes]) {
    const auto lane = [&](int i) { return static_cast<ShuffleLane<T>*>(lanes[i]); };
    for (int i = 0; i < kLanes; ++i) lane(i)->result = lane(lane(i)->source)->value;
  });
  return self.result;
}

template <class T>
struct MmaLane {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
void unpack(uint32_t pair, float& low, float& high) {
  low = to_float(T{uint16_t(pair)});
  high = to_float(T{uint16_t(pair >> 16)});
}

// mma.cpp: multiplies and adds the operands of 32 lanes. Sums are rounded to nearest, or truncated as a tensor core does.
extern bool mma_truncates;
template <class T>
void perform_mma(void* const lanes[kLanes]);

// The exact a + b rounded to odd: to the odd one of the two fp32 around it, if it is none. A second rounding, to 22 or
// fewer bits, then gives what one rounding of the exact sum would have given.
// Boldo, Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
inline float add_to_odd(double a, double b) {
  const double sum = a + b;
  const float nearest = float(sum);
  if (!std::isfinite(sum)) return nearest;
  const double of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);  // a + b = sum + error (Knuth's 2Sum)
  const double rest = std::isfinite(nearest) ? (sum - double(nearest)) + error : -double(nearest);
  if (rest == 0 || (nf4::bits_of(nearest) & 1) != 0) return nearest;
  return std::nextafter(nearest, rest > 0 ? INFINITY : -INFINITY);
}

}  // namespace executor

// device.cuh's names, in the same order.

template <class T>
NF4_DEVICE T* shared_memory() {
  return static_cast<T*>(executor::shared_arena());
}

NF4_DEVICE unsigned thread_again() { return threadIdx.x; }

NF4_DEVICE void sync_block(executor::Site site = executor::Site::here()) { executor::sync_block(site); }
NF4_DEVICE void sync_warp(executor::Site site = executor::Site::here()) { executor::sync_warp(site); }

template <class T>
NF4_DEVICE T shuffle(T value, int lane, executor::Site site = executor::Site::here()) {
  return executor::exchange("shuffle", value, lane & 31, site);
}
template <class T>
NF4_DEVICE T shuffle_four(T value, int i, executor::Site site = executor::Site::here()) {
  return executor::exchange("shuffle_four", value, (threadIdx.x & 28) | (i & 3), site);
}
template <class T>
NF4_DEVICE T shuffle_xor(T value, int mask, executor::Site site = executor::Site::here()) {
  if (mask < 0 || mask > 31) executor::fail(site, "shuffle_xor must have a mask of 0 to 31, got %d", mask);
  return executor::exchange("shuffle_xor", value, (threadIdx.x ^ mask) & 31, site);
}

NF4_DEVICE void device_assert(bool ok, const char* message, executor::Site site = executor::Site::here()) {
  if (!ok) executor::fail(site, "%s", message);
}

constexpr int kMostShared = 227 << 10;
inline cudaError_t shared_limit(int* bytes) {
  *bytes = executor::shared_limit();
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   const Args&... args) {
  const std::tuple<Params...> params(args...);
  return executor::run(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes,
                       [&] { std::apply(kernel, params); });
}

NF4_DEVICE uint32_t load_streamed(const uint32_t* p, executor::Site site = executor::Site::here()) {
  return executor::load(p, executor::Access::kReadOnly, "load_streamed", site);
}
NF4_DEVICE uint2 load_streamed(const uint2* p, executor::Site site = executor::Site::here()) {
  return executor::load(p, executor::Access::kReadOnly, "load_streamed", site);
}
NF4_DEVICE uint4 load_streamed(const uint4* p, executor::Site site = executor::Site::here()) {
  return executor::load(p, executor::Access::kReadOnly, "load_streamed", site);
}
template <class V>
NF4_DEVICE V load_cached(const V* p, executor::Site site = executor::Site::here()) {
  return executor::load(p, executor::Access::kReadOnly, "load_cached", site);
}
template <class V>
NF4_DEVICE V load_l2(const V* p, executor::Site site = executor::Site::here()) {
  return executor::load(p, executor::Access::kReadL2, "load_l2", site);
}

NF4_DEVICE void fence_device(executor::Site site = executor::Site::here()) { executor::fence_device(site); }
NF4_DEVICE uint32_t arrive(uint32_t* counter, uint32_t last, executor::Site site = executor::Site::here()) {
  return executor::arrive(counter, last, site);
}

template <class V>
NF4_DEVICE void store_streamed(V* p, V v, executor::Site site = executor::Site::here()) {
  executor::check_global(p, sizeof *p, "store_streamed", site);
  *p = v;
}

NF4_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - static_cast<unsigned char*>(executor::shared_arena()));
}
NF4_DEVICE uint32_t load_shared(uint32_t address) {
  return *reinterpret_cast<const uint32_t*>(static_cast<unsigned char*>(executor::shared_arena()) + address);
}

void copy_async_16(void* shared, const void* global, bool valid = true, executor::Site site = executor::Site::here());
void copy_async_commit(executor::Site site = executor::Site::here());
template <int kPending>
NF4_DEVICE void copy_async_wait(executor::Site site = executor::Site::here()) {
  executor::copy_async_wait(kPending, site);
}

using nf4::bits_of;
using nf4::float_of;

NF4_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector,
                                  executor::Site site = executor::Site::here()) {
  if (selector & 0x8888) executor::fail(site, "permute_bytes must have a selector without bits 3, got %#x", selector);
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

using nf4::from_float;
using nf4::to_float;

template <class T>
NF4_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

// A product of two bf16 or fp16 is exact in fp32, unless it is below half of the least bf16.
template <class T>
NF4_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  float a_low, a_high, b_low, b_high;
  executor::unpack<T>(a, a_low, a_high);
  executor::unpack<T>(b, b_low, b_high);
  return pack<T>(a_low * b_low, a_high * b_high);
}

template <class T>
NF4_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  float a_low, a_high, b_low, b_high, c_low, c_high;
  executor::unpack<T>(a, a_low, a_high);
  executor::unpack<T>(b, b_low, b_high);
  executor::unpack<T>(c, c_low, c_high);
  return pack<T>(executor::add_to_odd(double(a_low) * b_low, c_low),
                 executor::add_to_odd(double(a_high) * b_high, c_high));
}

template <class T>
NF4_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                            executor::Site site = executor::Site::here()) {
  executor::MmaLane<T> self{c, a, {b0, b1}};
  executor::meet_warp("mma_16x8x16", site, &self, executor::perform_mma<T>);
}

}  // namespace nf4::cuda
