// Managed memory, whose pages the driver moves to the host when the device has no room: the two functions that
// torch.cuda.memory.CUDAPluggableAllocator takes, and what nf4kernels/optim/managed_memory.py asks of the memory.
#ifdef NF4_EXECUTOR
#include "managed_runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <set>

namespace {

struct Allocations {
  std::mutex mutex;
  std::map<const char*, size_t> bytes;  // of each, by its first address

  // The one that holds the address, or end.
  std::map<const char*, size_t>::iterator holding(const void* pointer) {
    const auto address = static_cast<const char*>(pointer);
    const auto next = bytes.upper_bound(address);
    if (next == bytes.begin()) return bytes.end();
    const auto found = std::prev(next);
    return address < found->first + found->second ? found : bytes.end();
  }
};

// Never destroyed: torch frees what is left when the process ends.
Allocations& allocations() {
  static auto& all = *new Allocations;
  return all;
}

// CUDA 13 has a structure where earlier versions have the device's number.
#if CUDART_VERSION >= 13000
cudaMemLocation location_of(int device) {
  cudaMemLocation location{};
  location.type = cudaMemLocationTypeDevice;
  location.id = device;
  return location;
}
cudaError_t advise(const void* pointer, size_t bytes, cudaMemoryAdvise advice, int device) {
  return cudaMemAdvise(pointer, bytes, advice, location_of(device));
}
cudaError_t prefetch(const void* pointer, size_t bytes, int device, cudaStream_t stream) {
  return cudaMemPrefetchAsync(pointer, bytes, location_of(device), 0, stream);
}
#else
cudaError_t advise(const void* pointer, size_t bytes, cudaMemoryAdvise advice, int device) {
  return cudaMemAdvise(pointer, bytes, advice, device);
}
cudaError_t prefetch(const void* pointer, size_t bytes, int device, cudaStream_t stream) {
  return cudaMemPrefetchAsync(pointer, bytes, device, stream);
}
#endif

// The message, or null; a failed call is not left for torch to find.
const char* told(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether the device's pages move while it runs; without that no memory beyond the device's can be allocated.
EXPORT bool nf4kernels_cuda_managed_pages(int device) {
  int moves = 0;
  return told(cudaDeviceGetAttribute(&moves, cudaDevAttrConcurrentManagedAccess, device)) == nullptr && moves != 0;
}

// Null where there is none, which torch tells as out of memory. Pages stay on the device as long as there is room, and
// where they are not the device reads them on the host instead of moving them to and fro: `prefetch` brings them back.
EXPORT void* nf4kernels_cuda_managed_alloc(size_t bytes, int device, cudaStream_t) {
  void* pointer = nullptr;
  if (told(cudaSetDevice(device)) != nullptr) return nullptr;
  if (told(cudaMallocManaged(&pointer, bytes, cudaMemAttachGlobal)) != nullptr) return nullptr;
  for (const auto advice : {cudaMemAdviseSetPreferredLocation, cudaMemAdviseSetAccessedBy})
    if (told(advise(pointer, bytes, advice, device)) != nullptr) {
      told(cudaFree(pointer));
      return nullptr;
    }
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  allocations().bytes[static_cast<const char*>(pointer)] = bytes;
  return pointer;
}

EXPORT void nf4kernels_cuda_managed_free(void* pointer, size_t, int, cudaStream_t) {
  {
    const std::lock_guard<std::mutex> lock(allocations().mutex);
    allocations().bytes.erase(static_cast<const char*>(pointer));
  }
  told(cudaFree(pointer));
}

EXPORT bool nf4kernels_cuda_managed_holds(const void* pointer) {
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  return allocations().holding(pointer) != allocations().bytes.end();
}

// Moves to the device, in order with what is on the stream, the allocations that hold these addresses, each once and
// whole. Returns what is wrong, or null.
EXPORT const char* nf4kernels_cuda_managed_prefetch(const void* const* pointers, int count, int device,
                                                    cudaStream_t stream) {
  if (const char* wrong = told(cudaSetDevice(device))) return wrong;
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  std::set<const char*> done;
  for (int i = 0; i < count; ++i) {
    const auto found = allocations().holding(pointers[i]);
    if (found == allocations().bytes.end()) return "an address is in no managed memory of this library";
    if (!done.insert(found->first).second) continue;
    if (const char* wrong = told(prefetch(found->first, found->second, device, stream))) return wrong;
  }
  return nullptr;
}
