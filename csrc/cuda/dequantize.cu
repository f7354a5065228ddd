// dequantize: out[row, col] = code[nibble] * scale(block), rounded once to fp32, then once to the output dtype, for a
// range of rows and columns of the weight; scale(block) in each of the kinds of format.h.
//
// Who: a thread decodes 4 groups of 16 bytes of output (8 bf16, from 4 packed bytes) and its neighbours the groups
//   beside them, so that a warp loads and stores whole lines. A power of two of threads covers a row.
// Trick: both codebooks lie in shared memory. The 16 levels occupy 16 banks, so a lookup has no conflicts, and it is
//   exact, as a table of bf16 pairs is not. Rejected: 16 packed bytes a load, which would need a shuffle to store whole
//   lines and keep no more bytes in flight.
// Bytes: reads 0.5 + 1/block_size and writes 2 (bf16) a weight: 2.52 B at block size 64, 9.8 us for 4096 x 4096 at
//   an H200's 4.3 TB/s of copy. Its SMs can issue 17.3 instructions a weight in that time; this takes 11.0.
// Needs: rows of out that do not overlap. Where rows are not whole, aligned groups, an item is one element, at 63
//   instructions a weight.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 4;       // a thread at a time, so that their loads are in flight together
constexpr int kMaxGrid = 8192;  // with more tiles a block loops over several and loads its tables once

struct Tables {
  float code[kLevels];
  float scale_code[256];
};

// The range of the weight that goes to out: rows of `cols` weights.
struct Part {
  int64_t first;  // flat index of its first weight
  int64_t rows, cols;
  int64_t pitch;    // weights from row to row of the weight
  int64_t stride;   // elements from row to row of out
  int lanes_shift;  // log2 of the threads along a row
  bool keep;        // out in the L2
};

template <class T>
constexpr int group_width = int(16 / sizeof(T));  // weights in 16 bytes of out

// The scales of blocks block(0), block(1), ...
template <int kCount, class Block>
NF4_DEVICE void load_and_decode(float (&scales)[kCount], const Weight& w, const Tables& tables, float offset,
                                Block&& block) {
  decode_scales(scales, w, w.scales, load_scales<kCount>(w, w.scales, block), offset, block,
                [&](uint32_t i) { return tables.scale_code[i]; });
}

template <class T>
NF4_DEVICE T decode_element(const Weight& w, const Tables& tables, float offset, int64_t i) {
  float scale[1];
  load_and_decode(scale, w, tables, offset, [&](int) { return i >> w.block_shift; });
  return from_float<T>(tables.code[nibble(w.packed, i)] * scale[0]);
}

