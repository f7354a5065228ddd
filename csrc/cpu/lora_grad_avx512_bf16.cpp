#include "decode_avx512.h"
#include "lora_grad.h"

namespace nf4::cpu {
namespace {

// Rows m and m+1 of each column meet in one lane. The products are exact and the sums fp32, as in GradFp32, but
// subnormals count as zero.
template <class>
struct GradBf16 {
  using Element = BFloat16;
  static constexpr int kStep = 2;
  static Isa::F multiply_add(const Element* p, Isa::F pairs, Isa::F acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)pairs, (__m512bh)Isa::broadcast_pair(p));
  }
  static void load(const void* row, const void* next, int64_t c_count, Element* out) {
    for (int v = 0; v < 2; ++v) {
      const int64_t here = c_count - v * Isa::L;
      const __mmask16 mask = here >= Isa::L ? 0xffff : here <= 0 ? 0 : __mmask16((1 << here) - 1);
      const __m256i first = _mm256_maskz_loadu_epi16(mask, static_cast<const Element*>(row) + v * Isa::L);
      const __m256i second = _mm256_maskz_loadu_epi16(
          next == nullptr ? 0 : mask, static_cast<const Element*>(next == nullptr ? row : next) + v * Isa::L);
      const Isa::I high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
      _mm512_store_si512(out + 2 * v * Isa::L, _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
    }
  }
};

}  // namespace

const LoraGradKernel kLoraGrad_avx512_bf16{lora_grad_tiles<GradBf16>, kGradTileC, /*inner_dtype=*/Dtype::kBFloat16};

}  // namespace nf4::cpu
