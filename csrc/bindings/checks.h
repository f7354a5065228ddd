// What the bindings share: the checks of an op's arguments, and the allocation of its outputs. A message names the op,
// the argument, what was expected and what came. No check allocates or reads a tensor's data.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>

#include "../format.h"

#define CHECK(condition, ...) STD_TORCH_CHECK(condition, "nf4kernels.", __VA_ARGS__)

namespace nf4::binding {

using nf4::ceil_div;
using nf4::Experts;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Place {
  int32_t type, index;

  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};
inline std::ostream& operator<<(std::ostream& out, const Place& place) {
  if (place.type == aoti_torch_device_type_cpu()) return out << "the CPU";
  if (place.type == aoti_torch_device_type_cuda()) return out << "cuda:" << place.index;
  return out << (place.type == aoti_torch_device_type_meta() ? "meta" : "another device");
}

inline Place place_of(const Tensor& tensor) {
  Place place;
  CHECK(aoti_torch_get_device_type(tensor.get(), &place.type) == 0 &&
            aoti_torch_get_device_index(tensor.get(), &place.index) == 0,
        "place_of: torch does not tell where a tensor is");
  return place;
}

// One call of an op: the name for its messages, and where all its tensors must be.
struct Op {
  const char* name;
  Place place;
};
inline std::ostream& operator<<(std::ostream& out, const Op& op) { return out << op.name; }

struct Shape {  // for messages
  const Tensor& tensor;
};
struct Sizes {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};
inline std::ostream& operator<<(std::ostream& out, const Sizes& given) {
  out << '[';
  for (size_t d = 0; d < given.sizes.size(); ++d) out << (d ? ", " : "") << given.sizes[d];
  return out << ']';
}
inline std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << Sizes{shape.tensor.sizes()}; }

inline size_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// How many rows [..., columns] has.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

// In torch since 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// What torch said of its C function that failed last, or what else stands to reason.
inline std::string torch_said(const char* otherwise = "torch did not say why") {
  const char* said =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  return said && *said ? said : otherwise;
}