// 16 bytes of out; the first code is the high nibble of the low byte.
template <class T>
NF4_DEVICE uint4 decode_group(const Tables& tables, uint32_t codes, float scale) {
  constexpr int kPer = int(4 / sizeof(T));  // elements a word
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto value = [&](int e) { return tables.code[codes >> 4 * (e ^ 1) & 15] * scale; };
    if constexpr (kPer == 1)
      words[i] = bits_of(value(i));
    else
      words[i] = pack<T>(value(2 * i), value(2 * i + 1));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Decodes this thread's items of a row, at columns col, col + step, ...: elements, or groups of 16 bytes of out.
template <class T, bool kGroups>
NF4_DEVICE void decode_items(const Weight& w, const Part& part, const Tables& tables, float offset, int64_t row,
                             int64_t col, int64_t step, T* out) {
  const int64_t first = part.first + row * part.pitch + col, count = part.cols - col;
  out += row * part.stride + col;
  if constexpr (!kGroups) {
#pragma unroll
    for (int u = 0; u < kItems; ++u)
      if (u * step < count) out[u * step] = decode_element<T>(w, tables, offset, first + u * step);
  } else {
    constexpr int kWidth = group_width<T>;
    const auto load = [&](int u) {
      const int64_t i = first + u * step;
      return load_streamed(reinterpret_cast<const uint32_t*>(w.packed) + i / 8) >> 4 * (i % 8);
    };
    const auto block_of = [&](int u) { return (first + u * step) >> w.block_shift; };
    const auto store = [&](int u, uint32_t codes, float scale) {
      auto* to = reinterpret_cast<uint4*>(out + u * step);
      const uint4 group = decode_group<T>(tables, codes, scale);
      if (part.keep)
        *to = group;
      else
        store_streamed(to, group);
    };
    // A load takes a whole word of codes, of which 4 fp32 need half.
    const auto is_whole = [&](int u) { return u * step + kWidth <= count && ((first + u * step) | 7) < w.N * w.K; };
    if (is_whole(kItems - 1)) {
      uint32_t codes[kItems];
      float scales[kItems];
#pragma unroll
      for (int u = 0; u < kItems; ++u) codes[u] = load(u);
      load_and_decode(scales, w, tables, offset, block_of);
#pragma unroll
      for (int u = 0; u < kItems; ++u) store(u, codes[u], scales[u]);
      return;
    }
#pragma unroll
    for (int u = 0; u < kItems - 1; ++u) {
      if (!is_whole(u)) continue;
      float scale[1];
      load_and_decode(scale, w, tables, offset, [&](int) { return block_of(u); });
      store(u, load(u), scale[0]);
    }
#pragma unroll 1
    for (int u = 0; u < kItems; ++u) {
      if (is_whole(u)) continue;
#pragma unroll 1
      for (int64_t i = u * step; i < min(u * step + kWidth, count); ++i)
        out[i] = decode_element<T>(w, tables, offset, first + i);
    }
  }
}

// The work of a thread block.
template <class T, bool kGroups>
NF4_DEVICE void decode_part(const Weight& w, const Part& part, T* out) {
  Tables& tables = *shared_memory<Tables>();
  if (threadIdx.x < kLevels) tables.code[threadIdx.x] = load_cached(w.code + threadIdx.x);
  if (w.scale_code != nullptr) tables.scale_code[threadIdx.x] = load_cached(w.scale_code + threadIdx.x);
  const float offset = offset_of(w);
  sync_block();
  constexpr int kWidth = kGroups ? group_width<T> : 1;
  const int lanes = 1 << part.lanes_shift, lane = int(threadIdx.x) & (lanes - 1);
  const int64_t step = lanes * kWidth, col_step = int64_t(gridDim.x) * kItems * step;
  const int64_t rows_at_once = kThreads >> part.lanes_shift, row_step = int64_t(gridDim.y) * rows_at_once;
  int64_t row = blockIdx.y * rows_at_once + (threadIdx.x >> part.lanes_shift);
  for (; row < part.rows; row += row_step) {
    for (int64_t col = int64_t(blockIdx.x) * kItems * step + lane * kWidth; col < part.cols; col += col_step)
      decode_items<T, kGroups>(w, part, tables, offset, row, col, step, out);
  }
}

template <class T, bool kGroups>
__global__ void __launch_bounds__(kThreads, 4) dequantize_kernel(Weight w, Part part, T* out) {
  decode_part<T, kGroups>(w, part, out);
}

// An expert without rows is neither read nor written.
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_experts_kernel(Experts experts, const int32_t* offsets, Part part, BFloat16* out, int64_t out_size) {
  const int expert = int(blockIdx.z);
  if (offsets[expert] == (expert == 0 ? 0 : offsets[expert - 1])) return;
  const Weight weight = experts[expert];
  decode_part<BFloat16, true>(weight, part, out + expert * out_size);
}

// Sets how many threads cover a row, and returns the grid.
template <class T, bool kGroups>
dim3 plan(Part& part) {
  constexpr int64_t kWidth = kGroups ? group_width<T> : 1;
  // Up to a warp, as many threads as the row has items; beyond it, as many as leave each thread its kItems.
  for (part.lanes_shift = 0; part.lanes_shift < 8; ++part.lanes_shift) {
    const int64_t lanes = 1 << part.lanes_shift;
    if (lanes * kWidth * (lanes < 32 ? 1 : kItems) >= part.cols) break;
  }
  const int64_t lanes = 1 << part.lanes_shift;
  const int64_t tiles = ceil_div(part.cols, lanes * kItems * kWidth), row_tiles = ceil_div(part.rows, kThreads / lanes);
  const int64_t across = min(tiles, int64_t(kMaxGrid)), down = min(row_tiles, max(kMaxGrid / across, int64_t(1)));
  return dim3(unsigned(across), unsigned(down));
}

template <class T, bool kGroups>
cudaError_t launch_part(const Weight& w, Part part, T* out, cudaStream_t stream) {
  const dim3 grid = plan<T, kGroups>(part);
  return launch(dequantize_kernel<T, kGroups>, grid, kThreads, sizeof(Tables), stream, w, part, out);
}

template <class T>
cudaError_t dequantize_to(const DequantizeArgs& args, Part part, cudaStream_t stream) {
  T* out = static_cast<T*>(args.out);
  const bool has_groups = reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
                          reinterpret_cast<uintptr_t>(args.weight.packed) % 4 == 0 && part.first % 8 == 0 &&
                          (part.rows == 1 || (part.pitch % 8 == 0 && part.stride * sizeof(T) % 16 == 0));
  return has_groups ? launch_part<T, true>(args.weight, part, out, stream)
                    : launch_part<T, false>(args.weight, part, out, stream);
}

}  // namespace

static Part part_of(const DequantizeArgs& args) {
  const int64_t K = args.weight.K;
  Part part{args.row_begin * K + args.col_begin,
            args.row_end - args.row_begin,
            args.col_end - args.col_begin,
            K,
            args.stride,
            0,
            args.keep};
  if (part.cols == K && part.stride == K) {  // contiguous in both: one row, whatever K is
    part.cols *= part.rows;
    part.rows = 1;
  }
  return part;
}

cudaError_t dequantize_experts(const DequantizeExpertsArgs& args, cudaStream_t stream) {
  Part part = part_of(args.first);
  if (part.rows == 0 || part.cols == 0) return cudaSuccess;
  dim3 grid = plan<BFloat16, true>(part);
  grid.z = unsigned(args.experts.count);
  return launch(dequantize_experts_kernel, grid, kThreads, sizeof(Tables), stream, args.experts, args.offsets, part,
                static_cast<BFloat16*>(args.first.out), args.out_size);
}

cudaError_t dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  const Part part = part_of(args);
  if (part.rows == 0 || part.cols == 0) return cudaSuccess;
  switch (args.dtype) {
    case Dtype::kFloat32: return dequantize_to<float>(args, part, stream);
    case Dtype::kBFloat16: return dequantize_to<BFloat16>(args, part, stream);
    case Dtype::kFloat16: return dequantize_to<Float16>(args, part, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nf4::cuda
