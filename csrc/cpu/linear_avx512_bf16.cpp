#include "codes_avx512_bf16.h"
#include "gemm_avx512_bf16.h"
#include "linear.h"
#include "linear_codes.h"
#include "linear_gemv_codes.h"
#include "linear_int8.h"

namespace nf4::cpu {
namespace {

// bf16 slices are [k/2][kTileN][2].
struct LinearBf16 : Bf16Core {
  using Factor = LoraB;
  static constexpr int kGroup = 1;
  static void store_k_pair(Element* out, Isa::F even, Isa::F odd) { store_pairs(out, even, odd); }
};

}  // namespace

const GemvKernel kGemvCodes_avx512_bf16 = describe_gemv_codes<Bf16Terms>();
const GemmKernel kLinearInt8_avx512_bf16 = describe_gemm<LinearBf16>(pack_bf16, linear_int8_tiles<LinearBf16>);
const GemmKernel kLinear_avx512_bf16 = describe_gemm<LinearBf16>(pack_bf16, linear_tiles<LinearBf16>);
const GemmKernel kLinearCodes_avx512_bf16 = describe_gemm<LinearCodes<kMinBlockSize>>(linear_codes_pack, linear_codes);

}  // namespace nf4::cpu
