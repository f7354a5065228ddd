#include "product.h"

#include <memory>
#include <vector>

namespace nf4::cpu {

Plan plan_product(const Product& product, GemmArgs& args) {
  const Weight& w = args.weight;
  const int run = is_int8(w) ? 0 : code_run(w);  // no product of unscaled codes is of int8
  const CpuKernels& active = active_kernels();
  const bool has_tiles = active[Products::kTiles].linear != nullptr;
  const Choice choice =
      choose({product.is_dgrad, args.dtype, args.M, run, w.N * w.K, has_tiles, amx_of_torch(), forced_products()});
  if (choice.products == Products::kDequantizeGemm || choice.products == Products::kTiles || is_int8(w))
    note(choice.products);
  if (choice.products == Products::kDequantizeGemm) return {nullptr, nullptr};
  if (choice.products == Products::kTiles)  // of int8 as well
    return {nullptr, product.is_dgrad ? active[Products::kTiles].linear_dgrad : active[Products::kTiles].linear};
  if (is_int8(w)) {
    const Int8Kernels& int8 = *active.int8;
    const Int8Kernels::Gemms& gemms = choice.products == Products::kBf16 ? int8.bf16 : int8.fp32;
    const bool has_few_rows = !product.is_dgrad && args.M <= int8.gemv->max_m;
    return {has_few_rows ? int8.gemv : nullptr, product.is_dgrad ? gemms.linear_dgrad : gemms.linear};
  }
  Products products = choice.products;
  bool in_whole_numbers = false;
  const ProductKernels& of_codes = active[Products::kBf16Codes];
  if (args.dtype != Dtype::kFloat32 && of_codes.int_code_run > 0 && !product.is_dgrad &&
      args.M <= of_codes.gemv->max_m) {
    args.int_code = rounded_code<Int13>(w.code);  // of fp16 as well; its scale is NaN where a level is no number
    in_whole_numbers = run >= of_codes.int_code_run && args.int_code.scale == args.int_code.scale;
    products = in_whole_numbers ? Products::kBf16Codes : Products::kFp32;
  }
  note(products);
  const ProductKernels& kernels = active[products];
  if (kernels.needs_bf16_code && !in_whole_numbers) args.bf16_code = rounded_code<BFloat16>(w.code);
  const bool is_gemv = !product.is_dgrad && args.M <= kernels.gemv->max_m;
  return {is_gemv ? kernels.gemv : nullptr, product.is_dgrad ? kernels.linear_dgrad : kernels.linear};
}

void* thread_workspace(int64_t bytes) {
  constexpr size_t kLine = 64;
  thread_local std::vector<char> buffer;
  if (buffer.size() < size_t(bytes) + kLine) buffer.resize(size_t(bytes) + kLine);
  void* aligned = buffer.data();
  size_t space = buffer.size();
  return std::align(kLine, size_t(bytes), aligned, space);
}

}  // namespace nf4::cpu
