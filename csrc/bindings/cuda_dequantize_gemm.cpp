// dequantize + GEMM, for one weight and for experts: dequantize a slice of Ŵ into a workspace, multiply by it with
// torch's own product, and reuse the workspace for the next slice. A slice is rows of Ŵ for linear and columns of Ŵ for
// linear_dgrad, so that each slice gives whole columns of out.
//
//   linear         Ŵ[N, K]                linear_dgrad    Ŵ[N, K]           out[M, N or K]
//                  | slice 0: width rows |                | slice | slice |   | columns of | columns of |
//                  | slice 1             |                |   0   |   1   |   |  slice 0   |  slice 1   |
//
// Compiled with NF4_EXECUTOR as cuda.cpp is.
#include <utility>

#include "cuda_product.h"

namespace {

using namespace nf4::binding;
using nf4::cuda::DequantizeArgs;

#ifdef NF4_EXECUTOR
int64_t slice_bytes = 1;  // so that a test has more than one slice
#else
constexpr int64_t slice_bytes = 24 << 20;  // stays in the L2 of an A100, an RTX 4090 and later; an sm_86 has 6 MB
#endif

// Our products are not differentiable, and torch's refuse to write into `out` where an input requires a gradient.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;

 private:
  bool before_;
};

// torch's own product: out = a @ b^T + bias. A 2-D bias may be out itself: torch then multiplies with beta = 1.
void torch_linear(const Tensor& a, const Tensor& b, const OptionalTensor& bias, const Tensor& out) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION) == 0, "linear: ", torch_said());
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // takes over the returned reference
}

Tensor part(Tensor whole, int64_t dim, int64_t begin, int64_t count) {
  return torch::stable::narrow(whole, dim, begin, count);
}
void copy(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }
void zero(Tensor to) { torch::stable::zero_(to); }

// torch's grouped product: each row of a times its expert's matrix in b[E, depth, columns], by sound offsets. It does
// not write the rows that no expert owns.
Tensor torch_grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(OptionalTensor(offsets)),
                                    torch::stable::detail::from(OptionalTensor()),
                                    torch::stable::detail::from(std::optional<ScalarType>())};
  CHECK(torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION) == 0,
        "grouped_linear: ", torch_said());
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Where dequantize writes columns [begin, begin + width) of out's weight: Ŵ's rows (linear) or columns (linear_dgrad).
DequantizeArgs slice_of(const nf4::Weight& w, bool dgrad, int64_t begin, int64_t width, nf4::Dtype dtype, void* out,
                        int64_t stride) {
  if (dgrad) return {w, 0, w.N, begin, begin + width, dtype, out, stride, true};
  return {w, begin, begin + width, 0, w.K, dtype, out, stride, true};
}

void launch_scaled_copy(const nf4::cuda::ScaledCopyArgs& args, const Op& op, const Launch& launch) {
  check_launch(nf4::cuda::scaled_copy(args, launch.stream), op);
}

// The LoRA term as more of the contraction: [in | inner] times [Ŵ | s B] in linear, [Ŵ ; s A] in linear_dgrad, with
// zeros up to a multiple of 8, which cuBLAS wants for its fast kernels. The scaling goes to the factor: a Q of scaled
// losses has no room for it in fp16. With `ones` a column of ones follows the inner product, for a bias. It copies `in`:
// for experts, as torch's product of experts cannot be added to out, and where only the sum may be rounded.
struct Extended {
  Tensor in;      // [M, depth]
  Tensor factor;  // s B or s A, as long as there is a term
  int64_t rank, ones, depth;
};
Extended extend(const Op& op, const Tensor& in, const nf4::cuda::ProductArgs& args, const OptionalTensor& factor,
                bool ones, const Launch& launch) {
  const int64_t rank = args.rank, own = in.size(1), columns = rank + (ones ? 1 : 0);
  if (columns == 0) return {in, in, 0, 0, own};
  const ScalarType type = in.scalar_type();
  const int64_t extra = ceil_div(columns, 8) * 8, depth = own + extra;
  const Tensor extended = new_empty(in, {args.M, depth}, type);
  copy(part(extended, 1, 0, own), in);
  void* beside = static_cast<char*>(extended.mutable_data_ptr()) + own * int64_t(element_bytes(args.dtype));
  launch_scaled_copy({args.lora_inner, args.dtype, args.M, rank, 1.f, beside, extra, depth}, op, launch);
  if (ones) {
    Tensor column = part(extended, 1, own + rank, 1);
    torch::stable::fill_(column, 1);
  }
  Tensor scaled = in;
  if (rank > 0) {
    const int64_t count = factor->numel();
    scaled = new_empty(in, factor->sizes(), type);
    launch_scaled_copy({args.lora_factor, args.dtype, 1, count, args.scaling, scaled.mutable_data_ptr(), count, count},
                       op, launch);
  }
  return {extended, scaled, rank, ones ? 1 : 0, depth};
}

