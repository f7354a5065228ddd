// What csrc/bindings/cuda_managed.cpp calls of the CUDA runtime, on the host: memory comes from malloc, each call is
// logged, and the first call of a name can be made to fail.
#pragma once

#include <cstddef>

#include "executor.h"

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

enum cudaDeviceAttr { cudaDevAttrConcurrentManagedAccess = 89 };
enum cudaMemoryAdvise { cudaMemAdviseSetPreferredLocation = 3, cudaMemAdviseSetAccessedBy = 5 };
constexpr unsigned cudaMemAttachGlobal = 1;

cudaError_t cudaGetLastError();
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned flags);
cudaError_t cudaFree(void* pointer);

// Both signatures, so that one library serves what is compiled for either version; calls choose by their arguments.
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
struct cudaMemLocation {
  cudaMemLocationType type;
  int id;
};
cudaError_t cudaMemAdvise(const void* pointer, size_t bytes, cudaMemoryAdvise advice, cudaMemLocation location);
cudaError_t cudaMemAdvise(const void* pointer, size_t bytes, cudaMemoryAdvise advice, int device);
cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, cudaMemLocation location, unsigned flags,
                                 cudaStream_t stream);
cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, int device, cudaStream_t stream);
