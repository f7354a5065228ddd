#include "decode_scalar.h"
#include "gemm.h"

namespace nf4 {

const GemmKernels kGemm_scalar = describe_gemm<Fp32Core>(pack_fp32, linear_gemm_scalar, linear_dgrad_gemm_scalar);

}  // namespace nf4
