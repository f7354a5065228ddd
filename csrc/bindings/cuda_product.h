// What the bindings of linear, linear_dgrad and their grouped forms share: the product's arguments, the choice of its
// kernel (or the one that a caller forced), the known codebooks, and the sum over splits.
#pragma once

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/choose.h"
#include "../rounded_code.h"
#include "cuda_launch.h"

namespace nf4::binding {

// linear: in x[M, K], out[M, N]. linear_dgrad: in dY[M, N], out dX[M, K].
struct Product {
  Op op;
  bool dgrad;
  Tensor in, out;
  OptionalTensor bias;
  LoraTerm lora_term;
  int64_t depth, columns;  // of the contraction, of out
  cuda::ProductArgs args;
};

// grouped_linear: in x[T, K], out[T, N]. grouped_linear_dgrad: in dY[T, N], out dX[T, K].
struct GroupedProduct {
  Op op;
  bool dgrad;
  Tensor in, out, expert_offsets;
  OptionalTensor bias;  // [E, N]
  LoraTerm lora_term;
  int64_t depth, columns;
  cuda::GroupedArgs args;  // of all T rows
};

// cuda_dequantize_gemm.cpp
void dequantize_gemm(const Product& product, const Launch& launch);
void dequantize_gemm(const GroupedProduct& product, const Launch& launch);

// What a caller forced on every product; -1, and 0 splits: choose.h decides.
struct Forced {
  int16_t path = -1, tile = -1;
  int32_t splits = 0;
};
inline std::atomic<Forced> forced{Forced{}};

// What was measured on the devices. A product reads its device's without a lock; what was replaced stays, because
// another thread may be reading it.
class Tunings {
 public:
  static constexpr int kMostDevices = 64;
  struct Device {
    // linear, linear_dgrad and their grouped forms; none: predicted
    std::optional<cuda::Tuning> of_op[4];
    std::string why;
  };

  // Null: all is predicted again.
  void set(int device, std::unique_ptr<Device> measured) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Device* current = measured.get();
    if (measured != nullptr) all_.push_back(std::move(measured));
    current_[size_t(device)].store(current, std::memory_order_release);
  }

  cuda::Tuning of(int device, const cuda::Problem& problem) const {
    const bool is_known = device >= 0 && device < kMostDevices;
    const Device* measured = is_known ? current_[size_t(device)].load(std::memory_order_acquire) : nullptr;
    if (measured != nullptr) {
      const auto& own = measured->of_op[(problem.experts > 0 ? 2 : 0) + (problem.dgrad ? 1 : 0)];
      if (own.has_value()) return *own;
    }
    return cuda::predicted(problem);
  }

 private:
  std::array<std::atomic<const Device*>, kMostDevices> current_{};
  std::mutex mutex_;
  std::vector<std::unique_ptr<const Device>> all_;
};
inline Tunings tunings;

// The problem that choose.h decides on; `experts` is 0 for one weight.
inline cuda::Problem problem_of(const Op& op, bool dgrad, const cuda::ProductArgs& args, int64_t experts) {
  const Device device = device_of(op);
  cuda::Problem problem{};
  problem.dgrad = dgrad;
  problem.experts = experts;
  problem.dtype = args.dtype;
  problem.M = args.M;
  problem.N = args.weight.N;
  problem.K = args.weight.K;
  problem.scales_sums = cuda::scales_sums(args.weight);
  const void* read_16 = dgrad ? args.lora_factor : nullptr;  // linear reads its LoRA operands element by element
  problem.aligned = is_aligned({args.x, args.weight.packed, args.out, read_16});
  problem.arch = device.arch;
  problem.multiprocessors = device.multiprocessors;
  return problem;
}

inline cuda::Choice choice_for(const cuda::Problem& problem, const Op& op) {
  const cuda::Tuning tuning = tunings.of(std::max(op.place.index, 0), problem);
  const Forced wish = forced;
  if (wish.path < 0) return cuda::choose(problem, tuning);
  const auto path = cuda::Path(wish.path);
  const char* obstacle = cuda::obstacle(problem, tuning, path, wish.tile, wish.splits);
  CHECK(obstacle == nullptr, op, ": the forced kernel ", cuda::kPathNames[wish.path], " cannot run this: ", obstacle);
  return cuda::forced_choice(problem, tuning, path, wish.tile, wish.splits);
}

// The named codebooks, rounded when the first product asks for them, which takes 8 ms for each of the two dtypes.
class CodeList {
 public:
  // Returns false where there is no room for another.
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

// Adds the splits' partial sums in args.partial up into args.out, and then a bias that is in none of them, or null.
inline void add_splits(const cuda::ProductArgs& args, const void* bias, int64_t columns, const Launch& launch,
                       const Op& op) {
  const cuda::ReduceArgs sums{args.partial, args.splits, args.M, columns, 1.f, args.dtype, args.out, false, bias};
  check_launch(cuda::reduce_splits(sums, launch.stream), op);
}

void register_grouped_ops(torch::stable::detail::StableLibrary& library);  // cuda_grouped.cpp
void register_routing_ops(torch::stable::detail::StableLibrary& library);  // cuda_routing.cpp

}  // namespace nf4::binding
