// sort_by_expert, combine_experts and its gradients for CUDA tensors: checks, allocation, registration. Indices and
// positions stay on the device; nothing here reads them. Compiled with NF4_EXECUTOR as cuda.cpp is.
#include "cuda_product.h"

namespace {

using nf4::Dtype;
using nf4::cuda::CombineArgs;
using namespace nf4::binding;

CombineArgs args_of(const Routing& routing, const Tensor& positions, const OptionalTensor& weights, const Op& op) {
  CombineArgs args{};
  args.T = routing.T;
  args.top_k = routing.top_k;
  args.H = routing.H;
  args.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  if (weights.has_value()) {
    args.weights = weights->const_data_ptr();
    args.weights_dtype = dtype_of(weights->scalar_type(), op, "weights");
  }
  return args;
}

OptionalTensor contiguous_weights(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& x, const Tensor& top_k_index, int64_t experts) {
  const Op op = op_at("sort_by_expert", x, "x");
  const Routing routing = checked_choices(x, top_k_index, experts, op);
  const Launch launch(op);
  const Tensor tokens = as_contiguous(x), index = as_contiguous(top_k_index);
  const Tensor offsets = new_empty(x, {experts}, ScalarType::Int);
  const Tensor positions = new_empty(x, {routing.T, routing.top_k}, ScalarType::Int);
  const Tensor rows = new_empty(x, {routing.count(), routing.H}, x.scalar_type());
  const Tensor counts = new_empty(x, {nf4::cuda::sort_chunks(routing.count()), experts + 1}, ScalarType::Int);
  const nf4::cuda::SortArgs args{static_cast<const int64_t*>(index.const_data_ptr()),
                                 routing.count(),
                                 int(experts),
                                 static_cast<int32_t*>(offsets.mutable_data_ptr()),
                                 static_cast<int32_t*>(positions.mutable_data_ptr()),
                                 static_cast<int32_t*>(counts.mutable_data_ptr())};
  check_launch(nf4::cuda::sort_by_expert(args, launch.stream), op);
  if (rows.numel() == 0) return {rows, offsets, positions};
  CombineArgs gather = args_of(routing, positions, std::nullopt, op);
  gather.tokens = tokens.const_data_ptr();
  gather.out = rows.mutable_data_ptr();
  gather.tokens_dtype = gather.out_dtype = dtype_of(x.scalar_type(), op, "x");
  gather.aligned = is_aligned({gather.tokens, gather.out});
  check_launch(nf4::cuda::combine_experts_dgrad(gather, launch.stream), op);
  return {rows, offsets, positions};
}

Tensor combine_experts(const Tensor& rows, const Tensor& positions, const OptionalTensor& weights, ScalarType type) {
  const Op op = op_at("combine_experts", rows, "rows");
  const Routing routing = checked_routing(rows, "rows", /*is_rows=*/true, positions, weights, op);
  const Launch launch(op);
  const Tensor own = as_contiguous(rows), own_positions = as_contiguous(positions);
  const OptionalTensor own_weights = contiguous_weights(weights);
  CombineArgs args = args_of(routing, own_positions, own_weights, op);
  args.rows = own.const_data_ptr();
  args.rows_dtype = dtype_of(rows.scalar_type(), op, "rows");
  args.out_dtype = dtype_of(type, op, "dtype");
  const Tensor out = new_empty(rows, {routing.T, routing.H}, type);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  args.aligned = is_aligned({args.rows, args.out});
  check_launch(nf4::cuda::combine_experts(args, launch.stream), op);
  return out;
}

Tensor combine_experts_dgrad(const Tensor& dout, const Tensor& positions, const OptionalTensor& weights,
                             ScalarType type) {
  const Op op = op_at("combine_experts_dgrad", dout, "dout");
  const Routing routing = checked_routing(dout, "dout", /*is_rows=*/false, positions, weights, op);
  const Launch launch(op);
  const Tensor tokens = as_contiguous(dout), own_positions = as_contiguous(positions);
  const OptionalTensor own_weights = contiguous_weights(weights);
  CombineArgs args = args_of(routing, own_positions, own_weights, op);
  args.tokens = tokens.const_data_ptr();
  args.tokens_dtype = dtype_of(dout.scalar_type(), op, "dout");
  args.out_dtype = dtype_of(type, op, "dtype");
  const Tensor drows = new_empty(dout, {routing.count(), routing.H}, type);
  if (drows.numel() == 0) return drows;
  args.out = drows.mutable_data_ptr();
  args.aligned = is_aligned({args.tokens, args.out});
  check_launch(nf4::cuda::combine_experts_dgrad(args, launch.stream), op);
  return drows;
}

Tensor combine_experts_wgrad(const Tensor& dout, const Tensor& rows, const Tensor& positions, ScalarType type) {
  const Op op = op_at("combine_experts_wgrad", dout, "dout");
  const Routing routing = checked_routing(dout, "dout", /*is_rows=*/false, positions, std::nullopt, op);
  checked_routing(rows, "rows", /*is_rows=*/true, positions, std::nullopt, op);
  CHECK(rows.size(1) == routing.H, op, ": rows must have H=", routing.H, " columns as dout, got shape ", Shape{rows});
  const Launch launch(op);
  const Tensor tokens = as_contiguous(dout), own = as_contiguous(rows), own_positions = as_contiguous(positions);
  CombineArgs args = args_of(routing, own_positions, std::nullopt, op);
  args.tokens = tokens.const_data_ptr();
  args.tokens_dtype = dtype_of(dout.scalar_type(), op, "dout");
  args.rows = own.const_data_ptr();
  args.rows_dtype = dtype_of(rows.scalar_type(), op, "rows");
  args.out_dtype = dtype_of(type, op, "dtype");
  const Tensor out = new_empty(dout, {routing.T, routing.top_k}, type);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  args.aligned = is_aligned({args.tokens, args.rows});
  check_launch(nf4::cuda::combine_experts_wgrad(args, launch.stream), op);
  return out;
}

}  // namespace

void nf4::binding::register_routing_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  library.impl("combine_experts", TORCH_BOX(&combine_experts));
  library.impl("combine_experts_dgrad", TORCH_BOX(&combine_experts_dgrad));
  library.impl("combine_experts_wgrad", TORCH_BOX(&combine_experts_wgrad));
}
