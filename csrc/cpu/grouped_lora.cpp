#include "grouped_lora.h"

#include <cstring>
#include <vector>

#include "convert.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kPartM = 64;

// Rows [begin, end) of x, at most kPartM, times a factor [D, rank].
void multiply_by_transposed(const LoraGradKernel& kernel, const LoraInnerArgs& args, int64_t begin, int64_t end,
                            std::vector<char>& padded) {
  const int64_t bytes = element_bytes(args.dtype);
  LoraGradArgs own{};
  own.rank = end - begin;
  own.wide = args.factor;
  own.dtype = own.out_dtype = args.dtype;
  own.M = args.D;
  own.C = args.rank;
  own.scaling = 1;
  own.out = static_cast<char*>(args.out) + begin * args.rank * bytes;
  own.lora_inner_stride = ceil_div(args.D, 2) * 2;
  own.lora_inner = static_cast<const char*>(args.x) + begin * args.D * bytes;
  if (kernel.inner_dtype != args.dtype || own.lora_inner_stride != args.D) {
    padded.resize(size_t(own.rank * own.lora_inner_stride * element_bytes(kernel.inner_dtype)));
    pad_lora_rows(own.lora_inner, args.dtype, own.rank, args.D, own.lora_inner_stride, kernel.inner_dtype,
                  padded.data());
    own.lora_inner = padded.data();
  }
  kernel.run(own, 0, ceil_div(args.rank, kernel.tile_c));
}

template <class Body>
void run(ParallelFor parallel_for, int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const auto call = [](const void* state, int64_t first, int64_t last) {
    (*static_cast<const Body*>(state))(first, last);
  };
  parallel_for(begin, end, grain, call, &body);
}

}  // namespace

void multiply_lora_inner(ParallelFor parallel_for, const LoraInnerArgs& args, const int32_t* offsets, int64_t experts,
                         bool is_transposed) {
  struct Part {
    int64_t expert, begin, end;
  };
  std::vector<Part> parts;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e)
    for (; begin < offsets[e]; begin = parts.back().end)
      parts.push_back({e, begin, offsets[e] - begin < kPartM ? offsets[e] : begin + kPartM});
  const int64_t bytes = element_bytes(args.dtype), row_bytes = args.D * bytes;
  std::memset(static_cast<char*>(args.out) + begin * args.rank * bytes, 0,
              size_t((args.M - begin) * args.rank * bytes));
  const ProductKernels& kernels = active_kernels()[choose_lora(args.dtype)];
  const int64_t grain = lora_inner_grain(kPartM, args.rank, args.D), count = int64_t(parts.size());
  run(parallel_for, 0, count, grain, [&](int64_t first, int64_t last) {
    LoraInnerArgs own = args;
    std::vector<char> padded;
    for (int64_t i = first; i < last; ++i) {
      const Part& part = parts[size_t(i)];
      own.factor = static_cast<const char*>(args.factor) + part.expert * args.rank * row_bytes;
      if (is_transposed)
        multiply_by_transposed(*kernels.lora_grad, own, part.begin, part.end, padded);
      else
        kernels.lora_inner(own, part.begin, part.end);
    }
  });
}

void sum_lora_grads(ParallelFor parallel_for, const LoraGradArgs& args, const void* lora_inner, const int32_t* offsets,
                    int64_t experts) {
  const LoraGradKernel& kernel = *active_kernels()[choose_lora(args.dtype)].lora_grad;
  const int64_t bytes = element_bytes(args.dtype), inner_bytes = element_bytes(kernel.inner_dtype);
  const int64_t out_bytes = args.rank * args.C * element_bytes(args.out_dtype);
  // Expert e's transposed part begins at row begin + e, as each may be a row longer than the expert's own.
  std::vector<char> inner(size_t((args.M + experts) * args.rank * inner_bytes));
  const auto of_expert = [&](int64_t e) {
    const int64_t begin = e == 0 ? 0 : offsets[e - 1];
    LoraGradArgs own = args;
    own.M = offsets[e] - begin;
    own.lora_inner_stride = ceil_div(own.M, 2) * 2;
    own.lora_inner = inner.data() + (begin + e) * args.rank * inner_bytes;
    own.wide = static_cast<const char*>(args.wide) + begin * args.C * bytes;
    own.out = static_cast<char*>(args.out) + e * out_bytes;
    return own;
  };
  const int64_t tiles = ceil_div(args.C, kernel.tile_c), rows = ceil_div(args.M, experts);
  run(parallel_for, 0, experts, ceil_div(1 << 16, at_least_1(rows * args.rank)), [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; ++e) {
      const LoraGradArgs own = of_expert(e);
      const int64_t begin = e == 0 ? 0 : offsets[e - 1];
      transpose_lora_inner(static_cast<const char*>(lora_inner) + begin * args.rank * bytes, args.dtype, own.M,
                           args.rank, own.lora_inner_stride, kernel.inner_dtype, const_cast<void*>(own.lora_inner));
    }
  });
  run(parallel_for, 0, experts * tiles, lora_grad_grain(rows, args.rank, kernel.tile_c),
      [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last;) {
          const int64_t e = i / tiles, end = last < (e + 1) * tiles ? last : (e + 1) * tiles;
          kernel.run(of_expert(e), i - e * tiles, end - e * tiles);
          i = end;
        }
      });
}

}  // namespace nf4::cpu
