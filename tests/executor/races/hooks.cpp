// The functions that a compiler's -fsanitize=thread calls before each load and store, for the kernels of a build with
// races=True, and what becomes of an access. ThreadSanitizer's own library is not linked.
#include <pthread.h>

#include "counts.h"
#include "races.h"

namespace nf4::cuda::executor {
namespace {

bool is_index_variable(const void* address) {
  const auto lies_in = [&](const auto& variable) {
    return uintptr_t(address) - uintptr_t(&variable) < sizeof variable;
  };
  return lies_in(threadIdx) || lies_in(blockIdx) || lies_in(blockDim) || lies_in(gridDim);
}

struct Range {
  uintptr_t begin = 0, bytes = 0;
  bool has(const void* address) const { return uintptr_t(address) - begin < bytes; }
};

// The launching thread's stack, where the arguments of a kernel are; a GPU has them in constant memory.
Range stack_of_host() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
  }
  return {uintptr_t(begin), bytes};
}

bool is_memory(const void* address) {
  static thread_local const Range host = stack_of_host();
  const Range fibers{uintptr_t(stacks), kStacksBytes};
  return !fibers.has(address) && !is_index_variable(address) && !host.has(address);
}

void hook(const void* address, size_t bytes, Access access, bool aligned, const void* pc) {
  if (!in_kernel || !is_memory(address)) return;
  if (aligned && uintptr_t(address) % bytes != 0) {
    const Line line = line_of(pc);
    fail({line.file, line.line}, "%s %zu bytes at misaligned %p", access == Access::kWrite ? "writes" : "reads", bytes,
         address);
  }
  touch(address, bytes, access, pc);
}

}  // namespace

void touch(const void* address, size_t bytes, Access access, const void* pc) {
  if (counts::is_counting) counts::note(address, bytes, access, pc);
  races::check(address, bytes, access, pc);
}

}  // namespace nf4::cuda::executor

#define NF4_HOOK(name, bytes, access, aligned)                                  \
  extern "C" void name(void* address) {                                         \
    using namespace nf4::cuda::executor;                                        \
    hook(address, bytes, Access::access, aligned, __builtin_return_address(0)); \
  }
#define NF4_HOOKS_OF(bytes)                                   \
  NF4_HOOK(__tsan_read##bytes, bytes, kRead, true)            \
  NF4_HOOK(__tsan_write##bytes, bytes, kWrite, true)          \
  NF4_HOOK(__tsan_unaligned_read##bytes, bytes, kRead, false) \
  NF4_HOOK(__tsan_unaligned_write##bytes, bytes, kWrite, false)
NF4_HOOKS_OF(1)
NF4_HOOKS_OF(2)
NF4_HOOKS_OF(4)
NF4_HOOKS_OF(8)
NF4_HOOKS_OF(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  using namespace nf4::cuda::executor;
  hook(address, bytes, Access::kRead, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  using namespace nf4::cuda::executor;
  hook(address, bytes, Access::kWrite, false, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
