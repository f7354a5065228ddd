// The ops of nf4kernels/ops.py for CUDA tensors: argument checks, allocation, registration. The grouped products are in
// cuda_grouped.cpp, products by torch's own GEMM in cuda_dequantize_gemm.cpp.
#include <iterator>
#include <memory>
#include <sstream>
#include <string_view>
#include <vector>

#include "cuda_int8.h"
#include "cuda_product.h"

namespace {

using nf4::Dtype;
using namespace nf4::binding;

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& code, int64_t block_size) {
  if (is_int8(code))
    return call_int8<std::tuple<Tensor, Tensor>>("nf4kernels_int8::quantize", weight, code, block_size);
  const Op op = op_at("quantize", weight, "weight");
  CHECK(weight.dim() == 2, op, ": weight must be 2-D [N, K], got shape ", Shape{weight});
  const int64_t N = weight.size(0), K = weight.size(1);
  nf4::cuda::QuantizeArgs args{};
  args.dtype = dtype_of(weight.scalar_type(), op, "weight");
  args.numel = N * K;
  args.code = checked_floats(code, nf4::kLevels, op, "code");
  args.block_shift = block_shift_of(block_size, op);
  const Launch launch(op);
  const Tensor contiguous = as_contiguous(weight);
  const auto [packed, absmax] = new_quantized(weight, N, K, block_size);
  if (args.numel == 0) return {packed, absmax};
  args.weight = contiguous.const_data_ptr();
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.absmax = static_cast<float*>(absmax.mutable_data_ptr());
  check_launch(nf4::cuda::quantize(args, launch.stream), op);
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& scale_code, bool scale_is_e4m3) {
  const Op op = op_at("quantize_absmax", absmax, "absmax");
  nf4::cuda::QuantizeAbsmaxArgs args{};
  args.blocks = absmax.numel();
  args.absmax = checked_floats(absmax, args.blocks, op, "absmax");
  args.scale_code = checked_floats(scale_code, 256, op, "scale_code");
  args.scale_is_e4m3 = scale_is_e4m3;
  const int64_t superblocks = ceil_div(args.blocks, int64_t(1) << nf4::kSuperblockShift);
  const Launch launch(op);
  const Tensor quantized = new_empty(absmax, absmax.sizes(), ScalarType::Byte);
  const Tensor scale_absmax = new_empty(absmax, {superblocks}, ScalarType::Float);
  const Tensor scale_offset = new_empty(absmax, {}, ScalarType::Float);
  const Tensor superblock_sums = new_empty(absmax, {superblocks}, ScalarType::Double);
  args.superblock_sums = static_cast<double*>(superblock_sums.mutable_data_ptr());
  args.quantized = static_cast<uint8_t*>(quantized.mutable_data_ptr());
  args.scale_absmax = static_cast<float*>(scale_absmax.mutable_data_ptr());
  args.scale_offset = static_cast<float*>(scale_offset.mutable_data_ptr());
  check_launch(nf4::cuda::quantize_absmax(args, launch.stream), op);
  return {quantized, scale_absmax, scale_offset};
}

// Ŵ[range] into out, whose rows are `stride` elements apart.
void dequantize_into(const nf4::Weight& w, const Range& range, Dtype dtype, const Tensor& out, int64_t stride,
                     const Launch& launch, const Op& op) {
  if (range.rows() == 0 || range.cols() == 0) return;
  const nf4::cuda::DequantizeArgs args{w,     range.row_begin,        range.row_end, range.col_begin, range.col_end,
                                       dtype, out.mutable_data_ptr(), stride};
  check_launch(nf4::cuda::dequantize(args, launch.stream), op);
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                  const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                  int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                  ScalarType type) {
  if (is_int8(code))
    return call_int8<Tensor>("nf4kernels_int8::dequantize", packed, absmax, scale_absmax, scale_offset, code,
                             scale_code, N, K, block_size, row_begin, row_end, col_begin, col_end, type);
  const Op op = op_at("dequantize", packed, "packed");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, w, op);
  const Dtype dtype = dtype_of(type, op, "dtype");
  const Launch launch(op);
  const Tensor out = new_empty(packed, {range.rows(), range.cols()}, type);
  dequantize_into(w, range, dtype, out, range.cols(), launch, op);
  return out;
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, int64_t row_begin, int64_t row_end, int64_t col_begin,
                    int64_t col_end, const Tensor& out) {
  if (is_int8(code))
    return call_int8<void>("nf4kernels_int8::dequantize_out", packed, absmax, scale_absmax, scale_offset, code,
                           scale_code, N, K, block_size, row_begin, row_end, col_begin, col_end, out);
  const Op op = op_at("dequantize", packed, "packed");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, w, op);
  const Dtype dtype = dtype_of(out.scalar_type(), op, "out");
  const int64_t stride = checked_out_stride(out, range, op);
  dequantize_into(w, range, dtype, out, stride, Launch(op), op);
}

