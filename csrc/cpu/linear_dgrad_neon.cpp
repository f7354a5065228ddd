#include "decode_neon.h"
#include "linear_dgrad.h"

namespace nf4::cpu {

const GemmKernel kLinearDgrad_neon = describe_gemm<DgradFp32>(pack_fp32, linear_dgrad_tiles<DgradFp32>);

}  // namespace nf4::cpu
