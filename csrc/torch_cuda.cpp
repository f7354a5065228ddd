// The ops of nf4kernels/ops.py for CUDA tensors: argument checks, allocation, device and stream, registration. No kernel
// is here, so the host compiler reads torch's headers once, not nvcc once for each architecture.
//
// Compiled with NF4_SIMT the same ops are those of the namespace nf4kernels_simt for CPU tensors, and the kernels run on
// tests/simt.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "cuda/kernels.h"
#include "torch_checks.h"

#ifdef NF4_SIMT
#define NF4_CUDA_ARCHITECTURES "the host executor"
#else
#include <dlfcn.h>
#endif

namespace {

using nf4::Dtype;
using namespace nf4::binding;

// The op, with all its tensors where `tensor` is.
Op op_at(const char* name, const Tensor& tensor, const char* tensor_name) {
  const Op op{name, place_of(tensor)};
#ifdef NF4_SIMT
  const bool runs_here = tensor.is_cpu();
#else
  const bool runs_here = tensor.is_cuda();
#endif
  CHECK(runs_here, op, ": ", tensor_name, " must be on a CUDA device as the other tensors, got ", op.place);
  return op;
}

#ifdef NF4_SIMT

struct Launch {
  explicit Launch(const Op&) {}
  cudaStream_t stream = nullptr;
};

#else

// torch's current stream of a device. The function is in libtorch_cuda, which a torch without CUDA does not have: looked
// up when it is needed, this library loads beside any torch.
cudaStream_t current_stream(const Op& op) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream;
  CHECK(function != nullptr && function(op.place.index, &stream) == 0, op,
        ": torch must have a current CUDA stream on ", op.place, ", and libtorch_cuda.so told of none");
  return static_cast<cudaStream_t>(stream);
}

// Where a launcher puts its work. While it lives, the op's device is the current one.
struct Launch {
  explicit Launch(const Op& op) : guard(op.place.index), stream(current_stream(op)) {
    cudaSetDevice(op.place.index);  // the guard sets the device of torch's runtime, this library has its own, static
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

#endif

void check_launch(cudaError_t error, const Op& op) {
  CHECK(error == cudaSuccess, op, ": the launch on ", op.place, " failed: ", cudaGetErrorString(error),
        " (this library has kernels for ", NF4_CUDA_ARCHITECTURES, ")");
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& code, int64_t block_size) {
  const Op op = op_at("quantize", weight, "weight");
  CHECK(weight.dim() == 2, op, ": weight must be 2-D [N, K], got shape ", Shape{weight});
  const int64_t N = weight.size(0), K = weight.size(1);
  nf4::cuda::QuantizeArgs args{};
  args.dtype = dtype_of(weight.scalar_type(), op, "weight");
  args.numel = N * K;
  args.code = checked_floats(code, nf4::kLevels, op, "code");
  args.block_shift = block_shift_of(block_size, op);
  const Launch launch(op);
  const Tensor contiguous = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
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
  const Op op = op_at("dequantize", packed, "packed");
  const auto w = checked_weight(op, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size);
  const Range range{row_begin, row_end, col_begin, col_end};
  check_range(range, w, op);
  const Dtype dtype = dtype_of(out.scalar_type(), op, "out");
  const int64_t stride = checked_out_stride(out, range, op);
  dequantize_into(w, range, dtype, out, stride, Launch(op), op);
}

}  // namespace

#ifndef NF4_SIMT
// For nf4kernels/backends/native.py.
#define EXPORT extern "C" __attribute__((visibility("default")))

// Separated by spaces: 80 for sm_80, 90a, 120+PTX if newer devices can compile it.
EXPORT const char* nf4kernels_cuda_architectures() { return NF4_CUDA_ARCHITECTURES; }

// CUDA versions as 1000 * major + 10 * minor: the one this was built with, and the newest that the driver knows (0: no
// driver). Neither touches a device.
EXPORT int nf4kernels_cuda_version() { return CUDART_VERSION; }
EXPORT int nf4kernels_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif

#ifdef NF4_SIMT
STABLE_TORCH_LIBRARY_IMPL(nf4kernels_simt, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(nf4kernels, CUDA, library) {
#endif
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("dequantize_out", TORCH_BOX(&dequantize_out));
}
