#include "decode_avx512.h"
#include "lora_inner.h"

namespace nf4::cpu {
namespace {

// 32 elements of d: a lane sums two products at a time. They are exact and the sums fp32, as in InnerFp32, but
// subnormals count as zero.
template <class>
struct InnerBf16 {
  using Vector = __m512bh;
  static constexpr int kElements = 2 * Isa::L;
  template <class T>
  static Vector load(const T* p) {
    return (Vector)_mm512_loadu_si512(p);
  }
  static Isa::F multiply_add(Vector a, Vector b, Isa::F acc) { return _mm512_dpbf16_ps(acc, a, b); }
};

// Columns d and d+1 of each rank meet in one lane.
struct PackedBf16 {
  using Element = BFloat16;
  static constexpr int kStep = 2;
  static Isa::F multiply_add(const Element* p, Isa::F pairs, Isa::F acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)pairs, (__m512bh)Isa::broadcast_pair(p));
  }
  template <class T>
  static void pack_row(const T* row, const T* next, int ranks, Element* packed) {
    const __mmask16 mask = __mmask16((1u << ranks) - 1);
    const __m256i first = _mm256_maskz_loadu_epi16(mask, row);
    const __m256i second = _mm256_maskz_loadu_epi16(next == nullptr ? 0 : mask, next == nullptr ? row : next);
    const Isa::I high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    _mm512_store_si512(packed, _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
  }
};

}  // namespace

void lora_inner_avx512_bf16(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end) {
  lora_inner_rows<InnerBf16, PackedBf16>(args, m_begin, m_end);
}

}  // namespace nf4::cpu
