#include "gemm_avx512_bf16.h"

namespace nf4 {

static void pack(const void* x, Dtype, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end, void* panel) {
  pack_tiles<Bf16Core>(static_cast<const BFloat16*>(x), rows, depth, tile_begin, tile_end,
                       static_cast<BFloat16*>(panel));
}

const GemmKernels kGemm_avx512_bf16 =
    describe_gemm<Bf16Core>(pack, linear_gemm_avx512_bf16, linear_dgrad_gemm_avx512_bf16);

}  // namespace nf4
