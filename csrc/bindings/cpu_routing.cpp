// sort_by_expert, combine_experts and its gradients for CPU tensors.
#include <cstring>
#include <tuple>

#include "cpu_product.h"

namespace {

using namespace nf4::binding;

// One of csrc/cpu/combine_experts.h's kernels over all tokens.
void route(cpu::CombineFn run, const cpu::CombineArgs& args, int64_t T) {
  Threads::parallel_for(0, T, cpu::combine_grain(args.top_k, args.H),
                        [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& x, const Tensor& top_k_index, int64_t experts) {
  const Op op = cpu_op("sort_by_expert");
  const Routing routing = checked_choices(x, top_k_index, experts, op);
  const Tensor tokens = as_contiguous(x), index = as_contiguous(top_k_index);
  const Tensor offsets = new_empty(x, {experts}, ScalarType::Int);
  const Tensor positions = new_empty(x, {routing.T, routing.top_k}, ScalarType::Int);
  const auto* experts_of = static_cast<const int64_t*>(index.const_data_ptr());
  auto* to = static_cast<int32_t*>(positions.mutable_data_ptr());
  const int64_t wrong =
      cpu::sort_by_expert(experts_of, routing.count(), experts, static_cast<int32_t*>(offsets.mutable_data_ptr()), to);
  CHECK(wrong < 0, op, ": top_k_index must be in 0..", experts, ", got ", experts_of[wrong], " in row ",
        wrong / routing.top_k);
  Tensor rows = new_large(x, {routing.count(), routing.H}, x.scalar_type());
  if (rows.numel() == 0) return {rows, offsets, positions};
  const int64_t bytes = routing.H * int64_t(x.element_size());
  const auto* from = static_cast<const char*>(tokens.const_data_ptr());
  auto* out = static_cast<char*>(rows.mutable_data_ptr());
  Threads::parallel_for(0, routing.count(), cpu::combine_grain(1, routing.H), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (to[i] < 0)
        std::memset(out + ~to[i] * bytes, 0, size_t(bytes));
      else
        std::memcpy(out + to[i] * bytes, from + i / routing.top_k * bytes, size_t(bytes));
    }
  });
  return {rows, offsets, positions};
}

// positions and weights as the kernels take them: in range, and weights in fp32.
struct Routes {
  Tensor positions;
  std::vector<float> weights;

  Routes(const Tensor& given, const OptionalTensor& given_weights, const Routing& routing, const Op& op,
         cpu::CombineArgs& args)
      : positions(as_contiguous(given)), weights(size_t(routing.count()), 1.f) {
    args.top_k = routing.top_k;
    args.H = routing.H;
    args.positions = static_cast<const int32_t*>(positions.const_data_ptr());
    std::vector<bool> is_given(size_t(routing.count()));  // a row that none is would get no gradient, not even 0
    for (int64_t i = 0; i < routing.count(); ++i) {
      const int64_t p = args.positions[i], row = p < 0 ? ~p : p;
      CHECK(row < routing.count() && !is_given[size_t(row)], op, ": positions must have each row below ",
            routing.count(), ", or ~ of it, once, got ", p);
      is_given[size_t(row)] = true;
    }
    if (given_weights.has_value()) {
      const Tensor own = as_contiguous(*given_weights);
      cpu::scale_lora_inner(own.const_data_ptr(), dtype_of(own.scalar_type(), op, "weights"), routing.count(), 1.f,
                            weights.data());
    }
    args.weights = weights.data();
  }
};

Tensor combine_experts(const Tensor& rows, const Tensor& positions, const OptionalTensor& weights, ScalarType type) {
  const Op op = cpu_op("combine_experts");
  const Routing routing = checked_routing(rows, "rows", /*is_rows=*/true, positions, weights, op);
  cpu::CombineArgs args{};
  const Routes routes(positions, weights, routing, op, args);
  const Tensor own = as_contiguous(rows);
  args.rows = own.const_data_ptr();
  args.rows_dtype = dtype_of(rows.scalar_type(), op, "rows");
  args.out_dtype = dtype_of(type, op, "dtype");
  Tensor out = new_empty(rows, {routing.T, routing.H}, type);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  route(cpu::active_kernels().combine_experts->combine, args, routing.T);
  return out;
}

Tensor combine_experts_dgrad(const Tensor& dout, const Tensor& positions, const OptionalTensor& weights,
                             ScalarType type) {
  const Op op = cpu_op("combine_experts_dgrad");
  const Routing routing = checked_routing(dout, "dout", /*is_rows=*/false, positions, weights, op);
  cpu::CombineArgs args{};
  const Routes routes(positions, weights, routing, op, args);
  const Tensor tokens = as_contiguous(dout);
  args.tokens = tokens.const_data_ptr();
  args.tokens_dtype = dtype_of(dout.scalar_type(), op, "dout");
  args.out_dtype = dtype_of(type, op, "dtype");
  Tensor drows = new_large(dout, {routing.count(), routing.H}, type);
  if (drows.numel() == 0) return drows;
  args.out = drows.mutable_data_ptr();
  route(cpu::active_kernels().combine_experts->dgrad, args, routing.T);
  return drows;
}

Tensor combine_experts_wgrad(const Tensor& dout, const Tensor& rows, const Tensor& positions, ScalarType type) {
  const Op op = cpu_op("combine_experts_wgrad");
  const Routing routing = checked_routing(dout, "dout", /*is_rows=*/false, positions, std::nullopt, op);
  checked_routing(rows, "rows", /*is_rows=*/true, positions, std::nullopt, op);
  CHECK(rows.size(1) == routing.H, op, ": rows must have H=", routing.H, " columns as dout, got shape ", Shape{rows});
  cpu::CombineArgs args{};
  const Routes routes(positions, std::nullopt, routing, op, args);
  const Tensor tokens = as_contiguous(dout), own = as_contiguous(rows);
  args.tokens = tokens.const_data_ptr();
  args.tokens_dtype = dtype_of(dout.scalar_type(), op, "dout");
  args.rows = own.const_data_ptr();
  args.rows_dtype = dtype_of(rows.scalar_type(), op, "rows");
  args.out_dtype = dtype_of(type, op, "dtype");
  Tensor out = new_empty(dout, {routing.T, routing.top_k}, type);
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) route(cpu::active_kernels().combine_experts->wgrad, args, routing.T);
  return out;
}

}  // namespace

void nf4::binding::register_routing_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  library.impl("combine_experts", TORCH_BOX(&combine_experts));
  library.impl("combine_experts_dgrad", TORCH_BOX(&combine_experts_dgrad));
  library.impl("combine_experts_wgrad", TORCH_BOX(&combine_experts_wgrad));
}
