#include "decode_avx512.h"
#include "gemm.h"

namespace nf4 {

const GemmKernels kGemm_avx512 = describe_gemm<Fp32Core>(pack_fp32, linear_gemm_avx512, linear_dgrad_gemm_avx512);

}  // namespace nf4
