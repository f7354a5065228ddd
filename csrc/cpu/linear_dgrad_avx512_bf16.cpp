#include "gemm_avx512_bf16.h"
#include "linear_dgrad.h"
#include "linear_dgrad_codes.h"
#include "linear_dgrad_int8.h"

namespace nf4::cpu {
namespace {

// bf16 slices are [n/2][L even k | L odd k][2]: rows n and n+1 of W meet in one lane.
struct DgradBf16 : Bf16Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kDgradGroup;
  static void decode_slice(const Weight& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, Element* slice) {
    const Isa::Table table = Isa::load_table(w.code);
    for (int64_t i = 0; i < n_count; i += 2) {
      Isa::F even, odd, next_even = Isa::zero(), next_odd = Isa::zero();
      prefetch_row(w, n + i, k);
      prefetch_row(w, n + i + 1, k);
      decode_even_odd(w, table, n + i, k, k_count, even, odd);
      if (n + i + 1 < w.N) decode_even_odd(w, table, n + i + 1, k, k_count, next_even, next_odd);
      store_pairs(slice + i * kTileK, even, next_even);
      store_pairs(slice + i * kTileK + 2 * Isa::L, odd, next_odd);
    }
  }
};

struct DgradInt8Bf16 : Bf16Core {
  using Factor = LoraA<EvenThenOdd>;
  static constexpr int kGroup = kInt8Group;
  static void store_rows(Element* slice, const Isa::F (&even)[2], const Isa::F (&odd)[2]) {
    store_pairs(slice, even[0], even[1]);
    store_pairs(slice + 2 * Isa::L, odd[0], odd[1]);
  }
};

}  // namespace

const GemmKernel kLinearDgradInt8_avx512_bf16 =
    describe_gemm<DgradInt8Bf16>(pack_bf16, linear_dgrad_int8_tiles<DgradInt8Bf16>);
const GemmKernel kLinearDgrad_avx512_bf16 = describe_gemm<DgradBf16>(pack_bf16, linear_dgrad_tiles<DgradBf16>);
const GemmKernel kLinearDgradCodes_avx512_bf16 =
    describe_gemm<DgradCodes<kMinBlockSize>>(dgrad_codes_pack, linear_dgrad_codes);

}  // namespace nf4::cpu
