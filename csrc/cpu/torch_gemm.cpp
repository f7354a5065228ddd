// What torch's GEMM has on this machine, and what is forced of products: the state that choose.h is asked with.
#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "dequantize_gemm.h"

namespace nf4::cpu {
namespace {

std::atomic<int32_t> amx{0};
std::atomic<Forced> forced{Forced::kNothing};
std::atomic<int64_t> wanted_slice_bytes{0};
std::atomic<uint32_t> ran{0};  // a bit for each of Products

}  // namespace

#if defined(__x86_64__) && defined(__linux__)
// Linux gives a process the 8 KB of tiles only when it asks (arch/x86/include/uapi/asm/prctl.h). oneDNN asks too.
static bool asks_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

int32_t detect_amx(const char** why_not) {
  unsigned a, b, c, d;
  const bool has_bf16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);  // and its tiles
  *why_not = "this CPU has no AMX";
  if (!has_bf16) return 0;
  const bool has_fp16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 21 & 1);
  *why_not = "the operating system gives this process no AMX tiles";
  unsigned xcr0 = 0, high;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  constexpr unsigned kTiles = 1u << 17 | 1u << 18;
  if ((xcr0 & kTiles) != kTiles || !asks_for_tiles()) return 0;
  *why_not = has_fp16 ? "" : "this CPU has AMX for bf16 alone";
  return kAmxBf16 | (has_fp16 ? kAmxFp16 : 0);
}
#else
int32_t detect_amx(const char** why_not) {
  *why_not = "AMX is looked for on x86-64 under Linux alone";
  return 0;
}
#endif

int32_t amx_of_torch() { return runs_best_isa() ? amx.load(std::memory_order_relaxed) : 0; }
Forced forced_products() { return forced.load(std::memory_order_relaxed); }
void note(Products products) {
  const uint32_t bit = 1u << int(products);
  if ((ran.load(std::memory_order_relaxed) & bit) == 0) ran.fetch_or(bit, std::memory_order_relaxed);
}

int64_t forced_slice_bytes() { return wanted_slice_bytes.load(std::memory_order_relaxed); }

}  // namespace nf4::cpu

#define NF4_EXPORT __attribute__((visibility("default")))

extern "C" {

// The AMX products of this machine among `allowed`, which torch's build and environment let its GEMM use; from now on
// choices count on them, and why some of these are missing. Bits: 1 bf16, 2 fp16.
NF4_EXPORT int32_t nf4kernels_cpu_use_amx(int32_t allowed, const char** why_not) {
  *why_not = "";
  const int32_t found = allowed == 0 ? 0 : nf4::cpu::detect_amx(why_not) & allowed;
  nf4::cpu::amx.store(found);
  return found;
}

// "" where nothing is forced.
NF4_EXPORT const char* nf4kernels_cpu_products() { return nf4::cpu::kForcedNames[int(nf4::cpu::forced_products())]; }

// Null, or what is wrong with `name`; "" forces nothing.
NF4_EXPORT const char* nf4kernels_force_cpu_products(const char* name) {
  thread_local std::string error;
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(nf4::cpu::kForcedNames[i], name) != 0) continue;
    nf4::cpu::forced.store(nf4::cpu::Forced(i));
    return nullptr;
  }
  error = std::string("must be one of fused dequantize_gemm, got ") + name;
  return error.c_str();
}

// The names of Products that ran since this was called last, each followed by a space.
NF4_EXPORT const char* nf4kernels_cpu_ran() {
  thread_local std::string names;
  names.clear();
  const uint32_t bits = nf4::cpu::ran.exchange(0);
  for (int i = 0; i <= int(nf4::cpu::Products::kDequantizeGemm); ++i)
    if (bits >> i & 1) names += std::string(nf4::cpu::kProductsNames[i]) + " ";
  return names.c_str();
}

// Slices of so many bytes from now on, 0: by the number of threads; returns what was forced before.
NF4_EXPORT int64_t nf4kernels_cpu_slices(int64_t bytes) { return nf4::cpu::wanted_slice_bytes.exchange(bytes); }

// choose.h's row_parts.
NF4_EXPORT int64_t nf4kernels_cpu_row_parts(int64_t rows, int64_t c_tiles, int64_t tile_c, int64_t threads) {
  return nf4::cpu::row_parts(rows, c_tiles, tile_c, threads);
}

// What choose.h says of a product: the name of its Products, and why.
NF4_EXPORT const char* nf4kernels_cpu_choose(bool is_dgrad, int32_t dtype, int64_t M, int32_t code_run, int64_t weights,
                                             bool has_tiles, int32_t amx, int32_t forced, const char** reason) {
  const nf4::cpu::Choice choice =
      nf4::cpu::choose({is_dgrad, nf4::Dtype(dtype), M, code_run, weights, has_tiles, amx, nf4::cpu::Forced(forced)});
  *reason = choice.reason;
  return nf4::cpu::kProductsNames[int(choice.products)];
}

}  // extern "C"
