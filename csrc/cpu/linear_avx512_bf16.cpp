#include "gemm_avx512_bf16.h"
#include "linear.h"

namespace nf4 {
namespace {

// bf16 slices are [k/2][tile_cols][2].
struct LinearBf16 : Bf16Core {
  static void store_column_pair(Element* out, Isa::F even, Isa::F odd) { store_pairs(out, even, odd); }
};

}  // namespace

void linear_gemm_avx512_bf16(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  linear_tiles<LinearBf16>(args, tile_begin, tile_end, workspace);
}

}  // namespace nf4