// The LoRA term and bias of columns [begin, begin + width) of out.
nf4::cuda::LoraTermArgs term_of(const nf4::cuda::ProductArgs& args, bool dgrad, int64_t columns, int64_t begin,
                                int64_t width) {
  const int64_t bytes = int64_t(element_bytes(args.dtype));
  const auto from = [&](const void* whole, int64_t elements) {
    return whole == nullptr ? nullptr : static_cast<const char*>(whole) + elements * bytes;
  };
  nf4::cuda::LoraTermArgs term{};
  term.inner = args.lora_inner;
  term.transposed = !dgrad;  // B[N, rank], A[rank, K]
  term.factor = from(args.lora_factor, dgrad ? begin : begin * args.rank);
  term.factor_stride = dgrad ? columns : args.rank;
  term.bias = from(args.bias, begin);
  term.dtype = args.dtype;
  term.M = args.M;
  term.columns = width;
  term.rank = args.rank;
  term.scaling = args.scaling;
  term.out = static_cast<char*>(args.out) + begin * bytes;
  term.stride = columns;
  return term;
}

}  // namespace

// out begins with the LoRA term, and with the bias, and the products are added to them. The term is then rounded once
// more, by less than Ŵ is, which is within docs/design.md, section 7, unless Ŵ may be exact in the dtype and cancel the
// term, or sums of a few products may: published formats and short contractions take `extend`, and fp16, in which the
// term alone may be too large a number. A bias alone is torch's to add where out is one slice; to a slice of out, whose
// rows are apart, torch would copy it as well.
void nf4::binding::dequantize_gemm(const Product& product, const Launch& launch) {
  const NoGrad no_grad;
  const auto& args = product.args;
  const int64_t columns = product.columns;
  const Tensor in = torch::stable::view(Tensor(product.in), {args.M, product.depth});
  constexpr int64_t kShort = 128;  // at 64 a sum that cancels to 2 % came to 1.04 of the bound, at 128 and more to 0.87
  const bool adds_term = cuda::scales_sums(args.weight) && product.depth >= kShort && args.dtype != Dtype::kFloat16;
  const bool extends = args.rank > 0 && !adds_term;
  const Extended extended = extends ? extend(product.op, in, args, product.lora_term.factor, false, launch)
                                    : Extended{in, in, 0, 0, product.depth};
  const int64_t depth = extended.depth, along = product.dgrad ? 0 : 1;  // the slice's dimension along the contraction
  const int64_t slices = std::max<int64_t>(ceil_div(columns * depth * 2, slice_bytes), 1);
  const int64_t width = ceil_div(ceil_div(columns, slices), 128) * 128;
  const Tensor workspace = new_empty(in, {std::min(width, columns) * depth}, in.scalar_type());
  const Tensor out = torch::stable::view(Tensor(product.out), {args.M, columns});
  const int64_t term_rank = extends ? 0 : args.rank;
  const bool begins_with_term = term_rank > 0 || (args.bias != nullptr && width < columns);
  for (int64_t begin = 0; begin < columns; begin += width) {
    const int64_t count = std::min(width, columns - begin);
    Tensor used = part(workspace, 0, 0, count * depth);
    const Tensor slice =
        product.dgrad ? torch::stable::view(used, {depth, count}) : torch::stable::view(used, {count, depth});
    const DequantizeArgs dequantize =
        slice_of(args.weight, product.dgrad, begin, count, args.dtype, slice.mutable_data_ptr(), slice.size(1));
    check_launch(cuda::dequantize(dequantize, launch.stream), product.op);
    const int64_t end = product.depth + extended.rank;
    if (extended.rank > 0)
      copy(part(slice, along, product.depth, extended.rank), part(extended.factor, 1 - along, begin, count));
    if (end < depth) zero(part(slice, along, end, depth - end));
    const Tensor to = part(out, 1, begin, count);
    OptionalTensor added = product.bias;
    if (begins_with_term) {
      cuda::LoraTermArgs term = term_of(args, product.dgrad, columns, begin, count);
      term.rank = term_rank;
      check_launch(cuda::lora_term(term, launch.stream), product.op);
      added = to;
    }
    torch_linear(extended.in, product.dgrad ? torch::stable::transpose(slice, 0, 1) : slice, added, to);
  }
}

