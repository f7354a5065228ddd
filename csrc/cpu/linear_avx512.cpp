#include "decode_avx512.h"
#include "linear.h"
#include "linear_gemv.h"

namespace nf4 {

void gemv_pack_avx512(const void* x, Dtype dtype, int64_t rows, int64_t depth, void* panel) {
  gemv_pack_x(x, dtype, rows, depth, panel);
}

void linear_gemv_avx512(const GemmArgs& args, int64_t n_begin, int64_t n_end) { gemv_columns(args, n_begin, n_end); }

void linear_gemm_avx512(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, void* workspace) {
  linear_tiles<LinearFp32>(args, tile_begin, tile_end, workspace);
}

}  // namespace nf4
