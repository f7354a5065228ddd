// What the bindings for CPU tensors share: where an op runs, large outputs, torch's threads for the drivers of csrc/cpu,
// and a product's arguments.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>
#include <vector>

#include "../cpu/product.h"
#include "checks.h"

namespace nf4::binding {

namespace cpu = nf4::cpu;

inline Op cpu_op(const char* name) { return {name, {aoti_torch_device_type_cpu(), -1}}; }

// An output as large as a weight, all of which the op writes. Most of dequantize's time is the page faults of fresh
// memory: 33 MB take 17.5 ms in pages of 4 kB, 4.0 in huge ones (one core of a Zen 4 EPYC, a virtual machine). Where
// malloc gives its heap, the advice outlives the tensor: what comes to lie there is resident in steps of 2 MB. A virtual
// machine that reports free huge pages to its host pays up to 2 ms for each that it touches again (docs/speed.md).
// `packed` does not take this way, for it stays: a virtual machine may have to get its first huge pages from the host.
inline Tensor new_large(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  Tensor out = new_empty(like, shape, type);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + size_t(out.numel()) * out.element_size()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a refusal is no error
#endif
  return out;
}

// What the drivers of csrc/cpu need of torch, see dequantize.h and product.h.
struct Threads {
  template <class Body>
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  }
  static int64_t threads() { return torch::stable::get_num_threads(); }
};
struct Runtime : Threads {
  const Tensor& like;
  std::optional<Tensor> panel;

  explicit Runtime(const Tensor& in) : like(in) {}
  void* allocate(int64_t bytes) {
    panel.reset();
    return panel.emplace(new_empty(like, {&bytes, 1}, ScalarType::Byte)).mutable_data_ptr();
  }
  void gemm(const cpu::SliceGemm& args);  // cpu_gemm.cpp
};

// One op of a product: what its messages call the input and D, and its sizes.
struct ProductOp {
  Op op;
  const char* input_name;
  const char* depth_name;
  cpu::Product product;
};

// The inner product of the LoRA term in fp32, scaled; fills in the rest of what args need of the term.
template <class Args>
std::vector<float> scaled_lora_inner(const LoraTerm& term, const LoraTermData& data, Dtype dtype, int64_t M,
                                     Args& args) {
  args.rank = data.rank;
  args.lora_factor = data.factor;
  args.unscaled_inner = data.inner;
  args.scaling = term.scaling;
  std::vector<float> scaled(static_cast<size_t>(M * data.rank));
  cpu::scale_lora_inner(data.inner, dtype, M * data.rank, term.scaling, scaled.data());
  args.lora_inner = scaled.data();
  return scaled;
}

void register_grouped_ops(torch::stable::detail::StableLibrary& library);
void register_routing_ops(torch::stable::detail::StableLibrary& library);

}  // namespace nf4::binding
