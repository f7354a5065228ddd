// dequantize + GEMM: dequantize a slice of Ŵ into a workspace, multiply by it with torch's own GEMM, and reuse the
// workspace for the next slice. In bf16 and fp16.
//
//   linear         y[:, n..] = x[M, K] @ slice[width, K]^T          with LoRA   [x | P] and [slice | s B]
//   linear_dgrad   dX[:, k..] = dY[M, N] @ slice[N, width]                      [dY | Q] and [slice ; s A]
//
// Who computes   All threads dequantize the slice, then torch's GEMM, oneDNN, uses all of them.
// The trick      Where oneDNN multiplies on AMX and our kernels do not (fp16), that pays for writing and reading Ŵ. A
//                slice is whole columns of out, so that each element is one sum, rounded once; the LoRA term is more of
//                the contraction, with the scaling in the factor: an inner product of scaled losses has no room for it
//                in fp16. Rejected: a slice of the contraction, whose sums are rounded to bf16 each.
// Bytes          A weight is half a byte read, 2 written and read, and packed once more by the GEMM: 0.65 to 0.85
//                cycles of a core beside its 2 M flops. Columns of W cost more than rows, see choose.h.
// Needs          x and out contiguous. x is copied where a term joins it; where it is not aligned to 64 bytes: the bits of
//                a GEMM of torch's may depend on that; and where the depth is not whole steps of AMX: a row's last step
//                would read on into the next row, whose NaN times zero is NaN.
#pragma once

#include "convert.h"
#include "dequantize.h"
#include "kernels.h"

namespace nf4::cpu {

// out[M, columns] = x[M, depth] @ slice; with `adds` it is added to what out holds.
struct SliceGemm {
  Dtype dtype;
  int64_t M, columns, depth;
  const void* x;      // [M, depth]
  const void* slice;  // [columns, depth], else [depth, columns] if is_dgrad
  bool is_dgrad;
  void* out;
  int64_t out_stride;  // elements from row to row
  bool adds;
};

// The bytes that a test wants of a slice; 0: by choose.h.
int64_t forced_slice_bytes();

// The columns of out that a slice gives, when each has `depth` elements of `size` bytes: slices of equal width, in whole
// steps.
static inline int64_t slice_width(const Product& product, int64_t depth, int64_t size, int64_t threads) {
  int64_t bytes = threads * kSliceBytes;
  if (product.is_dgrad && bytes < kDgradSliceColumns * depth * size) bytes = kDgradSliceColumns * depth * size;
  if (bytes > kMostSliceBytes) bytes = kMostSliceBytes;
  if (forced_slice_bytes() > 0) bytes = forced_slice_bytes();
  const int64_t slices = at_least_1(ceil_div(product.C * depth * size, bytes));
  return ceil_div(ceil_div(product.C, slices), kSliceStep) * kSliceStep;
}

// [x | lora_inner | 0] rows [m_begin, m_end) of `depth` columns, D of which are x's.
static inline void join_rows(const GemmArgs& args, const void* x, int64_t D, int64_t depth, int64_t m_begin,
                             int64_t m_end, void* joined) {
  const int64_t size = element_bytes(args.dtype), row = D * size, term = args.rank * size;
  for (int64_t m = m_begin; m < m_end; ++m) {
    char* to = static_cast<char*>(joined) + m * depth * size;
    std::memcpy(to, static_cast<const char*>(x) + m * row, size_t(row));
    if (term > 0) std::memcpy(to + row, static_cast<const char*>(args.unscaled_inner) + m * term, size_t(term));
    std::memset(to + row + term, 0, size_t(depth * size - row - term));
  }
}

// Beside the slice of columns [begin, begin + count) of out: rows of s B, or columns of s A, and zeros after them.
template <class T, class Threads>
void join_factor(const Threads& threads, const GemmArgs& args, const Product& product, int64_t begin, int64_t count,
                 int64_t depth, T* slice) {
  const auto* factor = static_cast<const T*>(args.lora_factor);
  const int64_t rank = args.rank, extra = depth - product.D;
  const auto join = [&](const T* from, int64_t used, int64_t n, T* to) {
    for (int64_t i = 0; i < used; ++i) to[i] = from_float<T>(to_float(from[i]) * args.scaling);
    std::memset(static_cast<void*>(to + used), 0, size_t(n - used) * sizeof(T));
  };
  if (product.is_dgrad)
    threads.parallel_for(0, extra, ceil_div(kDecodeGrain, count), [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j)
        join(j < rank ? factor + j * product.C + begin : factor, j < rank ? count : 0, count,
             slice + (product.D + j) * count);
    });
  else
    threads.parallel_for(0, count, ceil_div(kDecodeGrain, extra), [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) join(factor + (begin + c) * rank, rank, extra, slice + c * depth + product.D);
    });
}

// args.out[M, C] of x[M, D], both contiguous; M and C at least 1. Runtime is product.h's.
template <class Runtime>
void multiply_slices(Runtime& runtime, const Product& product, const GemmArgs& args, const void* x) {
  const int64_t M = args.M, C = product.C, D = product.D, size = element_bytes(args.dtype);
  const int64_t depth = ceil_div(D + args.rank, kTermStep) * kTermStep;
  const bool is_aligned = reinterpret_cast<uintptr_t>(x) % kAlignment == 0;
  const void* joined = x;
  if (depth > D || !is_aligned) {
    void* copy = runtime.allocate(M * depth * size);
    runtime.parallel_for(0, M, ceil_div(kDecodeGrain, at_least_1(depth)),
                         [&](int64_t begin, int64_t end) { join_rows(args, x, D, depth, begin, end, copy); });
    joined = copy;
  }
  auto* out = static_cast<char*>(args.out);
  if (args.bias != nullptr)
    runtime.parallel_for(0, M, ceil_div(kDecodeGrain, C), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) std::memcpy(out + m * C * size, args.bias, size_t(C * size));
    });
  const int64_t width = slice_width(product, depth, size, runtime.threads());
  void* slice = thread_workspace((width < C ? width : C) * depth * size);
  for (int64_t begin = 0; begin < C; begin += width) {
    const int64_t count = width < C - begin ? width : C - begin;
    if (product.is_dgrad)
      dequantize_rectangle(runtime, args.weight, begin, D, count, args.dtype, slice, count);
    else
      dequantize_rectangle(runtime, args.weight, begin * D, count, D, args.dtype, slice, depth);
    if (depth > D)
      with_type(args.dtype, [&](auto t) {
        join_factor(runtime, args, product, begin, count, depth, static_cast<decltype(t)*>(slice));
      });
    runtime.gemm(
        {args.dtype, M, count, depth, joined, slice, product.is_dgrad, out + begin * size, C, args.bias != nullptr});
  }
}

}  // namespace nf4::cpu
