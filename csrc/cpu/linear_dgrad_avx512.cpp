#include "decode_avx512.h"
#include "linear_dgrad.h"

namespace nf4 {

void linear_dgrad_gemm_avx512(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  linear_dgrad_tiles<DgradFp32>(args, tile_begin, tile_end, workspace);
}

}  // namespace nf4