// One of csrc/cuda's kernels, half a million rows of x at a time: a grid has at most 65,535 blocks in y, and the smallest
// tile has 16 rows.
void multiply_fused(const Product& product, const nf4::cuda::Choice& choice, const Launch& launch) {
  using nf4::cuda::Path;
  constexpr int64_t kMostM = 1 << 19;
  const auto run = choice.path == Path::kSmall ? nf4::cuda::linear_small
                   : choice.path == Path::kTiled
                       ? (product.dgrad ? nf4::cuda::linear_dgrad_tiled : nf4::cuda::linear_tiled)
                       : (product.dgrad ? nf4::cuda::linear_dgrad_any : nf4::cuda::linear_any);
  nf4::cuda::ProductArgs args = product.args;
  const int64_t M = args.M, bytes = int64_t(element_bytes(args.dtype));
  args.tile = choice.tile;
  args.splits = choice.splits;
  if (choice.path != Path::kAny) args.known = known_codes.rounded(args.dtype);
  OptionalTensor partial;
  if (choice.path == Path::kSmall) {
    args.blocks = nf4::cuda::small_blocks(M, args.weight.N, args.weight.K, device_of(product.op).multiprocessors);
    if (nf4::cuda::small_is_cut(M, args.weight.N, args.blocks)) {
      partial = new_empty(product.in, {nf4::cuda::small_partial_floats(M, args.blocks)}, ScalarType::Float);
      args.partial = static_cast<float*>(partial->mutable_data_ptr());
      args.arrivals = arrival_slot(launch);
    }
  }
  if (args.splits > 1) {
    int64_t sums = args.splits * std::min(M, kMostM) * product.columns;
    if (choice.path == Path::kTiled) {
      const nf4::cuda::TiledProblem tiled{product.dgrad, false, std::min(M, kMostM), product.columns, product.depth};
      const nf4::cuda::Tile& tile = nf4::cuda::tiles_of(product.dgrad)[choice.tile];
      if (tiled.output_tiles(tile) <= nf4::cuda::kMostArrivals) args.arrivals = arrival_slot(launch);
      if (args.arrivals >= 0) sums = tiled.partial_sums(tile, args.splits);
    }
    partial = new_empty(product.in, {sums}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  // The bias comes after the sum, whoever adds: then a second launch gives the bits of the last block to arrive.
  const bool adds_later = args.splits > 1 && args.arrivals < 0;
  if (adds_later) args.bias = nullptr;
  for (int64_t m = 0; m < M; m += kMostM) {
    args.M = std::min(M - m, kMostM);
    args.x = static_cast<const char*>(product.args.x) + m * product.depth * bytes;
    args.out = static_cast<char*>(product.args.out) + m * product.columns * bytes;
    if (args.rank > 0) args.lora_inner = static_cast<const char*>(product.args.lora_inner) + m * args.rank * bytes;
    check_launch(run(args, launch.stream), product.op);
    if (adds_later) add_splits(args, product.args.bias, product.columns, launch, product.op);
  }
}

Tensor multiply(const Op& op, bool dgrad, const Tensor& in, const nf4::Weight& w, const OptionalTensor& bias,
                const LoraTerm& lora_term) {
  const int64_t depth = dgrad ? w.N : w.K, columns = dgrad ? w.K : w.N;
  nf4::cuda::ProductArgs args{};
  args.weight = w;
  args.dtype = checked_input(in, op, dgrad ? "dy" : "x", dgrad ? "N" : "K", depth);
  args.M = rows_of(in);
  args.bias = bias.has_value() ? checked_data(*bias, in.scalar_type(), w.N, op, "bias") : nullptr;
  const LoraTermData term = checked_lora_term(lora_term, in.scalar_type(), args.M, columns, op);
  args.rank = term.rank;
  args.lora_inner = term.inner;
  args.lora_factor = term.factor;
  args.scaling = lora_term.scaling;

  const Launch launch(op);
  std::vector<int64_t> shape(in.sizes().begin(), in.sizes().end());
  shape.back() = columns;
  const Tensor out = new_empty(in, shape, in.scalar_type());
  if (args.M == 0 || columns == 0) return out;
  const Tensor contiguous = as_contiguous(in);
  args.x = contiguous.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const Product product{op, dgrad, contiguous, out, bias, lora_term, depth, columns, args};
  const nf4::cuda::Choice choice = choice_for(problem_of(op, dgrad, args, 0), op);
  if (choice.path == nf4::cuda::Path::kDequantizeGemm)
    dequantize_gemm(product, launch);
  else
    multiply_fused(product, choice, launch);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
              const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
              int64_t K, int64_t block_size, const OptionalTensor& bias, const OptionalTensor& lora_P,
              const OptionalTensor& lora_B, double scaling) {
  if (is_int8(code))
    return call_int8<Tensor>("nf4kernels_int8::linear", x, packed, absmax, scale_absmax, scale_offset, code, scale_code,
                             N, K, block_size, bias, lora_P, lora_B, scaling);
  const Op op = op_at("linear", x, "x");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply(op, false, x, w, bias, {lora_P, lora_B, float(scaling), "lora_P", "lora_B", 1});
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& packed, const Tensor& absmax, const OptionalTensor& scale_absmax,
                    const OptionalTensor& scale_offset, const Tensor& code, const OptionalTensor& scale_code, int64_t N,
                    int64_t K, int64_t block_size, const OptionalTensor& lora_Q, const OptionalTensor& lora_A,
                    double scaling) {
  if (is_int8(code))
    return call_int8<Tensor>("nf4kernels_int8::linear_dgrad", dy, packed, absmax, scale_absmax, scale_offset, code,
                             scale_code, N, K, block_size, lora_Q, lora_A, scaling);
  const Op op = op_at("linear_dgrad", dy, "dy");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  return multiply(op, true, dy, w, std::nullopt, {lora_Q, lora_A, float(scaling), "lora_Q", "lora_A", 0});
}

Tensor lora_grad(const Tensor& small, const Tensor& wide, double scaling, ScalarType type, bool transposed) {
  const Op op = op_at("lora_grad", wide, "wide");
  nf4::cuda::LoraGradArgs args{};
  args.dtype = dtype_of(wide.scalar_type(), op, "wide");
  args.out_dtype = dtype_of(type, op, "dtype");
  CHECK(wide.dim() > 0 && small.dim() > 0, op, ": small and wide must have columns, got shapes ", Shape{small}, " and ",
        Shape{wide});
  args.M = rows_of(wide);
  args.columns = wide.size(wide.dim() - 1);
  args.rank = small.size(small.dim() - 1);
  args.small = checked_data(small, wide.scalar_type(), args.M * args.rank, op, "small");
  args.scaling = float(scaling);
  args.transposed = transposed;
  const Launch launch(op);
  const Tensor out =
      transposed ? new_empty(wide, {args.columns, args.rank}, type) : new_empty(wide, {args.rank, args.columns}, type);
  if (args.rank == 0 || args.columns == 0) return out;
  const Tensor contiguous = as_contiguous(wide);
  args.wide = contiguous.const_data_ptr();
  args.out = out.mutable_data_ptr();
  if (args.dtype == Dtype::kFloat32 || args.columns % 8 != 0 || !is_aligned({args.wide})) {
    check_launch(nf4::cuda::lora_grad_any(args, launch.stream), op);
    return out;
  }
  args.splits = nf4::cuda::lora_grad_splits(args.M, args.rank, args.columns, device_of(op).multiprocessors);
  OptionalTensor partial;
  if (args.splits > 1) {
    partial = new_empty(wide, {args.splits, args.rank, args.columns}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
    args.arrivals = arrival_slot(launch);
  }
  check_launch(nf4::cuda::lora_grad(args, launch.stream), op);
  return out;
}

}  // namespace

#ifndef NF4_EXECUTOR
// For nf4kernels/backends/native.py.
#define EXPORT extern "C" __attribute__((visibility("default")))

// The architectures, separated by spaces: 80 for sm_80, 90a, 120+PTX if newer devices can compile it.
EXPORT const char* nf4kernels_cuda_architectures() { return NF4_CUDA_ARCHITECTURES; }

// CUDA versions as 1000 * major + 10 * minor: the one of the build, and the newest that the driver knows (0: no
// driver). Neither call touches a device.
EXPORT int nf4kernels_cuda_version() { return CUDART_VERSION; }
EXPORT int nf4kernels_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif

void register_ops(torch::stable::detail::StableLibrary& library) {
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

#define NF4_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the ops in this namespace for this dispatch key ("CUDA"), once for each pair. Loading the library alone
// registers nothing, because the caller asks first whether its kernels run on a device.
NF4_EXPORT void nf4kernels_cuda_register(const char* ops_namespace, const char* key) {
  using torch::stable::detail::StableLibrary;
  static std::vector<std::unique_ptr<StableLibrary>> registered;  // a registration ends with its object
  registered.push_back(
      std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, ops_namespace, key, __FILE__, __LINE__));
  register_ops(*registered.back());
}

// Forces the kernel of this name on every product, and of tiled this tile (-1: as chosen), and so many splits (0: as
// chosen); a null name restores the choice. Returns what is wrong, or null.
NF4_EXPORT const char* nf4kernels_cuda_force_kernel(const char* name, int tile, int splits) {
  if (name == nullptr) {
    forced = Forced{};
    return nullptr;
  }
  if (tile < -1 || tile >= nf4::cuda::kMostTiles || splits < 0)
    return "must have a tile of its own, or -1, and splits, or 0";
  for (int i = 0; i < int(std::size(nf4::cuda::kPathNames)); ++i) {
    if (std::string_view(name) != nf4::cuda::kPathNames[i]) continue;
    forced = Forced{int16_t(i), int16_t(tile), splits};
    return nullptr;
  }
  return "must be any, small, tiled or dequantize_gemm";
}

// The tiles of the tiled kernel, M x N x K of each: "32x64x128 64x64x128".
NF4_EXPORT const char* nf4kernels_cuda_tiles(bool dgrad) {
  const auto text = [](nf4::cuda::Tiles tiles) {
    std::ostringstream out;
    for (int i = 0; i < tiles.count; ++i) out << (i ? " " : "") << tiles[i].M << 'x' << tiles[i].N << 'x' << tiles[i].K;
    return out.str();
  };
  static const std::string texts[] = {text(nf4::cuda::tiles_of(false)), text(nf4::cuda::tiles_of(true))};
  return texts[dgrad].c_str();
}

// Cycles that tiles.h predicts for one weight's tiled product by this tile, of which so many blocks of threads are taken
// to be resident on a multiprocessor, in so many splits (0: in the best, which `splits` then tells).
NF4_EXPORT float nf4kernels_cuda_tile_cycles(bool dgrad, bool scales_sums, int64_t M, int64_t N, int64_t K, int arch,
                                             int multiprocessors, int tile, int resident, int* splits) {
  if (multiprocessors < 1 || resident < 1 || tile < 0 || tile >= nf4::cuda::tiles_of(dgrad).count) return 0;
  const nf4::cuda::TiledProblem p{dgrad, scales_sums, M, dgrad ? K : N, dgrad ? N : K, arch, multiprocessors};
  if (*splits == 0) *splits = nf4::cuda::parts_of(p, tile, resident).splits;
  return nf4::cuda::predicted_cycles(p, nf4::cuda::tiles_of(dgrad)[tile], resident, *splits);
}

// Sets what was measured on a device in place of what is predicted. For linear, linear_dgrad, grouped_linear and
// grouped_linear_dgrad in turn: 1 (or 0: it was not measured, and zeros follow), small, tiled, and then of each of its
// tiles the rows, the cost and the blocks (cuda/tuning.h). Null numbers: all is predicted again. Returns what is wrong,
// or null.
NF4_EXPORT const char* nf4kernels_cuda_tune(int device, const int64_t* numbers, int count, const char* why) {
  using nf4::cuda::tiles_of;
  constexpr int64_t kMostBlocks = 32, kMostCost = 1000 * 1000;
  if (device < 0 || device >= Tunings::kMostDevices) return "must be of a device from 0 to 63";
  if (numbers == nullptr) {
    tunings.set(device, nullptr);
    return nullptr;
  }
  if (count != 2 * (3 + 3 * tiles_of(false).count) + 2 * (3 + 3 * tiles_of(true).count))
    return "must have numbers for each tile of each op";
  auto measured = std::make_unique<Tunings::Device>();
  measured->why = why;
  for (int op = 0; op < 4; ++op) {
    const bool is_measured = *numbers++ != 0;
    nf4::cuda::Tuning t{};
    t.small = *numbers++;
    t.tiled = *numbers++;
    t.why_small = t.why = measured->why.c_str();
    bool sound = t.small >= 0 && t.tiled >= 0;
    for (int i = 0; i < tiles_of(op % 2 == 1).count; ++i) {
      const int64_t rows = t.tile_rows[i] = *numbers++;
      const int64_t cost = t.tile_cost[i] = *numbers++;
      const int64_t blocks = t.tile_blocks[i] = *numbers++;
      sound = sound && rows >= (i > 0 ? t.tile_rows[i - 1] : 0) && cost > 0 && cost <= kMostCost && blocks > 0 &&
              blocks <= kMostBlocks;
    }
    if (!is_measured) continue;
    if (!sound)
      return "must have rows from 0 on, ascending over the tiles, from 1 to 32 blocks, and costs up to 1000000";
    measured->of_op[op] = t;
  }
  tunings.set(device, std::move(measured));
  return nullptr;
}

// Adds a codebook, 16 floats on the host, to those that are rounded without bias; others are dithered
// (cuda/pair_table.cuh). Returns false where too many are known; one that is known already takes no room.
NF4_EXPORT bool nf4kernels_cuda_know_codebook(const float* code) { return known_codes.add(code); }

// The choice for a product (experts: 0, or how many share the M rows out) on a device as it is tuned, or by what is
// predicted (-1): the kernel's name, its tile, the splits, and why.
NF4_EXPORT const char* nf4kernels_cuda_choose(int device, bool dgrad, int32_t dtype, int64_t M, int64_t N, int64_t K,
                                              int64_t experts, bool scales_sums, bool aligned, int arch,
                                              int multiprocessors, int* tile, int* splits, const char** reason) {
  const nf4::cuda::Problem problem{dgrad, Dtype(dtype), M, N, K, experts, scales_sums, aligned, arch, multiprocessors};
  const nf4::cuda::Choice choice = nf4::cuda::choose(problem, tunings.of(device, problem));
  *tile = choice.tile;
  *splits = choice.splits;
  *reason = choice.reason;
  return nf4::cuda::kPathNames[int(choice.path)];
}

// How many thread blocks share linear_small's work out.
NF4_EXPORT int nf4kernels_cuda_small_blocks(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  return nf4::cuda::small_blocks(M, N, K, multiprocessors);
}

// Columns of the product that a tile of linear_small has.
NF4_EXPORT int nf4kernels_cuda_small_tile_n(int64_t M) { return nf4::cuda::small_tile_n(M); }

// Streams and graphs may have the slots of arrival counters of all before. A measurement says so between its graphs, of
// which there are more than slots: nothing may be running, and no earlier graph may be launched any more.
NF4_EXPORT void nf4kernels_cuda_forget_streams() { arrival_slots->forget(); }

#ifdef NF4_EXECUTOR
// What tiles.h says of a tile on a card: blocks resident on a multiprocessor; cycles of a product in so many splits
// (0: the splits that it predicts to take least, to which `splits` is set).
NF4_EXPORT int nf4kernels_executor_resident_blocks(bool dgrad, int tile, int arch) {
  return nf4::cuda::resident_blocks(nf4::cuda::multiprocessor_of(arch), nf4::cuda::tiles_of(dgrad)[tile]);
}
NF4_EXPORT float nf4kernels_executor_cycles(bool dgrad, bool scales_sums, int64_t M, int64_t N, int64_t K, int arch,
                                            int multiprocessors, int tile, int* splits) {
  const nf4::cuda::TiledProblem p{dgrad, scales_sums, M, dgrad ? K : N, dgrad ? N : K, arch, multiprocessors};
  const nf4::cuda::Tile& own = nf4::cuda::tiles_of(dgrad)[tile];
  const int resident = nf4kernels_executor_resident_blocks(dgrad, tile, arch);
  if (*splits == 0) *splits = nf4::cuda::parts_of(p, tile, resident).splits;
  return nf4::cuda::predicted_cycles(p, own, resident, *splits);
}
NF4_EXPORT void nf4kernels_executor_device(int arch, int multiprocessors) { pretended = {arch, multiprocessors}; }
// Launches are on this stream from now on, or in this capture of it. Returns its slot of arrival counters.
NF4_EXPORT void nf4kernels_executor_unknown_stream() { pretended_stream.is_known = false; }
NF4_EXPORT int nf4kernels_executor_stream(uint64_t capture, uint64_t id) {
  pretended_stream = {true, capture, id};
  return arrival_slots->of(capture, id);
}
NF4_EXPORT void nf4kernels_executor_forget_streams() {
  pretended_stream = {true, 0, 0};
  arrival_slots = std::make_unique<ArrivalSlots>();
}
#endif
