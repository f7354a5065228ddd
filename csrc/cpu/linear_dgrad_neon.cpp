#include "decode_neon.h"
#include "linear_dgrad_int8.h"

namespace nf4::cpu {

const GemmKernel kLinearDgrad_neon = describe_gemm<DgradFp32>(pack_fp32, linear_dgrad_tiles<DgradFp32>);
const GemmKernel kLinearDgradInt8_neon =
    describe_gemm<DgradInt8Fp32>(pack_fp32, linear_dgrad_int8_tiles<DgradInt8Fp32>);

}  // namespace nf4::cpu
