// The ops of nf4kernels/ops.py for CPU tensors: argument checks, allocation, registration. csrc/cpu does the arithmetic
// and splits it over torch's threads. The grouped products are in cpu_grouped.cpp, routing in cpu_routing.cpp.
#include <tuple>
#include <vector>

#include "../cpu/dequantize.h"
#include "cpu_product.h"

namespace {

using nf4::Dtype;
using namespace nf4::binding;

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& code, int64_t block_size) {
  const Op op = cpu_op("quantize");
  CHECK(weight.dim() == 2, op, ": weight must be 2-D [N, K], got shape ", Shape{weight});
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor contiguous = as_contiguous(weight);
  cpu::QuantizeArgs args{};
  args.dtype = dtype_of(weight.scalar_type(), op, "weight");
  args.weight = contiguous.const_data_ptr();
  args.numel = N * K;
  const bool is_int8 = code.numel() == kInt8Levels;
  args.code = checked_floats(code, is_int8 ? kInt8Levels : nf4::kLevels, op, "code");
  if (is_int8) args.code = nullptr;
  args.block_size = 1 << block_shift_of(block_size, op);
  const auto [packed, absmax] = new_quantized(weight, N, K, block_size, is_int8);
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  const auto run = is_int8 ? cpu::active_kernels().int8->quantize : cpu::active_kernels().quantize;
  torch::stable::parallel_for(0, ceil_div(N * K, block_size), ceil_div(cpu::kDecodeGrain, block_size),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& scale_code, bool scale_is_e4m3) {
  const Op op = cpu_op("quantize_absmax");
  cpu::QuantizeAbsmaxArgs args{};
  args.blocks = absmax.numel();
  args.absmax = checked_floats(absmax, args.blocks, op, "absmax");
  args.scale_code = checked_floats(scale_code, 256, op, "scale_code");
  args.scale_is_e4m3 = scale_is_e4m3;
  const int64_t superblocks = cpu::superblocks_of(args.blocks);
  const Tensor quantized = new_empty(absmax, absmax.sizes(), ScalarType::Byte);
  const Tensor scale_absmax = new_empty(absmax, {superblocks}, ScalarType::Float);
  const Tensor scale_offset = new_empty(absmax, {}, ScalarType::Float);
  args.quantized = static_cast<uint8_t*>(quantized.mutable_data_ptr());
  args.scale_absmax = static_cast<float*>(scale_absmax.mutable_data_ptr());
  std::vector<double> sums(static_cast<size_t>(superblocks));
  torch::stable::parallel_for(0, superblocks, cpu::kSuperblockGrain,
                              [&](int64_t begin, int64_t end) { cpu::sum_superblocks(args, begin, end, sums.data()); });
  args.scale_offset = cpu::mean_absmax(args, sums.data());
  *static_cast<float*>(scale_offset.mutable_data_ptr()) = args.scale_offset;
  torch::stable::parallel_for(0, superblocks, cpu::kSuperblockGrain,
                              [&](int64_t begin, int64_t end) { cpu::quantize_superblocks(args, begin, end); });
  return {quantized, scale_absmax, scale_offset};
}

// Ŵ[range] into out, whose rows are `stride` elements apart.
void dequantize_into(const nf4::Weight& w, const Range& range, Dtype dtype, void* out, int64_t stride) {
  const int64_t first = range.row_begin * w.K + range.col_begin;
  cpu::dequantize_rectangle(Threads(), w, first, range.rows(), range.cols(), dtype, out, stride);
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                  const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                  int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                  ScalarType type) {
  const Op op = cpu_op("dequantize");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                                /*takes_int8=*/true);
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
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                                /*takes_int8=*/true);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, w, op);
  const Dtype dtype = dtype_of(out.scalar_type(), op, "out");
  const int64_t stride = checked_out_stride(out, range, op);
  dequantize_into(w, range, dtype, out.mutable_data_ptr(), stride);
}

