#include "decode_scalar.h"
#include "gemm.h"

namespace nf4 {

static void pack(const void* x, Dtype dtype, int64_t rows, int64_t depth, int64_t tile_begin, int64_t tile_end,
                 void* panel) {
  with_type(dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    pack_tiles<Fp32Core>(in, rows, depth, tile_begin, tile_end, static_cast<float*>(panel));
  });
}

const GemmKernels kGemm_scalar = describe_gemm<Fp32Core>(pack, linear_gemm_scalar, linear_dgrad_gemm_scalar);

}  // namespace nf4
