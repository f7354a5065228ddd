#include "decode_neon.h"
#include "quantize.h"

namespace nf4::cpu {

void quantize_neon(const QuantizeArgs& args, int64_t block_begin, int64_t block_end) {
  quantize_range(args, block_begin, block_end);
}

}  // namespace nf4::cpu
