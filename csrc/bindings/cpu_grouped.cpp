// The grouped ops for CPU tensors: products of each expert's rows with its own weight, and LoRA's of experts.
#include "../cpu/grouped_lora.h"
#include "cpu_product.h"

namespace {

using nf4::Dtype;
using namespace nf4::binding;

// The offsets of T rows, read: each expert's end is not before its begin, and within T.
const int32_t* checked_offsets(const Tensor& expert_offsets, int64_t T, const Op& op) {
  const int64_t E = checked_expert_count(expert_offsets, op);
  const auto* offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  for (int64_t e = 0, begin = 0; e < E; begin = offsets[e], ++e)
    CHECK(begin <= offsets[e] && offsets[e] <= T, op, ": expert_offsets must not fall and not exceed T=", T, ", got ",
          offsets[e], " after ", begin);
  return offsets;
}

Tensor multiply_grouped(const ProductOp& call, const Tensor& in, const Tensor& expert_offsets, const Experts& experts,
                        const OptionalTensor& bias, const LoraTerm& lora_term) {
  const auto& [op, input_name, depth_name, product] = call;
  const Dtype dtype = checked_input(in, op, input_name, depth_name, product.D);
  CHECK(in.dim() == 2, op, ": ", input_name, " must be 2-D [T, ", depth_name, "], got shape ", Shape{in});
  const Tensor contiguous = as_contiguous(in);
  const int64_t T = in.size(0);
  Tensor out = new_empty(in, {T, product.C}, in.scalar_type());
  cpu::GroupedTerms terms{};
  if (bias.has_value()) terms.bias = checked_data(*bias, in.scalar_type(), experts.count * product.C, op, "bias");
  const LoraTermData term_data = checked_lora_term(lora_term, in.scalar_type(), T, product.C, op, experts.count);
  const std::vector<float> lora_inner = scaled_lora_inner(lora_term, term_data, dtype, T, terms);
  const int32_t* offsets = checked_offsets(expert_offsets, T, op);
  if (product.C == 0) return out;
  Runtime runtime(in);
  cpu::multiply_grouped(runtime, product, experts, terms, offsets, dtype, T, contiguous.const_data_ptr(),
                        out.mutable_data_ptr());
  return out;
}

Tensor grouped_linear(const Tensor& x, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                      const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                      const OptionalTensor& bias, const OptionalTensor& lora_P, const OptionalTensor& lora_B,
                      double scaling) {
  const Op op = cpu_op("grouped_linear");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size, /*takes_int8=*/true);
  return multiply_grouped({op, "x", "K", {/*is_dgrad=*/false, N, K}}, x, expert_offsets, experts, bias,
                          {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor grouped_linear_dgrad(const Tensor& dy, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                            const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                            const OptionalTensor& lora_Q, const OptionalTensor& lora_A, double scaling) {
  const Op op = cpu_op("grouped_linear_dgrad");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size, /*takes_int8=*/true);
  return multiply_grouped({op, "dy", "N", {/*is_dgrad=*/true, K, N}}, dy, expert_offsets, experts, std::nullopt,
                          {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, const void* state) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { body(state, first, last); });
}

Tensor grouped_lora_inner(const Tensor& x, const Tensor& expert_offsets, const Tensor& lora_factor, bool transposed) {
  const Op op = cpu_op("grouped_lora_inner");
  const int64_t E = checked_expert_count(expert_offsets, op);
  CHECK(lora_factor.dim() == 3 && lora_factor.size(0) == E, op, ": lora_factor must have a matrix for each of ", E,
        " experts, got shape ", Shape{lora_factor});
  cpu::LoraInnerArgs args{};
  args.D = lora_factor.size(transposed ? 1 : 2);
  args.rank = lora_factor.size(transposed ? 2 : 1);
  args.dtype = dtype_of(x.scalar_type(), op, "x");
  check_place(x, op, "x");
  CHECK(x.dim() == 2 && x.size(1) == args.D, op, ": x must have shape [T, D=", args.D, "], got ", Shape{x});
  args.M = x.size(0);
  args.factor = checked_data(lora_factor, x.scalar_type(), lora_factor.numel(), op, "lora_factor");
  const int32_t* offsets = checked_offsets(expert_offsets, args.M, op);
  const Tensor contiguous = as_contiguous(x);
  args.x = contiguous.const_data_ptr();
  Tensor out = new_empty(x, {args.M, args.rank}, x.scalar_type());
  if (args.M == 0 || args.rank == 0) return out;
  args.out = out.mutable_data_ptr();
  args.transposed = transposed;
  cpu::multiply_lora_inner(parallel_for, args, offsets, E);
  return out;
}

Tensor grouped_lora_grad(const Tensor& small, const Tensor& wide, const Tensor& expert_offsets, double scaling,
                         ScalarType type, bool transposed) {
  const Op op = cpu_op("grouped_lora_grad");
  cpu::LoraGradArgs args{};
  CHECK(small.dim() == 2 && wide.dim() == 2, op, ": small and wide must be 2-D, got shapes ", Shape{small}, " and ",
        Shape{wide});
  args.dtype = dtype_of(wide.scalar_type(), op, "wide");
  args.out_dtype = dtype_of(type, op, "dtype");
  check_place(wide, op, "wide");
  args.M = wide.size(0);
  args.C = wide.size(1);
  args.rank = small.size(1);
  const void* lora_inner = checked_data(small, wide.scalar_type(), args.M * args.rank, op, "small");
  const int32_t* offsets = checked_offsets(expert_offsets, args.M, op);
  const Tensor contiguous = as_contiguous(wide);
  args.wide = contiguous.const_data_ptr();
  args.transposed = transposed;
  args.scaling = float(scaling);
  const int64_t E = expert_offsets.size(0);
  Tensor out =
      transposed ? new_empty(wide, {E, args.C, args.rank}, type) : new_empty(wide, {E, args.rank, args.C}, type);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  cpu::sum_lora_grads(parallel_for, args, lora_inner, offsets, E);
  return out;
}

}  // namespace

void nf4::binding::register_grouped_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  library.impl("grouped_linear_dgrad", TORCH_BOX(&grouped_linear_dgrad));
  library.impl("grouped_lora_inner", TORCH_BOX(&grouped_lora_inner));
  library.impl("grouped_lora_grad", TORCH_BOX(&grouped_lora_grad));
}
