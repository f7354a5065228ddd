#include "decode_avx2.h"
#include "linear.h"
#include "linear_gemv.h"

namespace nf4 {

const GemvKernel kGemv_avx2{1, int(sizeof(float)), gemv_pack_x, gemv_columns};
const GemmKernel kLinear_avx2 = describe_gemm<LinearFp32>(pack_any, linear_tiles<LinearFp32>);

}  // namespace nf4
