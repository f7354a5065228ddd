// dequantize: W-hat[rows, columns] of a rectangle of W, split over threads.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace nf4::cpu {

// A range of columns begins anew in every row, where no hardware prefetcher expects it: a 4096x4096 weight in ranges of
// 512 columns took 7.8 ms without this and takes 2.5 (one Zen 4 core of a machine that others use too).
constexpr int64_t kPrefetchRows = 4;
static inline void prefetch_row(const Weight& w, int64_t first, int64_t columns) {
  constexpr int64_t kLine = 64;
  const uint8_t* begin = w.packed + packed_bytes(w, first);
  for (int64_t i = 0; i < packed_bytes(w, columns); i += kLine) __builtin_prefetch(begin + i);
  __builtin_prefetch(w.absmax_as<char>() + (first >> w.block_shift) * absmax_bytes(w.scales));
}

// [rows, columns] weights from flat element `first` on into out, whose rows are `stride` elements apart.
// Threads, the caller's, has parallel_for(begin, end, grain, body), which calls body(begin, end) on parts of the range at
// once.
template <class Threads>
void dequantize_rectangle(const Threads& threads, const Weight& w, int64_t first, int64_t rows, int64_t columns,
                          Dtype dtype, void* out, int64_t stride) {
  const DequantizeFn run = is_int8(w) ? active_kernels().int8->dequantize : active_kernels().dequantize;
  auto* bytes = static_cast<char*>(out);
  const int64_t size = element_bytes(dtype);
  if (columns == w.K && stride == columns) {  // one run of weights: split anywhere, on whole cache lines
    const int64_t count = rows * columns;
    threads.parallel_for(0, ceil_div(count, kDecodeGrain), 1, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * kDecodeGrain, to = end * kDecodeGrain < count ? end * kDecodeGrain : count;
      run(w, first + from, to - from, dtype, bytes + from * size);
    });
    return;
  }
  threads.parallel_for(0, rows, ceil_div(kDecodeGrain, at_least_1(columns)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (r + kPrefetchRows < end) prefetch_row(w, first + (r + kPrefetchRows) * w.K, columns);
      run(w, first + r * w.K, columns, dtype, bytes + r * stride * size);
    }
  });
}

}  // namespace nf4::cpu
