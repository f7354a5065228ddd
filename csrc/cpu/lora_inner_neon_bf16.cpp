#include "codes_neon_bf16.h"
#include "lora_inner.h"

namespace nf4::cpu {
namespace {

// 16 elements of d: a lane sums two products at a time. They are exact and the sums fp32, as in InnerFp32, but they are
// rounded to odd, and subnormals count as zero.
template <class>
struct InnerBf16 {
  struct Vector {
    bfloat16x8_t low, high;
  };
  static constexpr int kElements = 2 * Isa::L;
  template <class T>
  static Vector load(const T* p) {
    const auto* elements = reinterpret_cast<const BFloat16*>(p);
    return {load_bf16(elements), load_bf16(elements + 8)};
  }
  static Isa::F multiply_add(Vector a, Vector b, Isa::F acc) {
    return {vbfdotq_f32(acc.low, a.low, b.low), vbfdotq_f32(acc.high, a.high, b.high)};
  }
};

// Columns d and d+1 of each rank meet in one lane.
struct PackedBf16 {
  using Element = BFloat16;
  static constexpr int kStep = 2;
  static Isa::F multiply_add(const Element* p, Isa::F pairs, Isa::F acc) { return add_pairs(p, pairs, acc); }
  template <class T>
  static void pack_row(const T* row, const T* next, int ranks, Element* packed) {
    for (int j = 0; j < kTileR; ++j) {
      packed[2 * j] = j < ranks ? from_float<Element>(to_float(row[j])) : Element{0};
      packed[2 * j + 1] = j < ranks && next != nullptr ? from_float<Element>(to_float(next[j])) : Element{0};
    }
  }
};

}  // namespace

void lora_inner_neon_bf16(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end) {
  lora_inner_rows<InnerBf16, PackedBf16>(args, m_begin, m_end);
}

}  // namespace nf4::cpu
