// What every CUDA op's binding needs to launch a kernel: the op's place, device and stream, and the check of a launch.
//
// No kernel is in a binding, so the host compiler reads torch's headers once, not nvcc once for each architecture.
// Compiled with NF4_EXECUTOR the same ops take CPU tensors, and the kernels run on the host executor (tests/executor).
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../cuda/kernels.h"
#include "arrival_slots.h"
#include "checks.h"

#ifdef NF4_EXECUTOR
#define NF4_CUDA_ARCHITECTURES "the host executor"
#else
#include <dlfcn.h>
#endif

namespace nf4::binding {

// The op, whose tensors must all be where `tensor` is.
inline Op op_at(const char* name, const Tensor& tensor, const char* tensor_name) {
  const Op op{name, place_of(tensor)};
#ifdef NF4_EXECUTOR
  const bool runs_here = tensor.is_cpu();
#else
  const bool runs_here = tensor.is_cuda();
#endif
  CHECK(runs_here, op, ": ", tensor_name, " must be on a CUDA device as the other tensors, got ", op.place);
  return op;
}

#ifdef NF4_EXECUTOR

struct Launch {
  explicit Launch(const Op&) {}
  cudaStream_t stream = nullptr;
};

struct Device {
  int arch = 90, multiprocessors = 4;
};
inline Device pretended;  // what the choice of kernels sees
inline Device device_of(const Op&) { return pretended; }

struct Stream {
  bool is_known;
  uint64_t capture, id;
};
inline Stream pretended_stream{true, 0, 0};  // what arrival_slot sees
inline Stream stream_of(const Launch&) { return pretended_stream; }

#else

// torch's current stream on the op's device. The function is in libtorch_cuda, which a torch without CUDA lacks;
// because it is looked up when it is needed, this library loads beside any torch.
inline cudaStream_t current_stream(const Op& op) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream;
  CHECK(function != nullptr && function(op.place.index, &stream) == 0, op,
        ": torch must have a current CUDA stream on ", op.place, ", and libtorch_cuda.so told of none");
  return static_cast<cudaStream_t>(stream);
}

// The stream that launchers use. While it lives, the op's device is the current one.
struct Launch {
  explicit Launch(const Op& op) : guard(op.place.index), stream(current_stream(op)) {
    // The guard sets the device of torch's runtime; this library has its own, static.
    const cudaError_t error = cudaSetDevice(op.place.index);
    CHECK(error == cudaSuccess, op, ": ", op.place, " cannot be made the current device: ", cudaGetErrorString(error));
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

struct Device {
  int arch, multiprocessors;
};
inline Device device_of(const Op& op) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value;
    const cudaError_t error = cudaDeviceGetAttribute(&value, name, op.place.index);
    CHECK(error == cudaSuccess, op, ": ", op.place, " does not tell what it is: ", cudaGetErrorString(error));
    return value;
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount)};
}

struct Stream {
  bool is_known = false;
  unsigned long long capture = 0, id = 0;  // capture: 0 where the stream is not being captured
};
inline Stream stream_of(const Launch& launch) {
  auto status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0, id = 0;
  if (cudaStreamGetCaptureInfo(launch.stream, &status, &capture) != cudaSuccess) return {};
  // To ask a stream for its id would end its capture; within one its handle is no other stream's.
  if (status == cudaStreamCaptureStatusActive) return {true, capture + 1, uintptr_t(launch.stream)};
  if (status != cudaStreamCaptureStatusNone) return {};
  // Nor may the question end a capture that another thread has under way.
  auto mode = cudaStreamCaptureModeRelaxed;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) return {};
  const cudaError_t error = cudaStreamGetId(launch.stream, &id);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return {error == cudaSuccess && restored == cudaSuccess, 0, id};
}

#endif

inline std::unique_ptr<ArrivalSlots> arrival_slots = std::make_unique<ArrivalSlots>();

// The launch's slot of arrival counters, -1 where none is left or CUDA does not tell the stream: then a second launch
// adds the parts up.
inline int arrival_slot(const Launch& launch) {
  const Stream stream = stream_of(launch);
  return stream.is_known ? arrival_slots->of(stream.capture, stream.id) : -1;
}

inline void check_launch(cudaError_t error, const Op& op) {
  CHECK(error == cudaSuccess, op, ": the launch on ", op.place, " failed: ", cudaGetErrorString(error),
        " (this library has kernels for ", NF4_CUDA_ARCHITECTURES, ")");
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return uintptr_t(p) % 16 == 0; });
}

}  // namespace nf4::binding