Tensor multiply(const ProductOp& call, const Tensor& in, const nf4::Weight& w, const OptionalTensor& bias,
                const LoraTerm& lora_term) {
  const auto& [op, input_name, depth_name, product] = call;
  cpu::GemmArgs args{};
  args.weight = w;
  args.dtype = checked_input(in, op, input_name, depth_name, product.D);
  args.M = rows_of(in);
  const Tensor contiguous = as_contiguous(in);
  std::vector<int64_t> shape(in.sizes().begin(), in.sizes().end());
  shape.back() = product.C;
  Tensor out = new_empty(in, shape, in.scalar_type());
  args.bias = bias.has_value() ? checked_data(*bias, in.scalar_type(), w.N, op, "bias") : nullptr;
  const LoraTermData term_data = checked_lora_term(lora_term, in.scalar_type(), args.M, product.C, op);
  const std::vector<float> lora_inner = scaled_lora_inner(lora_term, term_data, args.dtype, args.M, args);
  if (args.M == 0 || product.C == 0) return out;
  args.out = out.mutable_data_ptr();
  Runtime runtime(in);
  cpu::multiply(runtime, product, args, contiguous.const_data_ptr());
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
              const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
              int64_t K, int64_t block_size, const OptionalTensor& bias, const OptionalTensor& lora_P,
              const OptionalTensor& lora_B, double scaling) {
  const Op op = cpu_op("linear");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                                /*takes_int8=*/true);
  return multiply({op, "x", "K", {/*is_dgrad=*/false, N, K}}, x, w, bias,
                  {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, const OptionalTensor& lora_Q, const OptionalTensor& lora_A,
                    double scaling) {
  const Op op = cpu_op("linear_dgrad");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                                /*takes_int8=*/true);
  return multiply({op, "dy", "N", {/*is_dgrad=*/true, K, N}}, dy, w, std::nullopt,
                  {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

Tensor lora_grad(const Tensor& small, const Tensor& wide, double scaling, ScalarType type, bool transposed) {
  const Op op = cpu_op("lora_grad");
  cpu::LoraGradArgs args{};
  args.dtype = dtype_of(wide.scalar_type(), op, "wide");
  args.out_dtype = dtype_of(type, op, "dtype");
  check_place(wide, op, "wide");
  CHECK(wide.dim() > 0 && small.dim() > 0, op, ": small and wide must have columns, got shapes ", Shape{small}, " and ",
        Shape{wide});
  args.M = rows_of(wide);
  args.C = wide.size(wide.dim() - 1);
  args.rank = small.size(small.dim() - 1);
  const void* lora_inner = checked_data(small, wide.scalar_type(), args.M * args.rank, op, "small");
  const Tensor contiguous = as_contiguous(wide);
  args.wide = contiguous.const_data_ptr();
  args.transposed = transposed;
  args.scaling = float(scaling);
  const int64_t shape[2] = {transposed ? args.C : args.rank, transposed ? args.rank : args.C};
  Tensor out = new_empty(wide, {shape, 2}, type);
  if (args.rank == 0 || args.C == 0) return out;
  args.out = out.mutable_data_ptr();
  const cpu::LoraGradKernel& kernel = *cpu::active_kernels()[cpu::choose_lora(args.dtype)].lora_grad;
  args.lora_inner_stride = ceil_div(args.M, 2) * 2;
  std::vector<char> inner(size_t(args.rank * args.lora_inner_stride) * element_bytes(kernel.inner_dtype));
  cpu::transpose_lora_inner(lora_inner, args.dtype, args.M, args.rank, args.lora_inner_stride, kernel.inner_dtype,
                            inner.data());
  args.lora_inner = inner.data();
  torch::stable::parallel_for(0, ceil_div(args.C, kernel.tile_c),
                              cpu::lora_grad_grain(args.M, args.rank, kernel.tile_c),
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
  register_grouped_ops(library);
  register_routing_ops(library);
}
