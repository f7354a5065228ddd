// The ops of nf4kernels/ops.py for CPU tensors: argument checks, allocation, threads, registration. No arithmetic here.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks.h"

namespace {

using nf4::Dtype;
using namespace nf4::binding;

Op cpu_op(const char* name) { return {name, {aoti_torch_device_type_cpu(), -1}}; }

// An output as large as a weight, all of which the op writes. Most of dequantize's time is the page faults of fresh
// memory: 33 MB take 17.5 ms in pages of 4 kB, 4.0 in huge ones (one core of a Zen 4 EPYC, a virtual machine). The
// advice outlives the tensor if this is malloc's heap: what is there later is resident by 2 MB, within this range.
// Not for `packed`, which stays: a virtual machine may have to get its first huge pages back from the host.
Tensor new_large(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
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

// Scratch memory of this thread, kept between calls: a slice and a tile of one product, at most 1 MB.
void* thread_workspace(int64_t bytes) {
  constexpr size_t kLine = 64;
  thread_local std::vector<char> buffer;
  if (buffer.size() < size_t(bytes) + kLine) buffer.resize(size_t(bytes) + kLine);
  void* aligned = buffer.data();
  size_t space = buffer.size();
  return std::align(kLine, size_t(bytes), aligned, space);
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& code, int64_t block_size) {
  const Op op = cpu_op("quantize");
  CHECK(weight.dim() == 2, op, ": weight must be 2-D [N, K], got shape ", Shape{weight});
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor contiguous = torch::stable::contiguous(weight);
  nf4::QuantizeArgs args{};
  args.dtype = dtype_of(weight.scalar_type(), op, "weight");
  args.weight = contiguous.const_data_ptr();
  args.numel = N * K;
  args.code = checked_floats(code, nf4::kLevels, op, "code");
  args.block_size = 1 << block_shift_of(block_size, op);
  const int64_t blocks = ceil_div(N * K, block_size);
  const auto [packed, absmax] = new_quantized(weight, N, K, block_size);
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  const auto run = nf4::active_kernels().quantize;
  torch::stable::parallel_for(0, blocks, ceil_div(16384, block_size),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& scale_code, bool scale_is_e4m3) {
  const Op op = cpu_op("quantize_absmax");
  const int64_t blocks = absmax.numel(), width = int64_t(1) << nf4::kSuperblockShift,
                superblocks = ceil_div(blocks, width);
  const float* in = checked_floats(absmax, blocks, op, "absmax");
  const float* map = checked_floats(scale_code, 256, op, "scale_code");
  const Tensor quantized = new_empty(absmax, absmax.sizes(), ScalarType::Byte);
  const Tensor scale_absmax = new_empty(absmax, {superblocks}, ScalarType::Float);
  const Tensor scale_offset = new_empty(absmax, {}, ScalarType::Float);
  auto* out = static_cast<uint8_t*>(quantized.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale_absmax.mutable_data_ptr());
  const auto each_superblock = [&](auto body) {
    torch::stable::parallel_for(0, superblocks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) body(s, in + s * width, std::min(width, blocks - s * width));
    });
  };

  std::vector<double> sums(static_cast<size_t>(superblocks));
  each_superblock([&](int64_t s, const float* group, int64_t count) { sums[s] = nf4::superblock_sum(group, count); });
  double total = 0;
  for (double sum : sums) total += sum;
  const float offset = blocks == 0 ? 0.f : float(total / double(blocks));
  *static_cast<float*>(scale_offset.mutable_data_ptr()) = offset;

  each_superblock([&](int64_t s, const float* group, int64_t count) {
    scales[s] = nf4::superblock_absmax(group, count, offset);
    if (scale_is_e4m3)
      nf4::quantize_superblock_e4m3(group, count, offset, scales[s], out + s * width);
    else
      nf4::quantize_superblock_sorted(group, count, offset, scales[s], map, out + s * width);
  });
  return {quantized, scale_absmax, scale_offset};
}

// Ŵ[range] into out, whose rows are `stride` elements apart.
void dequantize_into(const nf4::Weight& w, const Range& range, Dtype dtype, void* out, int64_t stride) {
  const auto run = nf4::active_kernels().dequantize;
  const int64_t rows = range.rows(), cols = range.cols();
  auto* bytes = static_cast<char*>(out);
  constexpr int64_t kGrain = 16384;
  if (cols == w.K && stride == cols) {  // one run of weights: split anywhere, on whole cache lines
    const int64_t chunks = ceil_div(rows * cols, kGrain);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kGrain, last = std::min(end * kGrain, rows * cols);
      run(w, range.row_begin * w.K + first, last - first, dtype, bytes + size_t(first) * element_bytes(dtype));
    });
    return;
  }
  torch::stable::parallel_for(0, rows, ceil_div(kGrain, std::max<int64_t>(cols, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      run(w, (range.row_begin + r) * w.K + range.col_begin, cols, dtype,
          bytes + size_t(r * stride) * element_bytes(dtype));
  });
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                  const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                  int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                  ScalarType type) {
  const Op op = cpu_op("dequantize");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, w, op);
  const Dtype dtype = dtype_of(type, op, "dtype");
  Tensor out = new_large(packed, {range.rows(), range.cols()}, type);
  dequantize_into(w, range, dtype, out.mutable_data_ptr(), range.cols());
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin,
                    int64_t col_end, const Tensor& out) {
  const Op op = cpu_op("dequantize");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, w, op);
  const Dtype dtype = dtype_of(out.scalar_type(), op, "out");
  const int64_t stride = checked_out_stride(out, range, op);
  dequantize_into(w, range, dtype, out.mutable_data_ptr(), stride);
}

