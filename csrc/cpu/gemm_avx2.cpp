#include "decode_avx2.h"
#include "gemm.h"

namespace nf4 {

const GemmKernels kGemm_avx2 = describe_gemm<Fp32Core>(pack_fp32, linear_gemm_avx2, linear_dgrad_gemm_avx2);

}  // namespace nf4
