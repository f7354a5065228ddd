#include "decode_avx2.h"
#include "quantize_int8.h"

namespace nf4::cpu {

void quantize_int8_avx2(const QuantizeArgs& args, int64_t block_begin, int64_t block_end) {
  quantize_int8(args, block_begin, block_end);
}
void dequantize_int8_avx2(const Weight& weight, int64_t begin, int64_t count, Dtype dtype, void* out) {
  with_type(dtype, [&](auto t) { decode_int8(weight, begin, count, static_cast<decltype(t)*>(out)); });
}

}  // namespace nf4::cpu