// out[..., columns] = in[..., depth] times the weight, for linear (columns = N) and linear_dgrad (columns = K).
struct Product {
  Op op;
  const char* input_name;
  const char* depth_name;
  int64_t depth, columns;
  const nf4::GemmKernel* nf4::ProductKernels::* kernel;
};

bool is_linear(const Product& product) { return product.kernel == &nf4::ProductKernels::linear; }

const nf4::ProductKernels& kernels_for(const Product& product, Dtype dtype, const nf4::Weight& w, int64_t rows) {
  const auto& kernels = nf4::active_kernels();
  if (dtype != Dtype::kBFloat16) return kernels.any;
  const bool codes = nf4::has_whole_codes(w) && (is_linear(product) || rows <= nf4::kDgradCodesRows);
  return codes ? kernels.bf16_codes : kernels.bf16;
}

void multiply_rows(const nf4::GemvKernel& gemv, nf4::GemmArgs& args, const void* x, const Tensor& like) {
  const int64_t N = args.weight.N, K = args.weight.K;
  const int64_t panel_bytes = args.rows * ceil_div(K, gemv.depth_step) * gemv.depth_step * gemv.element_bytes;
  Tensor panel = new_empty(like, {&panel_bytes, 1}, ScalarType::Byte);
  gemv.pack(x, args.dtype, args.rows, K, panel.mutable_data_ptr());
  args.panel = panel.const_data_ptr();
  const int64_t grain = ceil_div(65536, std::max<int64_t>(K, 1));  // 5 us of work
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { gemv.run(args, begin, end); });
}

void multiply_tiles(const nf4::GemmKernel& gemm, nf4::GemmArgs& args, const void* in, int64_t depth, int64_t columns,
                    const Tensor& like) {
  const int64_t rows = args.rows, padded = ceil_div(depth, gemm.depth_step) * gemm.depth_step;
  const int64_t panel_bytes = std::min<int64_t>(rows, nf4::kGemmRows) * padded * gemm.element_bytes;
  Tensor panel = new_empty(like, {&panel_bytes, 1}, ScalarType::Byte);
  void* panel_data = panel.mutable_data_ptr();
  args.panel = panel_data;
  const auto* x = static_cast<const char*>(in);
  auto* y = static_cast<char*>(args.out);
  const float* low_rank_x = args.low_rank_x;
  for (int64_t m = 0; m < rows; m += nf4::kGemmRows) {
    args.rows = std::min<int64_t>(rows - m, nf4::kGemmRows);
    const auto* pass = x + size_t(m * depth) * element_bytes(args.dtype);
    torch::stable::parallel_for(
        0, nf4::row_tiles(args.rows, gemm.max_tile_rows), ceil_div(32768, (padded + 1) * gemm.max_tile_rows),
        [&](int64_t begin, int64_t end) { gemm.pack(pass, args.dtype, args.rows, depth, begin, end, panel_data); });
    args.low_rank_x = low_rank_x + m * args.rank;
    args.out = y + size_t(m * columns) * element_bytes(args.dtype);
    torch::stable::parallel_for(0, ceil_div(columns, gemm.tile_cols), 1, [&](int64_t begin, int64_t end) {
      gemm.run(args, begin, end, thread_workspace(gemm.workspace_bytes));
    });
  }
}

