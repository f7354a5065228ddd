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

}  // namespace

void lora_inner_avx512_bf16(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end) {
  lora_inner_rows<InnerBf16>(args, m_begin, m_end);
}

}  // namespace nf4::cpu
