#include "decode_scalar.h"
#include "linear_dgrad.h"

namespace nf4 {

const GemmKernel kLinearDgrad_scalar = describe_gemm<DgradFp32>(pack_any, linear_dgrad_tiles<DgradFp32>);

}  // namespace nf4
