#include "codes_neon_bf16.h"
#include "lora_grad.h"

namespace nf4::cpu {
namespace {

// Rows m and m+1 of each column meet in one lane. The products are exact and the sums fp32, as in GradFp32, but they
// are rounded to odd, and subnormals count as zero.
template <class>
struct GradBf16 {
  using Element = BFloat16;
  static constexpr int kStep = 2;
  static Isa::F multiply_add(const Element* p, Isa::F pairs, Isa::F acc) { return add_pairs(p, pairs, acc); }
  // The first c_count of 8 elements; zeros after them, and where there is no row.
  static uint16x8_t load_8(const void* row, int64_t begin, int64_t c_count) {
    const auto* p = static_cast<const Element*>(row) + begin;
    if (row != nullptr && begin + 8 <= c_count) return Isa::load_bits(p);
    uint16_t some[8] = {};
    for (int64_t c = 0; row != nullptr && begin + c < c_count; ++c) some[c] = p[c].bits;
    return Isa::load_bits(some);
  }
  static void load(const void* row, const void* next, int64_t c_count, Element* out) {
    for (int c = 0; c < kGradTileC; c += 8)
      Isa::store_pairs_of_bits(out + 2 * c, load_8(row, c, c_count), load_8(next, c, c_count));
  }
};

}  // namespace

const LoraGradKernel kLoraGrad_neon_bf16{lora_grad_tiles<GradBf16>, kGradTileC, /*inner_dtype=*/Dtype::kBFloat16};

}  // namespace nf4::cpu
