#include "decode_avx512.h"
#include "linear_dgrad.h"

namespace nf4::cpu {

const GemmKernel kLinearDgrad_avx512 = describe_gemm<DgradFp32>(pack_fp32, linear_dgrad_tiles<DgradFp32>);

}  // namespace nf4::cpu
