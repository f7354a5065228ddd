#include "decode_avx512.h"
#include "linear.h"
#include "linear_gemv.h"
#include "linear_gemv_codes_int.h"
#include "linear_gemv_int8.h"
#include "linear_int8.h"

namespace nf4::cpu {

const GemvKernel kGemv_avx512{kGemvMaxM, gemv_row_bytes, gemv_pack, linear_gemv};
const GemvKernel kGemvInt_avx512 = describe_gemv_codes<IntTerms>();
const GemvKernel kGemvInt8_avx512{kGemvMaxM, gemv_row_bytes, gemv_int8_pack, gemv_int8};
const GemmKernel kLinearInt8_avx512 = describe_gemm<LinearFp32>(pack_fp32, linear_int8_tiles<LinearFp32>);
const GemmKernel kLinear_avx512 = describe_gemm<LinearFp32>(pack_fp32, linear_tiles<LinearFp32>);

}  // namespace nf4::cpu
