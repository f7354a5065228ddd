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

}  // namespace nf4
