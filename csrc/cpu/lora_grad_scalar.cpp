#include "decode_scalar.h"
#include "lora_grad.h"

namespace nf4 {

const LoraGradKernel kLoraGrad_scalar{lora_grad_tiles<GradFp32>, kGradCols, Dtype::kFloat32};

}  // namespace nf4
