// torch's own product of matrices on the CPU, for dequantize + GEMM.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu_product.h"

namespace {

using nf4::Dtype;
using namespace nf4::binding;

// A matrix that belongs to someone else.
Tensor view_of(const Tensor& like, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
               int64_t column_stride) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  const ScalarType type = like.scalar_type();
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle view;
  CHECK(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 2, sizes, strides, 0, dtype,
                                           aoti_torch_device_type_cpu(), 0, &view) == 0,
        "view_of: torch could not make a tensor of ", rows, " x ", columns);
  return Tensor(view);
}

}  // namespace

void nf4::binding::Runtime::gemm(const cpu::SliceGemm& args) {
  const Tensor x = view_of(like, args.x, args.M, args.depth, args.depth, 1);
  const Tensor slice = args.is_dgrad ? view_of(like, args.slice, args.depth, args.columns, args.columns, 1)
                                     : view_of(like, args.slice, args.depth, args.columns, 1, args.depth);
  const Tensor out = view_of(like, args.out, args.M, args.columns, args.out_stride, 1);
  const AOTITorchError error =
      args.adds ? aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), slice.get(), /*beta=*/1, /*alpha=*/1)
                : aoti_torch_cpu_mm_out(out.get(), x.get(), slice.get());
  CHECK(error == 0, "dequantize_gemm: torch's product of [", args.M, ", ", args.depth, "] and ", args.columns,
        " columns failed");
}
