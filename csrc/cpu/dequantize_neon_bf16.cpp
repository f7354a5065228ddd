#include "decode_neon.h"
#include "decode_span.h"

namespace nf4::cpu {

void dequantize_neon_bf16(const Weight& weight, int64_t begin, int64_t count, Dtype dtype, void* out) {
  with_type(dtype, [&](auto t) { decode_span(weight, begin, count, static_cast<decltype(t)*>(out)); });
}

}  // namespace nf4::cpu
