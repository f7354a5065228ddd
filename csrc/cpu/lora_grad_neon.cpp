#include "decode_neon.h"
#include "lora_grad.h"

namespace nf4::cpu {

const LoraGradKernel kLoraGrad_neon{lora_grad_tiles<GradFp32>, kGradTileC, /*inner_dtype=*/Dtype::kFloat32};

}  // namespace nf4::cpu