// Here a slice is of all experts that own rows at once, [E, width or depth, depth or width]. Each expert's bias is one
// more row of the contraction, which meets a column of ones: torch's product takes none.
void nf4::binding::dequantize_gemm(const GroupedProduct& product, const Launch& launch) {
#ifdef NF4_EXECUTOR
  constexpr int64_t kSliceBytes = 1;  // so that a test has more than one slice
#else
  constexpr int64_t kSliceBytes = 256 << 20;
#endif
  const NoGrad no_grad;
  const Weight& w = product.args.experts.first;
  const int64_t E = product.args.experts.count, columns = product.columns;
  const Extended extended =
      extend(product.op, product.in, product.args.product, product.lora_term.factor, product.bias.has_value(), launch);
  const int64_t depth = extended.depth, along = product.dgrad ? 1 : 2;  // the slice's dimension along the contraction
  const int64_t width = std::max<int64_t>(kSliceBytes / (E * depth * 2) / 128, 1) * 128;
  const Tensor workspace = new_empty(product.in, {E * depth * std::min(width, columns)}, ScalarType::BFloat16);
  const Tensor offsets = new_empty(product.expert_offsets, {E}, ScalarType::Int);
  cuda::GroupedArgs args = product.args;
  auto* sound = static_cast<int32_t*>(offsets.mutable_data_ptr());
  check_launch(cuda::sound_offsets(args, sound, launch.stream), product.op);
  args.offsets = sound;
  for (int64_t begin = 0; begin < columns; begin += width) {
    const int64_t count = std::min(width, columns - begin);
    const DequantizeArgs first = slice_of(w, product.dgrad, begin, count, Dtype::kBFloat16,
                                          workspace.mutable_data_ptr(), product.dgrad ? count : depth);
    const cuda::DequantizeExpertsArgs dequantize{first, args.experts, sound, count * depth};
    check_launch(cuda::dequantize_experts(dequantize, launch.stream), product.op);
    Tensor used = part(workspace, 0, 0, E * count * depth);
    const Tensor slice =
        product.dgrad ? torch::stable::view(used, {E, depth, count}) : torch::stable::view(used, {E, count, depth});
    int64_t at = product.depth;
    if (extended.rank > 0) copy(part(slice, along, at, extended.rank), part(extended.factor, 3 - along, begin, count));
    at += extended.rank;
    if (extended.ones > 0) {
      Tensor bias = *product.bias;
      copy(part(slice, 2, at, 1), part(torch::stable::view(bias, {E, columns, 1}), 1, begin, count));
    }
    at += extended.ones;
    if (at < depth) zero(part(slice, along, at, depth - at));
    const Tensor factors = product.dgrad ? slice : torch::stable::transpose(slice, 1, 2);
    copy(part(product.out, 1, begin, count), torch_grouped_mm(extended.in, factors, offsets));
  }
  check_launch(cuda::zero_rows_of_none(args, columns, launch.stream), product.op);
}

#ifdef NF4_EXECUTOR
// Slices of so many bytes from now on; returns those before.
extern "C" __attribute__((visibility("default"))) int64_t nf4kernels_executor_slices(int64_t bytes) {
  return std::exchange(slice_bytes, bytes);
}
#endif
