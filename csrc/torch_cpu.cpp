// The ops of nf4kernels/ops.py for CPU tensors: argument checks, allocation, threads, registration. No arithmetic here.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace {

using nf4::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define CHECK(condition, ...) STD_TORCH_CHECK(condition, "nf4kernels.", __VA_ARGS__)

struct Shape {  // for messages
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << ']';
}

Dtype dtype_of(ScalarType type, const char* op, const char* name) {
  CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
        " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  if (type == ScalarType::Float) return Dtype::kFloat32;
  return type == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
}

size_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty({shape.begin(), shape.size()}, type);
}

// On the CPU like `like`. The products allocate by this C function: stable::empty looks its op up by name, 0.5 us more.
Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle out;
  CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), int64_t(shape.size()), &dtype, nullptr, nullptr, 0, nullptr,
                                  &out) == 0,
        "new_empty: torch could not allocate ", shape.size(), " dimensions of ", torch::headeronly::toString(type));
  return Tensor(out);
}

// An output as large as a weight, all of which the op writes. Most of dequantize's time is the page faults of fresh
// memory: 33 MB take 17.5 ms in pages of 4 kB, 4.0 in huge ones (one core of a Zen 4 EPYC, a virtual machine). The
// advice outlives the tensor if this is malloc's heap: what is there later is resident by 2 MB, within this range.
// Not for `packed`, which stays: a virtual machine may have to get its first huge pages back from the host.
Tensor empty_output(std::initializer_list<int64_t> shape, ScalarType type) {
  Tensor out = empty(shape, type);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + size_t(out.numel()) * out.element_size()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a refusal is no error
#endif
  return out;
}

// A contiguous CPU tensor of `count` elements of `type`.
const void* checked_data(const Tensor& tensor, ScalarType type, int64_t count, const char* op, const char* name) {
  CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", torch::headeronly::toString(type), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
  CHECK(tensor.numel() == count, op, ": ", name, " must have ", count, " elements, got shape ", Shape{tensor});
  CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  return tensor.const_data_ptr();
}
const float* checked_floats(const Tensor& tensor, int64_t count, const char* op, const char* name) {
  return static_cast<const float*>(checked_data(tensor, ScalarType::Float, count, op, name));
}

