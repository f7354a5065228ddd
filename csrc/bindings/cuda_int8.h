// int8 weights on CUDA: no kernel of csrc/cuda takes them. Each op that has a weight hands the call to the op of its name
// in nf4kernels_int8, which nf4kernels/backends/select.py implements by Triton, or by the reference where there is none.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/version.h>

#include <array>
#include <tuple>
#include <type_traits>

#include "checks.h"

namespace nf4::binding {

inline bool is_int8(const Tensor& code) { return code.numel() == kInt8Levels; }

// `name` as "nf4kernels_int8::linear".
template <class Result, class... Arguments>
Result call_int8(const char* name, const Arguments&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  STD_TORCH_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == 0, torch_said());
  if constexpr (std::is_same_v<Result, Tensor>)
    return to<Tensor>(stack[0]);
  else if constexpr (!std::is_void_v<Result>)
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace nf4::binding