// args.out[rows, columns] = in[rows, depth] times args.weight. Scratch memory comes from torch, as `like` does.
void multiply_contiguous(const Product& product, nf4::GemmArgs& args, const void* in, const Tensor& like) {
  const nf4::ProductKernels& kernels = kernels_for(product, args.dtype, args.weight, args.rows);
  if (kernels.codes) args.bf16_code = nf4::rounded_code<nf4::BFloat16>(args.weight.code);
  if (is_linear(product) && args.rows <= nf4::kGemvRows)
    multiply_rows(*kernels.gemv, args, in, like);
  else
    multiply_tiles(*(kernels.*product.kernel), args, in, product.depth, product.columns, like);
}

// The [rows, rank] of LoRA's small factor in fp32, scaled; fills in the rest of what args need of the term.
std::vector<float> scaled_low_rank(const LowRank& term, const LowRankData& data, nf4::GemmArgs& args) {
  args.rank = data.rank;
  args.low_rank_factor = data.factor;
  std::vector<float> scaled(static_cast<size_t>(args.rows * data.rank));
  nf4::scale_low_rank(data.small, args.dtype, args.rows * data.rank, term.scaling, scaled.data());
  return scaled;
}

Tensor multiply(const Product& product, const Tensor& in, const nf4::Weight& w, const OptionalTensor& bias,
                const LowRank& low_rank) {
  const Dtype dtype = checked_input(in, product.op, product.input_name, product.depth_name, product.depth);
  const Tensor contiguous = in.is_contiguous() ? in : torch::stable::contiguous(in);
  std::vector<int64_t> shape(in.sizes().begin(), in.sizes().end());
  shape.back() = product.columns;
  const int64_t rows = rows_of(in);
  Tensor out = new_empty(in, shape, in.scalar_type());

  nf4::GemmArgs args{};
  args.weight = w;
  args.dtype = dtype;
  args.rows = rows;
  args.bias = bias.has_value() ? checked_data(*bias, in.scalar_type(), w.N, product.op, "bias") : nullptr;
  const LowRankData low_rank_data = checked_low_rank(low_rank, in.scalar_type(), rows, product.columns, product.op);
  const std::vector<float> low_rank_x = scaled_low_rank(low_rank, low_rank_data, args);
  args.low_rank_x = low_rank_x.data();
  if (rows == 0 || product.columns == 0) return out;
  args.out = out.mutable_data_ptr();
  multiply_contiguous(product, args, contiguous.const_data_ptr(), in);
  return out;
}

