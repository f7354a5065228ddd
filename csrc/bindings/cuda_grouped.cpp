// grouped_linear and grouped_linear_dgrad for CUDA tensors: checks, allocation, registration. The offsets stay on the
// device: nothing here reads them, so no call waits for it. Compiled with NF4_EXECUTOR as cuda.cpp is.
#include "cuda_checks.h"

namespace {

using nf4::cuda::GroupedArgs;
using nf4::cuda::Path;
using namespace nf4::binding;

// grouped_linear: in x [T, K], out [T, N]. grouped_linear_dgrad: in dY [T, N], out dX [T, K].
struct GroupedProduct {
  Op op;
  bool dgrad;
  Tensor in, out, expert_offsets;
  int64_t depth, columns;
  GroupedArgs args;  // of all T rows
};

#ifdef NF4_EXECUTOR
// So that a test has more than one of each.
constexpr int64_t kLeastRows = 16, kPartialBytes = 16 << 10, kPanelBytes = 1;
#else
constexpr int64_t kLeastRows = 1 << 10, kPartialBytes = 256 << 20, kPanelBytes = 256 << 20;
#endif

// One of csrc/cuda's grouped kernels, as many rows at a time as have room for their partial sums.
void multiply_fused(const GroupedProduct& product, const nf4::cuda::Choice& choice, const Launch& launch) {
  constexpr int64_t kMostRows = 1 << 20;  // the kernels number them by 32 bits
  const auto run = choice.path == Path::kSmall ? nf4::cuda::grouped_linear_small
                   : choice.path == Path::kTiled
                       ? (product.dgrad ? nf4::cuda::grouped_linear_dgrad_tiled : nf4::cuda::grouped_linear_tiled)
                       : (product.dgrad ? nf4::cuda::grouped_linear_dgrad_any : nf4::cuda::grouped_linear_any);
  GroupedArgs grouped = product.args;
  nf4::cuda::ProductArgs& args = grouped.product;
  const int64_t rows = args.M, bytes = int64_t(element_bytes(args.dtype));
  int64_t at_once = std::min(rows, kMostRows);
  args.splits = choice.splits;
  if (choice.path != Path::kAny) args.known = known_codes.rounded(args.dtype);
  OptionalTensor partial;
  if (args.splits > 1) {
    at_once = std::min(at_once, std::max(kPartialBytes / (args.splits * product.columns * 4), kLeastRows));
    partial = new_empty(product.in, {args.splits, at_once, product.columns}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  for (int64_t& m = grouped.first_row; m < rows; m += at_once) {
    args.M = std::min(rows - m, at_once);
    args.x = static_cast<const char*>(product.args.product.x) + m * product.depth * bytes;
    args.out = static_cast<char*>(product.args.product.out) + m * product.columns * bytes;
    check_launch(run(grouped, launch.stream), product.op);
    if (args.splits > 1) add_splits(args, product.columns, launch, product.op);
  }
}

// torch's own product of experts, rows of a by the b [E, depth, columns] that sound offsets say; rows of none are not
// written.
Tensor torch_grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(OptionalTensor(offsets)),
                                    torch::stable::detail::from(OptionalTensor()),
                                    torch::stable::detail::from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A panel of the weights of all experts that have rows at a time, in memory that every panel reuses, and torch's product
// with it: rows of Ŵ for grouped_linear, columns for grouped_linear_dgrad, so that each gives whole columns of out.
void multiply_panels(const GroupedProduct& product, const Launch& launch) {
  const NoGrad no_grad;
  const nf4::Weight& w = product.args.experts.first;
  const int64_t E = product.args.experts.count, depth = product.depth, columns = product.columns;
  const int64_t width = std::max<int64_t>(kPanelBytes / (E * depth * 2) / 128, 1) * 128;
  const Tensor memory = new_empty(product.in, {E * depth * std::min(width, columns)}, ScalarType::BFloat16);
  const Tensor offsets = new_empty(product.expert_offsets, {E}, ScalarType::Int);
  GroupedArgs args = product.args;
  auto* sound = static_cast<int32_t*>(offsets.mutable_data_ptr());
  check_launch(nf4::cuda::sound_offsets(args, sound, launch.stream), product.op);
  args.offsets = sound;
  for (int64_t begin = 0; begin < columns; begin += width) {
    const int64_t count = std::min(width, columns - begin);
    nf4::cuda::DequantizeExpertsArgs panel{};
    panel.first =
        product.dgrad
            ? nf4::cuda::DequantizeArgs{w, 0, w.N, begin, begin + count, nf4::Dtype::kBFloat16, nullptr, count}
            : nf4::cuda::DequantizeArgs{w, begin, begin + count, 0, w.K, nf4::Dtype::kBFloat16, nullptr, w.K};
    panel.first.out = memory.mutable_data_ptr();
    panel.experts = args.experts;
    panel.offsets = sound;
    panel.out_size = count * depth;
    check_launch(nf4::cuda::dequantize_experts(panel, launch.stream), product.op);
    Tensor used = memory;
    used = torch::stable::narrow(used, 0, 0, E * count * depth);
    used = product.dgrad ? torch::stable::view(used, {E, depth, count})
                         : torch::stable::transpose(torch::stable::view(used, {E, count, depth}), 1, 2);
    Tensor out = product.out;
    out = torch::stable::narrow(out, 1, begin, count);
    torch::stable::copy_(out, torch_grouped_mm(product.in, used, offsets));
  }
  check_launch(nf4::cuda::zero_rows_of_none(args, columns, launch.stream), product.op);
}

Tensor multiply(const Op& op, bool dgrad, const Tensor& in, const Tensor& expert_offsets, const Experts& experts) {
  const nf4::Weight& w = experts.first;
  const int64_t depth = dgrad ? w.N : w.K, columns = dgrad ? w.K : w.N;
  GroupedArgs grouped{};
  nf4::cuda::ProductArgs& args = grouped.product;
  args.weight = w;
  args.dtype = checked_input(in, op, dgrad ? "dy" : "x", dgrad ? "N" : "K", depth);
  CHECK(in.dim() == 2, op, ": ", dgrad ? "dy must be 2-D [T, N]" : "x must be 2-D [T, K]", ", got shape ", Shape{in});
  args.M = in.size(0);
  grouped.experts = experts;
  grouped.offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());

  const Launch launch(op);
  const Tensor out = new_empty(in, {args.M, columns}, in.scalar_type());
  if (args.M == 0 || columns == 0) return out;
  if (experts.count == 0 || depth == 0) {
    Tensor zeros = out;
    torch::stable::zero_(zeros);
    return out;
  }
  const Tensor contiguous = in.is_contiguous() ? in : torch::stable::contiguous(in);
  args.x = contiguous.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const auto problem = problem_of(op, dgrad, args, experts.count);
  grouped.rows_each = nf4::cuda::rows_each(problem);
  const GroupedProduct product{op, dgrad, contiguous, out, expert_offsets, depth, columns, grouped};
  const nf4::cuda::Choice choice = choice_for(problem, op);
  if (choice.path == Path::kPanel)
    multiply_panels(product, launch);
  else
    multiply_fused(product, choice, launch);
  return out;
}

Tensor grouped_linear(const Tensor& x, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                      const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size) {
  const Op op = op_at("grouped_linear", x, "x");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply(op, false, x, expert_offsets, experts);
}

Tensor grouped_linear_dgrad(const Tensor& dy, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                            const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size) {
  const Op op = op_at("grouped_linear_dgrad", dy, "dy");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply(op, true, dy, expert_offsets, experts);
}

}  // namespace

void nf4::binding::register_grouped_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  library.impl("grouped_linear_dgrad", TORCH_BOX(&grouped_linear_dgrad));
}
