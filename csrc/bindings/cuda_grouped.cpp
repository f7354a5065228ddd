// The grouped ops for CUDA tensors: checks, allocation, registration. The offsets stay on the
// device; nothing here reads them, so no call waits for the device. Compiled with NF4_EXECUTOR as cuda.cpp is.
#include "cuda_int8.h"
#include "cuda_product.h"

namespace {

using nf4::cuda::GroupedArgs;
using nf4::cuda::Path;
using namespace nf4::binding;

#ifdef NF4_EXECUTOR
constexpr int64_t kLeastRows = 16, kPartialBytes = 16 << 10;  // so that a test has more than one launch
#else
constexpr int64_t kLeastRows = 1 << 10, kPartialBytes = 256 << 20;
#endif

// One of csrc/cuda's grouped kernels, as many rows a launch as kPartialBytes of partial sums allow.
void multiply_fused(const GroupedProduct& product, const nf4::cuda::Choice& choice, const Launch& launch) {
  constexpr int64_t kMostRows = 1 << 20;  // the kernels number rows by 32 bits
  const auto run = choice.path == Path::kSmall ? nf4::cuda::grouped_linear_small
                   : choice.path == Path::kTiled
                       ? (product.dgrad ? nf4::cuda::grouped_linear_dgrad_tiled : nf4::cuda::grouped_linear_tiled)
                       : (product.dgrad ? nf4::cuda::grouped_linear_dgrad_any : nf4::cuda::grouped_linear_any);
  GroupedArgs grouped = product.args;
  nf4::cuda::ProductArgs& args = grouped.product;
  const int64_t rows = args.M, bytes = int64_t(element_bytes(args.dtype));
  int64_t at_once = std::min(rows, kMostRows);
  args.tile = choice.tile;
  args.splits = choice.splits;
  if (choice.path != Path::kAny) args.known = known_codes.rounded(args.dtype);
  OptionalTensor partial;
  if (args.splits > 1) {
    at_once = std::min(at_once, std::max(kPartialBytes / (args.splits * product.columns * 4), kLeastRows));
    partial = new_empty(product.in, {args.splits, at_once, product.columns}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  for (int64_t& m = grouped.m_begin; m < rows; m += at_once) {
    args.M = std::min(rows - m, at_once);
    args.x = static_cast<const char*>(product.args.product.x) + m * product.depth * bytes;
    args.out = static_cast<char*>(product.args.product.out) + m * product.columns * bytes;
    if (args.rank > 0)
      args.lora_inner = static_cast<const char*>(product.args.product.lora_inner) + m * args.rank * bytes;
    check_launch(run(grouped, launch.stream), product.op);
    if (args.splits > 1) add_splits(args, nullptr, product.columns, launch, product.op);
  }
}

Tensor multiply(const Op& op, bool dgrad, const Tensor& in, const Tensor& expert_offsets, const Experts& experts,
                const OptionalTensor& bias, const LoraTerm& lora_term) {
  const nf4::Weight& w = experts.first;
  const int64_t depth = dgrad ? w.N : w.K, columns = dgrad ? w.K : w.N;
  GroupedArgs grouped{};
  nf4::cuda::ProductArgs& args = grouped.product;
  args.weight = w;
  args.dtype = checked_input(in, op, dgrad ? "dy" : "x", dgrad ? "N" : "K", depth);
  CHECK(in.dim() == 2, op, ": ", dgrad ? "dy must be 2-D [T, N]" : "x must be 2-D [T, K]", ", got shape ", Shape{in});
  args.M = in.size(0);
  args.bias = bias.has_value() ? checked_data(*bias, in.scalar_type(), experts.count * w.N, op, "bias") : nullptr;
  const LoraTermData term = checked_lora_term(lora_term, in.scalar_type(), args.M, columns, op, experts.count);
  args.rank = term.rank;
  args.lora_inner = term.inner;
  args.lora_factor = term.factor;
  args.scaling = lora_term.scaling;
  grouped.experts = experts;
  grouped.offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());

  const Launch launch(op);
  const Tensor out = new_empty(in, {args.M, columns}, in.scalar_type());
  if (args.M == 0 || columns == 0) return out;
  if (experts.count == 0 || (depth == 0 && args.rank == 0 && args.bias == nullptr)) {
    Tensor zeros = out;
    torch::stable::zero_(zeros);
    return out;
  }
  const Tensor contiguous = as_contiguous(in);
  args.x = contiguous.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const auto problem = problem_of(op, dgrad, args, experts.count);
  grouped.m_per_expert = nf4::cuda::m_per_weight(problem);
  const GroupedProduct product{op, dgrad, contiguous, out, expert_offsets, bias, lora_term, depth, columns, grouped};
  const nf4::cuda::Choice choice = choice_for(problem, op);
  if (choice.path == Path::kDequantizeGemm)
    dequantize_gemm(product, launch);
  else
    multiply_fused(product, choice, launch);
  return out;
}

Tensor grouped_linear(const Tensor& x, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                      const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                      const OptionalTensor& bias, const OptionalTensor& lora_P, const OptionalTensor& lora_B,
                      double scaling) {
  if (is_int8(code))
    return call_int8<Tensor>("nf4kernels_int8::grouped_linear", x, expert_offsets, packed, absmax, scale_absmax,
                             scale_offset, code, scale_code, N, K, block_size, bias, lora_P, lora_B, scaling);
  const Op op = op_at("grouped_linear", x, "x");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply(op, false, x, expert_offsets, experts, bias, {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor grouped_linear_dgrad(const Tensor& dy, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                            const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                            const OptionalTensor& lora_Q, const OptionalTensor& lora_A, double scaling) {
  if (is_int8(code))
    return call_int8<Tensor>("nf4kernels_int8::grouped_linear_dgrad", dy, expert_offsets, packed, absmax, scale_absmax,
                             scale_offset, code, scale_code, N, K, block_size, lora_Q, lora_A, scaling);
  const Op op = op_at("grouped_linear_dgrad", dy, "dy");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply(op, true, dy, expert_offsets, experts, std::nullopt,
                  {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

Tensor grouped_lora_inner(const Tensor& x, const Tensor& expert_offsets, const Tensor& lora_factor, bool transposed) {
  const Op op = op_at("grouped_lora_inner", x, "x");
  nf4::cuda::GroupedLoraInnerArgs args{};
  args.experts = checked_expert_count(expert_offsets, op);
  CHECK(lora_factor.dim() == 3 && lora_factor.size(0) == args.experts, op,
        ": lora_factor must have a matrix for each of ", args.experts, " experts, got shape ", Shape{lora_factor});
  args.depth = lora_factor.size(transposed ? 1 : 2);
  args.rank = lora_factor.size(transposed ? 2 : 1);
  args.dtype = dtype_of(x.scalar_type(), op, "x");
  CHECK(x.dim() == 2 && x.size(1) == args.depth, op, ": x must have shape [T, D=", args.depth, "], got ", Shape{x});
  args.M = x.size(0);
  args.factor = checked_data(lora_factor, x.scalar_type(), lora_factor.numel(), op, "lora_factor");
  args.transposed = transposed;
  args.offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  const Launch launch(op);
  const Tensor out = new_empty(x, {args.M, args.rank}, x.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor contiguous = as_contiguous(x);
  args.x = contiguous.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const bool tensor_cores = args.dtype != nf4::Dtype::kFloat32 && args.depth % 8 == 0 &&
                            args.depth <= nf4::cuda::kLoraInnerDepth && is_aligned({args.x, args.factor});
  const auto run = tensor_cores ? nf4::cuda::grouped_lora_inner : nf4::cuda::grouped_lora_inner_any;
  check_launch(run(args, launch.stream), op);
  return out;
}

Tensor grouped_lora_grad(const Tensor& small, const Tensor& wide, const Tensor& expert_offsets, double scaling,
                         ScalarType type, bool transposed) {
  const Op op = op_at("grouped_lora_grad", wide, "wide");
  nf4::cuda::GroupedLoraGradArgs args{};
  nf4::cuda::LoraGradArgs& grad = args.grad;
  CHECK(small.dim() == 2 && wide.dim() == 2, op, ": small and wide must be 2-D, got shapes ", Shape{small}, " and ",
        Shape{wide});
  grad.dtype = dtype_of(wide.scalar_type(), op, "wide");
  grad.out_dtype = dtype_of(type, op, "dtype");
  grad.M = wide.size(0);
  grad.columns = wide.size(1);
  grad.rank = small.size(1);
  grad.small = checked_data(small, wide.scalar_type(), grad.M * grad.rank, op, "small");
  grad.scaling = float(scaling);
  grad.transposed = transposed;
  const int64_t E = args.experts = checked_expert_count(expert_offsets, op);
  args.offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  const Launch launch(op);
  const Tensor out = transposed ? new_empty(wide, {E, grad.columns, grad.rank}, type)
                                : new_empty(wide, {E, grad.rank, grad.columns}, type);
  if (out.numel() == 0) return out;
  const Tensor contiguous = as_contiguous(wide);
  grad.wide = contiguous.const_data_ptr();
  grad.out = out.mutable_data_ptr();
  const bool tensor_cores = grad.dtype != nf4::Dtype::kFloat32 && grad.columns % 8 == 0 && is_aligned({grad.wide});
  const auto run = tensor_cores ? nf4::cuda::grouped_lora_grad : nf4::cuda::grouped_lora_grad_any;
  check_launch(run(args, launch.stream), op);
  return out;
}

}  // namespace

void nf4::binding::register_grouped_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  library.impl("grouped_linear_dgrad", TORCH_BOX(&grouped_linear_dgrad));
  library.impl("grouped_lora_inner", TORCH_BOX(&grouped_lora_inner));
  library.impl("grouped_lora_grad", TORCH_BOX(&grouped_lora_grad));
}
