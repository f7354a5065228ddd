#include "decode_avx512.h"
#include "gemm.h"

namespace nf4 {

static void pack(const void* x, Dtype dtype, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end,
                 void* panel) {
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    pack_tiles<Fp32Core>(in, rows, depth, tile_begin, tile_end, static_cast<float*>(panel));
  });
}

const GemmKernels kGemm_avx512 = describe_gemm<Fp32Core>(pack, linear_gemm_avx512, linear_dgrad_gemm_avx512);

}  // namespace nf4