// Expert by expert, each product with all threads, in the bits of a product of its rows alone.
Tensor multiply_grouped(const Product& product, const Tensor& in, const Tensor& expert_offsets,
                        const Experts& experts) {
  const Dtype dtype = checked_input(in, product.op, product.input_name, product.depth_name, product.depth);
  CHECK(in.dim() == 2, product.op, ": ", product.input_name, " must be 2-D [T, ", product.depth_name, "], got shape ",
        Shape{in});
  const Tensor contiguous = in.is_contiguous() ? in : torch::stable::contiguous(in);
  const int64_t T = in.size(0);
  Tensor out = new_empty(in, {T, product.columns}, in.scalar_type());
  const auto* x = static_cast<const char*>(contiguous.const_data_ptr());
  auto* y = static_cast<char*>(out.mutable_data_ptr());
  const size_t x_row = size_t(product.depth) * element_bytes(dtype);
  const size_t y_row = size_t(product.columns) * element_bytes(dtype);
  const auto* offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  const auto begin_of = [&](int64_t e) { return e == 0 ? 0 : int64_t(offsets[e - 1]); };
  for (int64_t e = 0; e < experts.count; ++e)
    CHECK(begin_of(e) <= offsets[e] && offsets[e] <= T, product.op,
          ": expert_offsets must not fall and not exceed T=", T, ", got ", offsets[e], " after ", begin_of(e));
  if (y_row == 0) return out;
  for (int64_t e = 0; e < experts.count; ++e) {
    nf4::GemmArgs args{};
    args.weight = experts[e];
    args.dtype = dtype;
    args.rows = offsets[e] - begin_of(e);
    args.out = y + size_t(begin_of(e)) * y_row;
    if (args.rows > 0) multiply_contiguous(product, args, x + size_t(begin_of(e)) * x_row, in);
  }
  const int64_t end = begin_of(experts.count);
  std::memset(y + size_t(end) * y_row, 0, size_t(T - end) * y_row);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
              const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
              int64_t K, int64_t block_size, const OptionalTensor& bias, const OptionalTensor& lora_P,
              const OptionalTensor& lora_B, double scaling) {
  const Op op = cpu_op("linear");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply({op, "x", "K", K, N, &nf4::ProductKernels::linear}, x, w, bias,
                  {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, const OptionalTensor& lora_Q, const OptionalTensor& lora_A,
                    double scaling) {
  const Op op = cpu_op("linear_dgrad");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply({op, "dy", "N", N, K, &nf4::ProductKernels::linear_dgrad}, dy, w, std::nullopt,
                  {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

Tensor grouped_linear(const Tensor& x, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                      const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size) {
  const Op op = cpu_op("grouped_linear");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply_grouped({op, "x", "K", K, N, &nf4::ProductKernels::linear}, x, expert_offsets, experts);
}

Tensor grouped_linear_dgrad(const Tensor& dy, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                            const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size) {
  const Op op = cpu_op("grouped_linear_dgrad");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply_grouped({op, "dy", "N", N, K, &nf4::ProductKernels::linear_dgrad}, dy, expert_offsets, experts);
}

Tensor lora_grad(const Tensor& small, const Tensor& wide, double scaling, ScalarType type, bool transposed) {
  const Op op = cpu_op("lora_grad");
  nf4::LoraGradArgs args{};
  args.dtype = dtype_of(wide.scalar_type(), op, "wide");
  args.out_dtype = dtype_of(type, op, "dtype");
  check_place(wide, op, "wide");
  CHECK(wide.dim() > 0 && small.dim() > 0, op, ": small and wide must have columns, got shapes ", Shape{small}, " and ",
        Shape{wide});
  args.rows = rows_of(wide);
  args.columns = wide.size(wide.dim() - 1);
  args.rank = small.size(small.dim() - 1);
  const void* values = checked_data(small, wide.scalar_type(), args.rows * args.rank, op, "small");
  const Tensor contiguous = wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
  args.wide = contiguous.const_data_ptr();
  args.transposed = transposed;
  args.scaling = float(scaling);
  const int64_t shape[2] = {transposed ? args.columns : args.rank, transposed ? args.rank : args.columns};
  Tensor out = new_empty(wide, {shape, 2}, type);
  if (args.rank == 0 || args.columns == 0) return out;
  args.out = out.mutable_data_ptr();
  const auto& kernels = nf4::active_kernels();
  const nf4::LoraGradKernel& kernel = *(args.dtype == Dtype::kBFloat16 ? kernels.bf16 : kernels.any).lora_grad;
  args.small_stride = ceil_div(args.rows, 2) * 2;
  std::vector<char> turned(size_t(args.rank * args.small_stride) * element_bytes(kernel.small));
  nf4::transpose_low_rank(values, args.dtype, args.rows, args.rank, args.small_stride, kernel.small, turned.data());
  args.small = turned.data();
  const int64_t grain = ceil_div(1 << 19, std::max<int64_t>(args.rows * args.rank * kernel.tile_cols, 1));
  torch::stable::parallel_for(0, ceil_div(args.columns, kernel.tile_cols), grain,
                              [&](int64_t begin, int64_t end) { kernel.run(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4kernels, CPU, library) {
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_dgrad", TORCH_BOX(&linear_dgrad));
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  library.impl("grouped_linear_dgrad", TORCH_BOX(&grouped_linear_dgrad));
  library.impl("lora_grad", TORCH_BOX(&lora_grad));
}
