#include "linear_codes_neon.h"
#include "linear_gemv_codes_neon.h"

namespace nf4::cpu {

const GemvKernel kGemvCodes_neon_bf16{/*step_k=*/kGemvGroupK, int(sizeof(BFloat16)), gemv_codes_pack, gemv_codes};
const GemmKernel kLinear_neon_bf16 = describe_gemm<LinearBf16>(pack_bf16, linear_spans);
const GemmKernel kLinearCodes_neon_bf16 = describe_gemm<LinearCodes<kMinBlockSize>>(pack_bf16, linear_codes);

}  // namespace nf4::cpu