// On the device of `like`, by a C function: stable::empty looks its op up by name, 0.5 us more. Programs that try smaller
// batches know an exhausted memory by torch's words.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle out;
  CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), int64_t(shape.size()), &dtype, nullptr, nullptr, 0, nullptr,
                                  &out) == 0,
        "new_empty: ", torch_said(like.is_cuda() ? "CUDA out of memory." : "can't allocate memory"), " (", Sizes{shape},
        " of ", torch::headeronly::toString(type), ")");
  return Tensor(out);
}
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return new_empty(like, {shape.begin(), shape.size()}, type);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor copy = new_empty(tensor, tensor.sizes(), tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// packed and absmax of a weight [N, K], in the shapes of the format.
inline std::tuple<Tensor, Tensor> new_quantized(const Tensor& weight, int64_t N, int64_t K, int64_t block_size,
                                                bool is_int8 = false) {
  Tensor packed = is_int8      ? new_empty(weight, {N, K}, ScalarType::Byte)
                  : K % 2 == 0 ? new_empty(weight, {N, K / 2}, ScalarType::Byte)
                               : new_empty(weight, {ceil_div(N * K, 2)}, ScalarType::Byte);
  Tensor absmax = K % block_size == 0 ? new_empty(weight, {N, K / block_size}, ScalarType::Float)
                                      : new_empty(weight, {ceil_div(N * K, block_size)}, ScalarType::Float);
  return {packed, absmax};
}

inline Dtype dtype_of(ScalarType type, const Op& op, const char* name) {
  CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
        " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  if (type == ScalarType::Float) return Dtype::kFloat32;
  return type == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
}

inline void check_place(const Tensor& tensor, const Op& op, const char* name) {
  const Place place = place_of(tensor);
  CHECK(place == op.place, op, ": ", name, " must be on ", op.place, ", got ", place);
}

// A contiguous tensor of `count` elements of `type`, where the op runs.
inline const void* checked_data(const Tensor& tensor, ScalarType type, int64_t count, const Op& op, const char* name) {
  check_place(tensor, op, name);
  CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", torch::headeronly::toString(type), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
  CHECK(tensor.numel() == count, op, ": ", name, " must have ", count, " elements, got shape ", Shape{tensor});
  CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  return tensor.const_data_ptr();
}
inline const float* checked_floats(const Tensor& tensor, int64_t count, const Op& op, const char* name) {
  return static_cast<const float*>(checked_data(tensor, ScalarType::Float, count, op, name));
}

inline int block_shift_of(int64_t block_size, const Op& op) {
  for (int shift = 4; shift <= 12; ++shift)
    if (block_size == int64_t(1) << shift) return shift;
  CHECK(false, op, ": block_size must be a power of two from 16 to 4096, got ", block_size);
}

// By the tensors that a weight has; another type of absmax is refused as no fp32.
inline Scales scales_of(ScalarType absmax, bool has_scale_code, bool double_quant) {
  if (has_scale_code) return double_quant ? Scales::kDouble : Scales::kCodes;
  if (absmax == ScalarType::BFloat16) return Scales::kBFloat16;
  return absmax == ScalarType::Half ? Scales::kFloat16 : Scales::kFloat32;
}

constexpr int64_t kInt8Levels = 256;  // of `code`, which says by its size that a byte is a weight

// Of int8, where `takes_int8`, w.code is null: csrc/cpu alone knows of it.
inline Experts checked_weights(const Op& op, int64_t E, const Tensor& packed, const Tensor& absmax,
                               const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset,
                               const Tensor& code, const OptionalTensor& scale_code, int64_t N, int64_t K,
                               int64_t block_size, bool takes_int8 = false) {
  CHECK(N >= 0 && K >= 0, op, ": N and K must not be negative, got ", N, " and ", K);
  const int64_t most = std::numeric_limits<int64_t>::max() / std::max<int64_t>(E, 1) - kMaxBlockSize;
  CHECK(K == 0 || N <= most / K, op, ": N and K must have a product within 63 bits, got ", N, " and ", K);
  Experts experts{};
  experts.count = E;
  Weight& w = experts.first;
  w.N = N;
  w.K = K;
  w.block_shift = block_shift_of(block_size, op);
  const int64_t blocks = experts.blocks = ceil_div(N * K, block_size);
  const bool is_int8 = takes_int8 && code.numel() == kInt8Levels;
  const int64_t bytes = E * (is_int8 ? N * K : ceil_div(N * K, 2));
  w.packed = static_cast<const uint8_t*>(checked_data(packed, ScalarType::Byte, bytes, op, "packed"));
  w.code = checked_floats(code, is_int8 ? kInt8Levels : kLevels, op, "code");
  if (is_int8) w.code = nullptr;
  const bool double_quant = scale_absmax.has_value();
  CHECK(scale_offset.has_value() == double_quant && (scale_code.has_value() || !double_quant), op,
        ": scale_absmax and scale_offset must be given together, and with scale_code");
  w.scales = scales_of(absmax.scalar_type(), scale_code.has_value(), double_quant);
  const ScalarType type = w.scales == Scales::kBFloat16  ? ScalarType::BFloat16
                          : w.scales == Scales::kFloat16 ? ScalarType::Half
                          : w.scales == Scales::kFloat32 ? ScalarType::Float
                                                         : ScalarType::Byte;
  w.absmax = checked_data(absmax, type, E * blocks, op, "absmax");
  if (!has_codes(w.scales)) return experts;
  const bool is_of_each = w.scales == Scales::kCodes;  // expert
  w.scale_code = checked_floats(*scale_code, is_of_each ? E * kScaleCodes : kScaleCodes, op, "scale_code");
  if (!double_quant) return experts;
  experts.superblocks = ceil_div(blocks, int64_t(1) << kSuperblockShift);
  w.scale_absmax = checked_floats(*scale_absmax, E * experts.superblocks, op, "scale_absmax");
  w.scale_offset = checked_floats(*scale_offset, E, op, "scale_offset");
  return experts;
}

inline Weight checked_weight(const Op& op, const Tensor& packed, const Tensor& absmax,
                             const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset, const Tensor& code,
                             const OptionalTensor& scale_code, int64_t N, int64_t K, int64_t block_size,
                             bool takes_int8 = false) {
  return checked_weights(op, 1, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                         takes_int8)
      .first;
}

// E of expert_offsets [E], which are not read here.
inline int64_t checked_expert_count(const Tensor& expert_offsets, const Op& op) {
  CHECK(expert_offsets.dim() == 1, op, ": expert_offsets must have shape [E], got ", Shape{expert_offsets});
  checked_data(expert_offsets, ScalarType::Int, expert_offsets.size(0), op, "expert_offsets");
  return expert_offsets.size(0);
}

// The grouped ops' weights, one for each of expert_offsets. The offsets themselves are not read.
inline Experts checked_experts(const Op& op, const Tensor& expert_offsets, const Tensor& packed, const Tensor& absmax,
                               const OptionalTensor& scale_absmax, const OptionalTensor& scale_offset,
                               const Tensor& code, const OptionalTensor& scale_code, int64_t N, int64_t K,
                               int64_t block_size, bool takes_int8 = false) {
  const int64_t E = checked_expert_count(expert_offsets, op);
  const Experts experts = checked_weights(op, E, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K,
                                          block_size, takes_int8);
  const int64_t step = std::max<int64_t>(64, block_size);
  CHECK(K % step == 0, op, ": K must be a multiple of ", step, " at block_size=", block_size, ", got ", K);
  return experts;
}

// Tokens [T, H], each with top_k choices of an expert, and their rows [count, H].
struct Routing {
  int64_t T, top_k, H;

  int64_t count() const { return T * top_k; }
};

// x [T, H] of sort_by_expert and top_k_index [T, k]; the indices themselves are not read.
inline Routing checked_choices(const Tensor& x, const Tensor& top_k_index, int64_t experts, const Op& op) {
  dtype_of(x.scalar_type(), op, "x");
  check_place(x, op, "x");
  check_place(top_k_index, op, "top_k_index");
  CHECK(x.dim() == 2 && top_k_index.dim() == 2 && top_k_index.size(0) == x.size(0), op,
        ": x and top_k_index must have shapes [T, H] and [T, k], got ", Shape{x}, " and ", Shape{top_k_index});
  CHECK(top_k_index.scalar_type() == ScalarType::Long, op, ": top_k_index must be ",
        torch::headeronly::toString(ScalarType::Long), ", got ",
        torch::headeronly::toString(top_k_index.scalar_type()));
  CHECK(experts >= 0, op, ": num_experts must not be negative, got ", experts);
  const Routing routing{x.size(0), top_k_index.size(1), x.size(1)};
  CHECK(routing.count() <= std::numeric_limits<int32_t>::max(), op,
        ": top_k_index must have fewer than 2^31 elements, got ", routing.count());
  return routing;
}

// rows [T * k, H] or tokens [T, H] in any strides, beside positions [T, k] and weights of their shape.
inline Routing checked_routing(const Tensor& in, const char* name, bool is_rows, const Tensor& positions,
                               const OptionalTensor& weights, const Op& op) {
  dtype_of(in.scalar_type(), op, name);
  check_place(in, op, name);
  check_place(positions, op, "positions");
  CHECK(in.dim() == 2 && positions.dim() == 2 &&
            in.size(0) == (is_rows ? positions.size(0) * positions.size(1) : positions.size(0)),
        op, ": ", name, " and positions must have shapes [", is_rows ? "T * k" : "T", ", H] and [T, k], got ",
        Shape{in}, " and ", Shape{positions});
  CHECK(positions.scalar_type() == ScalarType::Int, op, ": positions must be ",
        torch::headeronly::toString(ScalarType::Int), ", got ", torch::headeronly::toString(positions.scalar_type()));
  if (weights.has_value()) {
    dtype_of(weights->scalar_type(), op, "weights");
    check_place(*weights, op, "weights");
    CHECK(weights->dim() == 2 && weights->size(0) == positions.size(0) && weights->size(1) == positions.size(1), op,
          ": weights must have shape ", Shape{positions}, " as positions, got ", Shape{*weights});
  }
  return {positions.size(0), positions.size(1), in.size(1)};
}

struct Range {
  int64_t row_begin, row_end, col_begin, col_end;

  int64_t rows() const { return row_end - row_begin; }
  int64_t cols() const { return col_end - col_begin; }
};

inline void check_range(const Range& r, const Weight& w, const Op& op) {
  CHECK(0 <= r.row_begin && r.row_begin <= r.row_end && r.row_end <= w.N, op, ": rows must be a range within 0..", w.N,
        ", got ", r.row_begin, "..", r.row_end);
  CHECK(0 <= r.col_begin && r.col_begin <= r.col_end && r.col_end <= w.K, op, ": cols must be a range within 0..", w.K,
        ", got ", r.col_begin, "..", r.col_end);
}

// The elements from row to row of a given output that takes `range`.
inline int64_t checked_out_stride(const Tensor& out, const Range& range, const Op& op) {
  const int64_t rows = range.rows(), cols = range.cols();
  check_place(out, op, "out");
  CHECK(out.dim() == 2 && out.size(0) == rows && out.size(1) == cols, op, ": out must have shape [", rows, ", ", cols,
        "], got ", Shape{out});
  if (rows == 0 || cols == 0) return cols;
  CHECK(cols == 1 || out.stride(1) == 1, op, ": out must be contiguous in its last dimension");
  CHECK(rows == 1 || out.stride(0) >= cols, op, ": out's rows must not overlap");
  return rows == 1 ? cols : out.stride(0);
}

// x of linear (depth K) or dy of linear_dgrad (depth N): [..., depth] in any strides.
inline Dtype checked_input(const Tensor& in, const Op& op, const char* name, const char* depth_name, int64_t depth) {
  const Dtype dtype = dtype_of(in.scalar_type(), op, name);
  check_place(in, op, name);
  CHECK(in.dim() > 0 && in.size(in.dim() - 1) == depth, op, ": ", name, " must have ", depth_name, "=", depth,
        " columns, got shape ", Shape{in});
  return dtype;
}

// The LoRA term of a product out[M, columns]: scaling * inner[M, rank] @ factor^T for linear (lora_P and lora_B[N, rank]),
// scaling * inner @ factor for linear_dgrad (lora_Q and lora_A[rank, K]). In a grouped op factor has one matrix for each
// expert, stacked.
struct LoraTerm {
  const OptionalTensor& inner;
  const OptionalTensor& factor;
  float scaling;
  const char* inner_name;
  const char* factor_name;
  int64_t rank_dim;  // of factor
};

struct LoraTermData {
  int64_t rank;  // 0: no term
  const void* inner;
  const void* factor;
};

inline LoraTermData checked_lora_term(const LoraTerm& term, ScalarType type, int64_t M, int64_t columns, const Op& op,
                                      std::optional<int64_t> experts = std::nullopt) {
  CHECK(term.inner.has_value() == term.factor.has_value(), op, ": ", term.inner_name, " and ", term.factor_name,
        " must be given together");
  if (!term.factor.has_value()) return {};
  const Tensor &inner = *term.inner, &factor = *term.factor;
  const int64_t leading = experts.has_value() ? 1 : 0, E = experts.value_or(1);
  const bool fits = factor.dim() == leading + 2 && factor.size(leading + 1 - term.rank_dim) == columns &&
                    (leading == 0 || factor.size(0) == E);
  CHECK(fits || leading == 1, op, ": ", term.factor_name, " must have ", columns,
        term.rank_dim == 1 ? " rows" : " columns", ", got shape ", Shape{factor});
  CHECK(fits, op, ": ", term.factor_name, " must have ", columns, term.rank_dim == 1 ? " rows" : " columns",
        " for each of ", E, " experts, got shape ", Shape{factor});
  const int64_t rank = factor.size(leading + term.rank_dim);
  CHECK(inner.dim() > 0 && inner.size(inner.dim() - 1) == rank, op, ": ", term.inner_name, " must have r=", rank,
        " columns as ", term.factor_name, " has, got shape ", Shape{inner});
  return {rank, checked_data(inner, type, M * rank, op, term.inner_name),
          checked_data(factor, type, E * columns * rank, op, term.factor_name)};
}

}  // namespace nf4::binding
