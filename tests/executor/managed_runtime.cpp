#include "managed_runtime.h"

#include <cstdlib>
#include <sstream>
#include <string>

namespace {

std::string calls, failing;

// Logs the call; cudaErrorInvalidValue once where it is to fail.
template <typename... Parts>
cudaError_t called(const char* name, const Parts&... parts) {
  std::ostringstream line;
  line << name;
  ((line << ' ' << parts), ...);
  calls += line.str() + '\n';
  if (failing != name) return cudaSuccess;
  failing.clear();
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cudaGetLastError() {
  called("get_last_error");
  return cudaErrorInvalidValue;
}

cudaError_t cudaSetDevice(int device) { return called("set_device", device); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrConcurrentManagedAccess;
  return called("attribute", device);
}

cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned flags) {
  const cudaError_t error = called("malloc", bytes, flags);
  if (error == cudaSuccess) *pointer = std::malloc(bytes);
  return error;
}

cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return called("free");
}

cudaError_t cudaMemAdvise(const void*, size_t bytes, cudaMemoryAdvise advice, cudaMemLocation location) {
  return called("advise", bytes, advice, "location", location.type, location.id);
}

cudaError_t cudaMemAdvise(const void*, size_t bytes, cudaMemoryAdvise advice, int device) {
  return called("advise", bytes, advice, "device", device);
}

cudaError_t cudaMemPrefetchAsync(const void*, size_t bytes, cudaMemLocation location, unsigned flags,
                                 cudaStream_t stream) {
  return called("prefetch", bytes, "location", location.type, location.id, "flags", flags, "stream", stream);
}

cudaError_t cudaMemPrefetchAsync(const void*, size_t bytes, int device, cudaStream_t stream) {
  return called("prefetch", bytes, "device", device, "stream", stream);
}

#define NF4_TEST_API extern "C" __attribute__((visibility("default")))

// The calls since the last time that this was asked, a line each.
NF4_TEST_API const char* nf4_executor_managed_calls() {
  static std::string given;
  given.swap(calls);
  calls.clear();
  return given.c_str();
}

NF4_TEST_API void nf4_executor_managed_fail(const char* name) { failing = name; }
