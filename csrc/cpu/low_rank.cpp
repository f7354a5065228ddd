// The small factor of LoRA's term, as the products read it; portable, being r/N of their input.
#include "convert.h"
#include "kernels.h"

namespace nf4 {

void scale_low_rank(const void* small, Dtype dtype, int64_t count, float scaling, float* out) {
  with_type(dtype, [&](auto t) {
    const auto* values = static_cast<const decltype(t)*>(small);
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]) * scaling;
  });
}

void transpose_low_rank(const void* small, Dtype dtype, int64_t rows, int64_t rank, int64_t stride, Dtype out_dtype,
                        void* out) {
  with_type(dtype, [&](auto t) {
    with_type(out_dtype, [&](auto o) {
      using O = decltype(o);
      const auto* value = static_cast<const decltype(t)*>(small);
      auto* turned = static_cast<O*>(out);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = 0; j < rank; ++j, ++value) turned[j * stride + m] = from_float<O>(to_float(*value));
      for (int64_t j = 0; j < rank; ++j)
        for (int64_t m = rows; m < stride; ++m) turned[j * stride + m] = from_float<O>(0.f);
    });
  });
}

}  // namespace nf4
