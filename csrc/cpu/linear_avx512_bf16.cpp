#include "codes_avx512.h"
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

// Of linear_gemv_codes.h.
struct Bf16Terms {
  static constexpr int kMaxM = kGemvMaxM;
  static constexpr bool kGathersScales = false;  // Zen 4 takes many cycles for one
  using Sum = Isa::F;
  static constexpr int64_t kGroupBytes = kGemvGroupK * 2;
  static Sum zero() { return Isa::zero(); }
  static Isa::I load_table(const GemmArgs& args) { return load_code_table(args.bf16_code); }
  static float code_scale(const GemmArgs& args) { return args.bf16_code.scale; }
  static Sum add_products(Sum sum, Isa::I levels, const char* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)levels, (__m512bh)_mm512_loadu_si512(x));
  }
  static Isa::F value(Sum sum, const char*) { return sum; }
  static void pack_group(const void* x, Dtype, int64_t at, int64_t count, Isa::I quarters[4], char*) {
    const auto* in = static_cast<const BFloat16*>(x) + at;
    for (int q = 0; q < 4; ++q) quarters[q] = 32 * q < count ? _mm512_loadu_si512(in + 32 * q) : _mm512_setzero_si512();
  }
};

}  // namespace

const GemvKernel kGemvCodes_avx512_bf16 = describe_gemv_codes<Bf16Terms>();
const GemmKernel kLinearInt8_avx512_bf16 = describe_gemm<LinearBf16>(pack_bf16, linear_int8_tiles<LinearBf16>);
const GemmKernel kLinear_avx512_bf16 = describe_gemm<LinearBf16>(pack_bf16, linear_tiles<LinearBf16>);
const GemmKernel kLinearCodes_avx512_bf16 = describe_gemm<LinearCodes<kMinBlockSize>>(linear_codes_pack, linear_codes);

}  // namespace nf4::cpu
