#include "decode_avx512.h"
#include "lora_grad.h"

namespace nf4 {

void lora_grad_avx512(const LoraGradArgs& args, int64_t tile_begin, int64_t tile_end) {
  lora_grad_tiles<GradFp32>(args, tile_begin, tile_end);
}

}  // namespace nf4
