#include "decode_neon.h"
#include "linear.h"
#include "linear_gemv.h"

namespace nf4::cpu {

const GemvKernel kGemv_neon{kGemvMaxM, gemv_row_bytes, gemv_pack, linear_gemv};
const GemmKernel kLinear_neon = describe_gemm<LinearFp32>(pack_fp32, linear_tiles<LinearFp32>);

}  // namespace nf4::cpu