int block_shift_of(int64_t block_size, const char* op) {
  for (int shift = 5; shift <= 12; ++shift)
    if (block_size == int64_t(1) << shift) return shift;
  CHECK(false, op, ": block_size must be a power of two from 32 to 4096, got ", block_size);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

nf4::Weight checked_weight(const char* op, const Tensor& packed, const Tensor& absmax,
                           const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                           const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size) {
  CHECK(N >= 0 && K >= 0, op, ": N and K must not be negative, got ", N, " and ", K);
  CHECK(K == 0 || N <= (std::numeric_limits<int64_t>::max() - nf4::kMaxBlockSize) / K, op,
        ": N and K must have a product within 63 bits, got ", N, " and ", K);
  nf4::Weight w{};
  w.N = N;
  w.K = K;
  w.block_shift = block_shift_of(block_size, op);
  const int64_t blocks = ceil_div(N * K, block_size);
  w.packed = static_cast<const uint8_t*>(checked_data(packed, ScalarType::Byte, ceil_div(N * K, 2), op, "packed"));
  w.code = checked_floats(code, nf4::kLevels, op, "code");
  const bool double_quant = scale_code.has_value();
  CHECK(scale_absmax.has_value() == double_quant && scale_offset.has_value() == double_quant, op,
        ": scale_absmax, scale_offset and scale_code must be given together");
  if (!double_quant) {
    w.absmax = checked_floats(absmax, blocks, op, "absmax");
    return w;
  }
  w.absmax_u8 = static_cast<const uint8_t*>(checked_data(absmax, ScalarType::Byte, blocks, op, "absmax"));
  const int64_t superblocks = ceil_div(blocks, int64_t(1) << nf4::kSuperblockShift);
  w.scale_absmax = checked_floats(*scale_absmax, superblocks, op, "scale_absmax");
  w.scale_offset = checked_floats(*scale_offset, 1, op, "scale_offset");
  w.scale_code = checked_floats(*scale_code, 256, op, "scale_code");
  return w;
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
  CHECK(weight.dim() == 2, "quantize: weight must be 2-D [N, K], got shape ", Shape{weight});
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor contiguous = torch::stable::contiguous(weight);
  nf4::QuantizeArgs args{};
  args.dtype = dtype_of(weight.scalar_type(), "quantize", "weight");
  args.weight = contiguous.const_data_ptr();
  args.numel = N * K;
  args.code = checked_floats(code, nf4::kLevels, "quantize", "code");
  args.block_size = 1 << block_shift_of(block_size, "quantize");
  const int64_t blocks = ceil_div(N * K, block_size);
  Tensor packed = K % 2 == 0 ? empty({N, K / 2}, ScalarType::Byte) : empty({ceil_div(N * K, 2)}, ScalarType::Byte);
  Tensor absmax =
      K % block_size == 0 ? empty({N, K / block_size}, ScalarType::Float) : empty({blocks}, ScalarType::Float);
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  const auto run = nf4::active_kernels().quantize;
  torch::stable::parallel_for(0, blocks, ceil_div(16384, block_size),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& scale_code, bool scale_is_e4m3) {
  const int64_t blocks = absmax.numel(), width = int64_t(1) << nf4::kSuperblockShift,
                superblocks = ceil_div(blocks, width);
  const float* in = checked_floats(absmax, blocks, "quantize_absmax", "absmax");
  const float* map = checked_floats(scale_code, 256, "quantize_absmax", "scale_code");
  Tensor quantized = torch::stable::empty(absmax.sizes(), ScalarType::Byte);
  Tensor scale_absmax = empty({superblocks}, ScalarType::Float), scale_offset = empty({}, ScalarType::Float);
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

struct Range {
  int64_t row_begin, row_end, col_begin, col_end;
};

// Ŵ[range] into out, whose rows are `stride` elements apart.
void dequantize_into(const nf4::Weight& w, const Range& range, Dtype dtype, void* out, int64_t stride) {
  const auto run = nf4::active_kernels().dequantize;
  const int64_t rows = range.row_end - range.row_begin, cols = range.col_end - range.col_begin;
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

void check_range(const Range& r, int64_t N, int64_t K) {
  CHECK(0 <= r.row_begin && r.row_begin <= r.row_end && r.row_end <= N, "dequantize: rows must be a range within 0..",
        N, ", got ", r.row_begin, "..", r.row_end);
  CHECK(0 <= r.col_begin && r.col_begin <= r.col_end && r.col_end <= K, "dequantize: cols must be a range within 0..",
        K, ", got ", r.col_begin, "..", r.col_end);
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                  const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                  int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                  ScalarType type) {
  const auto w =
      checked_weight("dequantize", packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, N, K);
  const Dtype dtype = dtype_of(type, "dequantize", "dtype");
  Tensor out = empty_output({row_end - row_begin, col_end - col_begin}, type);
  dequantize_into(w, range, dtype, out.mutable_data_ptr(), col_end - col_begin);
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin,
                    int64_t col_end, const Tensor& out) {
  const auto w =
      checked_weight("dequantize", packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, N, K);
  const Dtype dtype = dtype_of(out.scalar_type(), "dequantize", "out");
  const int64_t rows = row_end - row_begin, cols = col_end - col_begin;
  CHECK(out.is_cpu(), "dequantize: out must be on the CPU");
  CHECK(out.dim() == 2 && out.size(0) == rows && out.size(1) == cols, "dequantize: out must have shape [", rows, ", ",
        cols, "], got ", Shape{out});
  if (rows == 0 || cols == 0) return;
  CHECK(cols == 1 || out.stride(1) == 1, "dequantize: out must be contiguous in its last dimension");
  CHECK(rows == 1 || out.stride(0) >= cols, "dequantize: out's rows must not overlap");
  dequantize_into(w, range, dtype, out.mutable_data_ptr(), rows == 1 ? cols : out.stride(0));
}

// out[..., columns] = in[..., depth] times the weight, for linear (columns = N) and linear_dgrad (columns = K).
struct Product {
  const char* op;
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

void multiply_rows(const nf4::GemvKernel& gemv, nf4::GemmArgs& args, const Tensor& x) {
  const int64_t N = args.weight.N, K = args.weight.K;
  const int64_t panel_bytes = args.rows * ceil_div(K, gemv.depth_step) * gemv.depth_step * gemv.element_bytes;
  Tensor panel = new_empty(x, {&panel_bytes, 1}, ScalarType::Byte);
  gemv.pack(x.const_data_ptr(), args.dtype, args.rows, K, panel.mutable_data_ptr());
  args.panel = panel.const_data_ptr();
  const int64_t grain = ceil_div(65536, std::max<int64_t>(K, 1));  // 5 us of work
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { gemv.run(args, begin, end); });
}

void multiply_tiles(const nf4::GemmKernel& gemm, nf4::GemmArgs& args, const Tensor& in, int64_t depth,
                    int64_t columns) {
  const int64_t rows = args.rows, padded = ceil_div(depth, gemm.depth_step) * gemm.depth_step;
  const int64_t panel_bytes = std::min<int64_t>(rows, nf4::kGemmRows) * padded * gemm.element_bytes;
  Tensor panel = new_empty(in, {&panel_bytes, 1}, ScalarType::Byte);
  void* panel_data = panel.mutable_data_ptr();
  args.panel = panel_data;
  const auto* x = static_cast<const char*>(in.const_data_ptr());
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

// LoRA's term: out += scaling * small @ factor^T for linear (small P, factor B), scaling * small @ factor for dgrad.
struct LowRank {
  const OptionalTensor& small;
  const OptionalTensor& factor;
  float scaling;
  const char* small_name;
  const char* factor_name;
  int64_t rank_dim;  // of factor
};

// The [rows, rank] of `small` in fp32, scaled; fills in the rest of what args need of the term.
std::vector<float> checked_low_rank(const Product& product, const LowRank& term, const Tensor& in, int64_t rows,
                                    nf4::GemmArgs& args) {
  CHECK(term.small.has_value() == term.factor.has_value(), product.op, ": ", term.small_name, " and ", term.factor_name,
        " must be given together");
  if (!term.factor.has_value()) return {};
  const Tensor &small = *term.small, &factor = *term.factor;
  CHECK(factor.dim() == 2 && factor.size(1 - term.rank_dim) == product.columns, product.op, ": ", term.factor_name,
        " must have ", product.columns, term.rank_dim == 1 ? " rows" : " columns", ", got shape ", Shape{factor});
  const int64_t rank = factor.size(term.rank_dim);
  CHECK(small.dim() > 0 && small.size(small.dim() - 1) == rank, product.op, ": ", term.small_name,
        " must have r=", rank, " columns as ", term.factor_name, " has, got shape ", Shape{small});
  const ScalarType type = in.scalar_type();
  const void* values = checked_data(small, type, rows * rank, product.op, term.small_name);
  args.rank = rank;
  args.low_rank_factor = checked_data(factor, type, product.columns * rank, product.op, term.factor_name);
  std::vector<float> scaled(static_cast<size_t>(rows * rank));
  nf4::scale_low_rank(values, args.dtype, rows * rank, term.scaling, scaled.data());
  return scaled;
}

Tensor multiply(const Product& product, const Tensor& in, const nf4::Weight& w, const OptionalTensor& bias,
                const LowRank& low_rank) {
  const Dtype dtype = dtype_of(in.scalar_type(), product.op, product.input_name);
  CHECK(in.is_cpu(), product.op, ": ", product.input_name, " must be on the CPU");
  CHECK(in.dim() > 0 && in.size(in.dim() - 1) == product.depth, product.op, ": ", product.input_name, " must have ",
        product.depth_name, "=", product.depth, " columns, got shape ", Shape{in});
  const Tensor contiguous = in.is_contiguous() ? in : torch::stable::contiguous(in);
  std::vector<int64_t> shape(in.sizes().begin(), in.sizes().end());
  shape.back() = product.columns;
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
  Tensor out = new_empty(in, shape, in.scalar_type());

  nf4::GemmArgs args{};
  args.weight = w;
  args.dtype = dtype;
  args.rows = rows;
  args.bias = bias.has_value() ? checked_data(*bias, in.scalar_type(), w.N, product.op, "bias") : nullptr;
  const std::vector<float> low_rank_x = checked_low_rank(product, low_rank, in, rows, args);
  args.low_rank_x = low_rank_x.data();
  if (rows == 0 || product.columns == 0) return out;
  args.out = out.mutable_data_ptr();
  const nf4::ProductKernels& kernels = kernels_for(product, dtype, w, rows);
  if (kernels.codes) args.bf16_code = nf4::bf16_code(w.code);
  if (is_linear(product) && rows <= nf4::kGemvRows)
    multiply_rows(*kernels.gemv, args, contiguous);
  else
    multiply_tiles(*(kernels.*product.kernel), args, contiguous, product.depth, product.columns);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
              const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
              int64_t K, int64_t block_size, const OptionalTensor& bias, const OptionalTensor& lora_P,
              const OptionalTensor& lora_B, double scaling) {
  const auto w =
      checked_weight("linear", packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply({"linear", "x", "K", K, N, &nf4::ProductKernels::linear}, x, w, bias,
                  {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, const OptionalTensor& lora_Q, const OptionalTensor& lora_A,
                    double scaling) {
  const auto w =
      checked_weight("linear_dgrad", packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply({"linear_dgrad", "dy", "N", N, K, &nf4::ProductKernels::linear_dgrad}, dy, w, std::nullopt,
                  {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

Tensor lora_grad(const Tensor& small, const Tensor& wide, double scaling, ScalarType type, bool transposed) {
  nf4::LoraGradArgs args{};
  args.dtype = dtype_of(wide.scalar_type(), "lora_grad", "wide");
  args.out_dtype = dtype_of(type, "lora_grad", "dtype");
  CHECK(wide.is_cpu(), "lora_grad: wide must be on the CPU");
  CHECK(wide.dim() > 0 && small.dim() > 0, "lora_grad: small and wide must have columns, got shapes ", Shape{small},
        " and ", Shape{wide});
  args.rows = rows_of(wide);
  args.columns = wide.size(wide.dim() - 1);
  args.rank = small.size(small.dim() - 1);
  const void* values = checked_data(small, wide.scalar_type(), args.rows * args.rank, "lora_grad", "small");
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
  library.impl("lora_grad", TORCH_BOX(&lora_grad));
}
