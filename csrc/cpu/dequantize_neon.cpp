#include "decode_neon.h"

#include "code_table_neon.h"

namespace nf4::cpu {

void dequantize_neon(const Weight& weight, int64_t begin, int64_t count, Dtype dtype, void* out) {
  with_type(dtype, [&](auto t) { decode_span_by_tables(weight, begin, count, static_cast<decltype(t)*>(out)); });
}

}  // namespace nf4::cpu
