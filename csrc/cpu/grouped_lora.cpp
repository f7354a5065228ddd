#include "grouped_lora.h"

#include <cstring>
#include <vector>

#include "convert.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kPartM = 8;  // a tile of rows with AVX-512, two with AVX2

template <class Body>
void run(ParallelFor parallel_for, int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const auto call = [](const void* state, int64_t first, int64_t last) {
    (*static_cast<const Body*>(state))(first, last);
  };
  parallel_for(begin, end, grain, call, &body);
}

}  // namespace

void multiply_lora_inner(ParallelFor parallel_for, const LoraInnerArgs& args, const int32_t* offsets, int64_t experts) {
  struct Part {
    int64_t expert, begin, end;
  };
  std::vector<Part> parts;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e)
    for (; begin < offsets[e]; begin = parts.back().end)
      parts.push_back({e, begin, offsets[e] - begin < kPartM ? offsets[e] : begin + kPartM});
  const int64_t bytes = element_bytes(args.dtype);
  std::memset(static_cast<char*>(args.out) + begin * args.rank * bytes, 0,
              size_t((args.M - begin) * args.rank * bytes));
  const LoraInnerFn kernel = active_kernels()[choose_lora(args.dtype)].lora_inner;
  const int64_t grain = lora_inner_grain(kPartM, args.rank, args.D), count = int64_t(parts.size());
  run(parallel_for, 0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first, next; i < last; i = next) {
      const int64_t expert = parts[size_t(i)].expert, first_m = expert == 0 ? 0 : offsets[expert - 1];
      for (next = i + 1; next < last && parts[size_t(next)].expert == expert;) ++next;
      LoraInnerArgs own = args;
      own.M = offsets[expert] - first_m;
      own.x = static_cast<const char*>(args.x) + first_m * args.D * bytes;
      own.factor = static_cast<const char*>(args.factor) + expert * args.rank * args.D * bytes;
      own.out = static_cast<char*>(args.out) + first_m * args.rank * bytes;
      kernel(own, parts[size_t(i)].begin - first_m, parts[size_t(next - 1)].end - first_m);
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
