// What the CUDA ops' bindings share: device and stream, the kernel that a caller forced, the choice of one, codebooks.
//
// No kernel is in a binding, so the host compiler reads torch's headers once, not nvcc once for each architecture.
// Compiled with NF4_EXECUTOR the same ops take CPU tensors, and the kernels run on tests/executor.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include "../cuda/choose.h"
#include "../cuda/kernels.h"
#include "../rounded_code.h"
#include "checks.h"

#ifdef NF4_EXECUTOR
#define NF4_CUDA_ARCHITECTURES "the host executor"
#else
#include <dlfcn.h>
#endif

namespace nf4::binding {

// The op, with all its tensors where `tensor` is.
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
inline Device simulated;  // what the choice of kernels sees
inline Device device_of(const Op&) { return simulated; }

#else

// torch's current stream of a device. The function is in libtorch_cuda, which a torch without CUDA does not have: looked
// up when it is needed, this library loads beside any torch.
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

// Where a launcher puts its work. While it lives, the op's device is the current one.
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

#endif

inline void check_launch(cudaError_t error, const Op& op) {
  CHECK(error == cudaSuccess, op, ": the launch on ", op.place, " failed: ", cudaGetErrorString(error),
        " (this library has kernels for ", NF4_CUDA_ARCHITECTURES, ")");
}

inline std::atomic<int> forced_path{-1};  // of cuda::Path; -1: choose.h decides

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return uintptr_t(p) % 16 == 0; });
}

// What the choice of a kernel depends on; `experts` is 0 for one weight.
inline cuda::Problem problem_of(const Op& op, bool dgrad, const cuda::ProductArgs& args, int64_t experts) {
  const Device device = device_of(op);
  cuda::Problem problem{};
  problem.dgrad = dgrad;
  problem.experts = experts;
  problem.dtype = args.dtype;
  problem.M = args.M;
  problem.N = args.weight.N;
  problem.K = args.weight.K;
  problem.whole_codes = has_whole_codes(args.weight);
  const void* read_16 = dgrad ? args.low_rank_factor : nullptr;  // the others are read element by element
  problem.aligned = is_aligned({args.x, args.weight.packed, args.out, read_16});
  problem.arch = device.arch;
  problem.multiprocessors = device.multiprocessors;
  return problem;
}

inline cuda::Choice choice_for(const cuda::Problem& problem, const Op& op) {
  const int forced = forced_path;
  if (forced < 0) return cuda::choose(problem);
  const auto path = cuda::Path(forced);
  const char* obstacle = cuda::obstacle(problem, path);
  CHECK(obstacle == nullptr, op, ": the forced kernel ", cuda::kPathNames[forced], " cannot run this: ", obstacle);
  return {path, cuda::splits_of(problem, path), "forced"};
}

// The codebooks that have a name, rounded when the first product wants them: 8 ms for each of the two dtypes.
class CodeList {
 public:
  // False where there is no room for another.
  bool add(const float* code) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool is_there = std::any_of(codes_.begin(), codes_.end(),
                                      [&](const Code& c) { return std::memcmp(c.data(), code, sizeof c) == 0; });
    if (is_there) return true;
    if (codes_.size() == cuda::KnownCodes::kMost) return false;
    std::copy_n(code, kLevels, codes_.emplace_back().begin());
    return true;
  }

  cuda::KnownCodes rounded(Dtype dtype) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return dtype == Dtype::kBFloat16 ? rounded<BFloat16>(bf16_) : rounded<Float16>(fp16_);
  }

 private:
  using Code = std::array<float, kLevels>;

  template <class T>
  const cuda::KnownCodes& rounded(cuda::KnownCodes& known) {
    for (; known.count < int(codes_.size()); ++known.count) {
      const Code& code = codes_[size_t(known.count)];
      const auto result = rounded_code<T>(code.data());
      auto& entry = known.entries[known.count];
      std::copy(code.begin(), code.end(), entry.code);
      std::transform(result.levels, result.levels + kLevels, entry.levels, [](T level) { return level.bits; });
      entry.scale = result.scale;
    }
    return known;
  }

  std::mutex mutex_;
  std::vector<Code> codes_;
  cuda::KnownCodes bf16_{}, fp16_{};
};
inline CodeList known_codes;

// Our products are not differentiable; torch's refuse to write into `out` where one of their inputs is.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;

 private:
  bool before_;
};

// The parts of the contraction, which a kernel has left in args.partial, to args.out.
inline void add_splits(const cuda::ProductArgs& args, int64_t columns, const Launch& launch, const Op& op) {
  const cuda::ReduceArgs sums{args.partial, args.splits, args.M, columns, 1.f, args.bias, args.dtype, args.out, false};
  check_launch(cuda::reduce_splits(sums, launch.stream), op);
}

void register_grouped_ops(torch::stable::detail::StableLibrary& library);

}  // namespace nf4::binding
