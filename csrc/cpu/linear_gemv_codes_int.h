// linear in bf16 and fp16, M <= 16, in whole numbers, where vdpbf16ps is slow or missing: linear_gemv_codes.h's terms.
//
// Read first   linear_gemv_codes.h, then linear_gemv_int.h, whose numbers and exactness these are.
// The trick    An Emerald Rapids core takes 2.8 cycles for a vdpbf16ps, and both of its vector ports meanwhile; vpdpwssd
//              multiplies and adds as many words in 0.6. 8 products fit a lane of 32 bits, which is what a lane has of
//              128 k, all by one step of x.
// Rejected     vdpbf16ps on that core, 4096x4096 in a cache: M = 1: 1.03 against 0.79 ms, M = 2: 1.50 and 1.00, M = 4:
//              2.44 and 1.30; tiles take 1.6 at any M <= 16. Without VNNI, linear_gemv_int.h, 2048x2048: M = 1: 271
//              against 187 us, M = 4: 548 and 406, M = 16: 2.3 and 1.6 ms.
// Needs        a code_run. A row of x with NaN or inf gives a row of NaN.
//
//   panel, of 128 k of a row of x: 4 x 32 words in the order of linear_gemv_codes.h, then 16 steps, lane by lane
#pragma once

#include "linear_gemv_codes.h"
#include "whole_numbers.h"

namespace nf4::cpu {
namespace {

struct IntTerms {
  static constexpr int kMaxM = kGemvIntMaxM;
#ifdef __AMX_BF16__
  static constexpr bool kGathersScales = true;
#else
  static constexpr bool kGathersScales = false;  // up to Ice Lake gathers are slow: the microcode against Downfall
#endif
  using Sum = Isa::I;
  static constexpr int64_t kStepsAt = kGemvGroupK * 2, kGroupBytes = kStepsAt + Isa::L * 4;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Isa::I load_table(const GemmArgs& args) {
    alignas(64) int16_t levels[2 * kLevels];
    for (int i = 0; i < 2 * kLevels; ++i) levels[i] = int16_t(whole_number(args.int_code.levels[i % kLevels]));
    return _mm512_load_si512(levels);
  }
  static float code_scale(const GemmArgs& args) { return args.int_code.scale; }
  static Sum add_products(Sum sum, Isa::I levels, const char* x) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, levels, _mm512_loadu_si512(x));
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(levels, _mm512_loadu_si512(x)));
#endif
  }
  static Isa::F value(Sum sum, const char* group) {
    return Isa::mul(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(group + kStepsAt));
  }
  static void pack_group(const void* x, Dtype dtype, int64_t at, int64_t count, Isa::I quarters[4], char* group) {
    float steps[2] = {};
    with_type(dtype, [&](auto t) {
      const auto* in = static_cast<const decltype(t)*>(x) + at;
      for (int half = 0; half < 2; ++half) {
        quarters[2 * half] = quarters[2 * half + 1] = zero();
        if (kWholeGroupK * half >= count) continue;
        const WholeStep step = step_of(in + kWholeGroupK * half);
        steps[half] = step.step;
        for (int q = 2 * half; q < 2 * half + 2; ++q) {
          Isa::F even, odd;
          Isa::load_pairs(in + 32 * q, even, odd);
          const Isa::I high = _mm512_slli_epi32(_mm512_cvtps_epi32(Isa::mul(odd, Isa::set1(step.factor))), 16);
          const Isa::I low = _mm512_cvtps_epi32(Isa::mul(even, Isa::set1(step.factor)));
          quarters[q] = _mm512_mask_mov_epi16(high, 0x55555555, low);
        }
      }
    });
    _mm512_storeu_ps(group + kStepsAt, broadcast_halves(steps, steps + 1));
  }
};

}  // namespace
}  // namespace nf4::cpu
