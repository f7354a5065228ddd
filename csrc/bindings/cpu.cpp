// The ops of nf4kernels/ops.py for CPU tensors: argument checks, allocation, registration. csrc/cpu does the arithmetic
// and splits it over torch's threads.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "../cpu/dequantize.h"
#include "../cpu/grouped_lora.h"
#include "../cpu/product.h"
#include "checks.h"

namespace {

namespace cpu = nf4::cpu;
using nf4::Dtype;
using namespace nf4::binding;

Op cpu_op(const char* name) { return {name, {aoti_torch_device_type_cpu(), -1}}; }

// An output as large as a weight, all of which the op writes. Most of dequantize's time is the page faults of fresh
// memory: 33 MB take 17.5 ms in pages of 4 kB, 4.0 in huge ones (one core of a Zen 4 EPYC, a virtual machine). Where
// malloc gives its heap, the advice outlives the tensor: what comes to lie there is resident in steps of 2 MB.
// `packed` does not take this way, for it stays: a virtual machine may have to get its first huge pages from the host.
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

// What the drivers of csrc/cpu need of torch, see dequantize.h and product.h.
struct Threads {
  template <class Body>
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  }
};
struct Runtime : Threads {
  const Tensor& like;
  std::optional<Tensor> panel;

  explicit Runtime(const Tensor& in) : like(in) {}
  void* allocate(int64_t bytes) {
    panel.reset();
    return panel.emplace(new_empty(like, {&bytes, 1}, ScalarType::Byte)).mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& code, int64_t block_size) {
  const Op op = cpu_op("quantize");
  CHECK(weight.dim() == 2, op, ": weight must be 2-D [N, K], got shape ", Shape{weight});
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor contiguous = torch::stable::contiguous(weight);
  cpu::QuantizeArgs args{};
  args.dtype = dtype_of(weight.scalar_type(), op, "weight");
  args.weight = contiguous.const_data_ptr();
  args.numel = N * K;
  args.code = checked_floats(code, nf4::kLevels, op, "code");
  args.block_size = 1 << block_shift_of(block_size, op);
  const auto [packed, absmax] = new_quantized(weight, N, K, block_size);
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  const auto run = cpu::active_kernels().quantize;
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

// The offsets of T rows, read: each expert's end is not before its begin, and within T.
const int32_t* checked_offsets(const Tensor& expert_offsets, int64_t T, const Op& op) {
  const int64_t E = checked_expert_count(expert_offsets, op);
  const auto* offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  for (int64_t e = 0, begin = 0; e < E; begin = offsets[e], ++e)
    CHECK(begin <= offsets[e] && offsets[e] <= T, op, ": expert_offsets must not fall and not exceed T=", T, ", got ",
          offsets[e], " after ", begin);
  return offsets;
}

// One op of a product: what its messages call the input and D, and its sizes.
struct ProductOp {
  Op op;
  const char* input_name;
  const char* depth_name;
  cpu::Product product;
};

// The inner product of the LoRA term in fp32, scaled; fills in the rest of what args need of the term.
template <class Args>
std::vector<float> scaled_lora_inner(const LoraTerm& term, const LoraTermData& data, Dtype dtype, int64_t M,
                                     Args& args) {
  args.rank = data.rank;
  args.lora_factor = data.factor;
  std::vector<float> scaled(static_cast<size_t>(M * data.rank));
  cpu::scale_lora_inner(data.inner, dtype, M * data.rank, term.scaling, scaled.data());
  args.lora_inner = scaled.data();
  return scaled;
}

Tensor multiply(const ProductOp& call, const Tensor& in, const nf4::Weight& w, const OptionalTensor& bias,
                const LoraTerm& lora_term) {
  const auto& [op, input_name, depth_name, product] = call;
  cpu::GemmArgs args{};
  args.weight = w;
  args.dtype = checked_input(in, op, input_name, depth_name, product.D);
  args.M = rows_of(in);
  const Tensor contiguous = in.is_contiguous() ? in : torch::stable::contiguous(in);
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

Tensor multiply_grouped(const ProductOp& call, const Tensor& in, const Tensor& expert_offsets, const Experts& experts,
                        const OptionalTensor& bias, const LoraTerm& lora_term) {
  const auto& [op, input_name, depth_name, product] = call;
  const Dtype dtype = checked_input(in, op, input_name, depth_name, product.D);
  CHECK(in.dim() == 2, op, ": ", input_name, " must be 2-D [T, ", depth_name, "], got shape ", Shape{in});
  const Tensor contiguous = in.is_contiguous() ? in : torch::stable::contiguous(in);
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

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
              const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
              int64_t K, int64_t block_size, const OptionalTensor& bias, const OptionalTensor& lora_P,
              const OptionalTensor& lora_B, double scaling) {
  const Op op = cpu_op("linear");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply({op, "x", "K", {/*is_dgrad=*/false, N, K}}, x, w, bias,
                  {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, const OptionalTensor& lora_Q, const OptionalTensor& lora_A,
                    double scaling) {
  const Op op = cpu_op("linear_dgrad");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply({op, "dy", "N", {/*is_dgrad=*/true, K, N}}, dy, w, std::nullopt,
                  {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

Tensor grouped_linear(const Tensor& x, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                      const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                      const OptionalTensor& bias, const OptionalTensor& lora_P, const OptionalTensor& lora_B,
                      double scaling) {
  const Op op = cpu_op("grouped_linear");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply_grouped({op, "x", "K", {/*is_dgrad=*/false, N, K}}, x, expert_offsets, experts, bias,
                          {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor grouped_linear_dgrad(const Tensor& dy, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                            const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                            const OptionalTensor& lora_Q, const OptionalTensor& lora_A, double scaling) {
  const Op op = cpu_op("grouped_linear_dgrad");
  const auto experts = checked_experts(op, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                                       N, K, block_size);
  return multiply_grouped({op, "dy", "N", {/*is_dgrad=*/true, K, N}}, dy, expert_offsets, experts, std::nullopt,
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
  const Tensor contiguous = wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
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
  const Tensor contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);
  args.x = contiguous.const_data_ptr();
  Tensor out = new_empty(x, {args.M, args.rank}, x.scalar_type());
  if (args.M == 0 || args.rank == 0) return out;
  args.out = out.mutable_data_ptr();
  cpu::multiply_lora_inner(Threads(), args, offsets, E, transposed);
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
  const Tensor contiguous = wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
  args.wide = contiguous.const_data_ptr();
  args.transposed = transposed;
  args.scaling = float(scaling);
  const int64_t E = expert_offsets.size(0);
  Tensor out =
      transposed ? new_empty(wide, {E, args.C, args.rank}, type) : new_empty(wide, {E, args.rank, args.C}, type);
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  cpu::sum_lora_grads(Threads(), args, lora_inner, offsets, E);
  return out;
}

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
    for (int64_t i = 0; i < routing.count(); ++i) {
      const int64_t p = args.positions[i], row = p < 0 ? ~p : p;
      CHECK(row < routing.count(), op, ": positions must be rows below ", routing.count(), " or ~ of one, got ", p);
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
  library.impl("grouped_lora_inner", TORCH_BOX(&grouped_lora_inner));
  library.impl("grouped_lora_grad", TORCH_BOX(&grouped_lora_grad));
  library.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  library.impl("combine_experts", TORCH_BOX(&combine_experts));
  library.impl("combine_experts_dgrad", TORCH_BOX(&combine_experts_dgrad));
  library.impl("combine_experts_wgrad", TORCH_BOX(&combine_experts_wgrad));
}
