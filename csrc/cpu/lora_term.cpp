// LoRA's inner product in the layouts of the kernels: M*r elements, so one portable version is enough.
#include "convert.h"
#include "kernels.h"

namespace nf4::cpu {

void scale_lora_inner(const void* lora_inner, Dtype dtype, int64_t count, float scaling, float* out) {
  with_type(dtype, [&](auto t) {
    const auto* values = static_cast<const decltype(t)*>(lora_inner);
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]) * scaling;
  });
}

void transpose_lora_inner(const void* lora_inner, Dtype dtype, int64_t M, int64_t rank, int64_t stride, Dtype out_dtype,
                          void* out) {
  with_type(dtype, [&](auto t) {
    with_type(out_dtype, [&](auto o) {
      using O = decltype(o);
      const auto* value = static_cast<const decltype(t)*>(lora_inner);
      auto* transposed = static_cast<O*>(out);
      for (int64_t m = 0; m < M; ++m)
        for (int64_t j = 0; j < rank; ++j, ++value) transposed[j * stride + m] = from_float<O>(to_float(*value));
      for (int64_t j = 0; j < rank; ++j)
        for (int64_t m = M; m < stride; ++m) transposed[j * stride + m] = from_float<O>(0.f);
    });
  });
}

}  // namespace nf4::cpu
