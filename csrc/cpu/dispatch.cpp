// Which kernels a CPU runs: the table, one row an instruction set; what each row needs of the CPU; how to force one.
#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace nf4::cpu {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return;
    unsigned xcr0, high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    const bool os_ymm = (xcr0 & 0x06) == 0x06, os_zmm = (xcr0 & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    avx2 = os_ymm && fma && f16c && (b >> 5 & 1);
    avx512 = avx2 && os_zmm && (b & (f | dq | bw | vl)) == (f | dq | bw | vl);
    avx512_vnni = avx512 && (c >> 11 & 1);
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512_bf16 = avx512 && (a >> 5 & 1);
  }
};
const Features& features() {
  static const Features detected;
  return detected;
}
bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
bool has_avx512_bf16() { return features().avx512_bf16; }
bool has_amx_bf16() {
  const char* why_not;
  return has_avx512_bf16() && features().avx512_vnni && (detect_amx(&why_not) & kAmxBf16) != 0;
}
#elif defined(__aarch64__)
bool has_neon_bf16() {
#if defined(__linux__)
  // HWCAP2_BF16, which older headers lack: bfdot and bfmmla. HWCAP_ASIMDFHM: fmlal, which no known CPU with bf16 lacks.
  constexpr unsigned long kBf16 = 1ul << 14, kFhm = 1ul << 23;
  return (getauxval(AT_HWCAP2) & kBf16) != 0 && (getauxval(AT_HWCAP) & kFhm) != 0;
#else
  return false;
#endif
}
#endif

constexpr ProductKernels kScalar{&kGemv_scalar, &kLinear_scalar, &kLinearDgrad_scalar, &kLoraGrad_scalar,
                                 lora_inner_scalar};
#if defined(__x86_64__)
constexpr ProductKernels kAvx2{&kGemv_avx2, &kLinear_avx2, &kLinearDgrad_avx2, &kLoraGrad_avx2, lora_inner_avx2};
constexpr ProductKernels kAvx512{&kGemv_avx512, &kLinear_avx512, &kLinearDgrad_avx512, &kLoraGrad_avx512,
                                 lora_inner_avx512};
constexpr ProductKernels kAvx2Int{&kGemvInt_avx2,  &kLinear_avx2, &kLinearDgrad_avx2, &kLoraGrad_avx2,
                                  lora_inner_avx2, false,         /*int_code_run=*/64};
constexpr ProductKernels kAvx512Int{&kGemvInt_avx512,  &kLinear_avx512, &kLinearDgrad_avx512, &kLoraGrad_avx512,
                                    lora_inner_avx512, false,           /*int_code_run=*/16};
constexpr ProductKernels kBf16{&kGemv_avx512, &kLinear_avx512_bf16, &kLinearDgrad_avx512_bf16, &kLoraGrad_avx512_bf16,
                               lora_inner_avx512_bf16};
constexpr ProductKernels kBf16Codes{&kGemvCodes_avx512_bf16, &kLinearCodes_avx512_bf16, &kLinearDgradCodes_avx512_bf16,
                                    &kLoraGrad_avx512_bf16,  lora_inner_avx512_bf16,    /*needs_bf16_code=*/true};
// CPUs with AMX take 2.8 cycles for a vdpbf16ps (Emerald Rapids), so that fp32 is faster but for the few rows of codes:
// lora_grad 1.2 to 1.6 times, lora_inner 1.0 to 1.4, linear_dgrad of scaled weights 1.1 times.
constexpr ProductKernels kAmxCodes{&kGemvInt_amx_bf16, &kLinearCodes_avx512_bf16, &kLinearDgradCodes_avx512_bf16,
                                   &kLoraGrad_avx512,  lora_inner_avx512,         /*needs_bf16_code=*/true,
                                   /*int_code_run=*/16};
constexpr ProductKernels kTiles{nullptr, &kLinear_amx_bf16, &kLinearDgrad_amx_bf16, nullptr, nullptr};
#elif defined(__aarch64__)
constexpr ProductKernels kNeon{&kGemv_neon, &kLinear_neon, &kLinearDgrad_neon, &kLoraGrad_neon, lora_inner_neon};
constexpr ProductKernels kNeonFp16{&kGemv_neon_bf16, &kLinear_neon, &kLinearDgrad_neon, &kLoraGrad_neon,
                                   lora_inner_neon};
constexpr ProductKernels kNeonBf16{&kGemv_neon, &kLinear_neon_bf16, &kLinearDgrad_neon_bf16, &kLoraGrad_neon_bf16,
                                   lora_inner_neon_bf16};
constexpr ProductKernels kNeonBf16Codes{&kGemvCodes_neon_bf16, &kLinear_neon_bf16,   &kLinearDgrad_neon_bf16,
                                        &kLoraGrad_neon_bf16,  lora_inner_neon_bf16, /*needs_bf16_code=*/true};
#endif

#define NF4_INT8_FP32(isa) {&kLinearInt8_##isa, &kLinearDgradInt8_##isa}
constexpr Int8Kernels kScalarInt8{quantize_int8_scalar, dequantize_int8_scalar, NF4_INT8_FP32(scalar),
                                  NF4_INT8_FP32(scalar), &kGemvInt8_scalar};
#if defined(__x86_64__)
constexpr Int8Kernels kAvx2Int8{quantize_int8_avx2, dequantize_int8_avx2, NF4_INT8_FP32(avx2), NF4_INT8_FP32(avx2),
                                &kGemvInt8_avx2};
constexpr Int8Kernels kAvx512Int8{quantize_int8_avx512, dequantize_int8_avx512, NF4_INT8_FP32(avx512),
                                  NF4_INT8_FP32(avx512), &kGemvInt8_avx512};
constexpr Int8Kernels kAvx512Bf16Int8{quantize_int8_avx512, dequantize_int8_avx512, NF4_INT8_FP32(avx512),
                                      NF4_INT8_FP32(avx512_bf16), &kGemvInt8_avx512};
#elif defined(__aarch64__)
constexpr Int8Kernels kNeonInt8{quantize_int8_neon, dequantize_int8_neon, NF4_INT8_FP32(neon), NF4_INT8_FP32(neon),
                                &kGemvInt8_neon};
#endif

// Best first.
const CpuKernels kTable[] = {
// name, is_supported, quantize, dequantize, combine_experts, int8, products of fp32, of bf16, of bf16's codes, on tiles
#if defined(__x86_64__)
    {"amx_bf16",
     has_amx_bf16,
     quantize_avx512,
     dequantize_avx512,
     &kCombineExperts_avx512,
     &kAvx512Bf16Int8,
     {kAvx512, kAvx512, kAmxCodes, kTiles}},
    {"avx512_bf16",
     has_avx512_bf16,
     quantize_avx512,
     dequantize_avx512,
     &kCombineExperts_avx512,
     &kAvx512Bf16Int8,
     {kAvx512, kBf16, kBf16Codes}},
    {"avx512",
     has_avx512,
     quantize_avx512,
     dequantize_avx512,
     &kCombineExperts_avx512,
     &kAvx512Int8,
     {kAvx512, kAvx512, kAvx512Int}},
    {"avx2", has_avx2, quantize_avx2, dequantize_avx2, &kCombineExperts_avx2, &kAvx2Int8, {kAvx2, kAvx2, kAvx2Int}},
#elif defined(__aarch64__)
    {"neon_bf16",
     has_neon_bf16,
     quantize_neon,
     dequantize_neon_bf16,
     &kCombineExperts_neon,
     &kNeonInt8,
     {kNeonFp16, kNeonBf16, kNeonBf16Codes}},
    {"neon", always, quantize_neon, dequantize_neon, &kCombineExperts_neon, &kNeonInt8, {kNeon, kNeon, kNeon}},
#endif
    {"scalar",
     always,
     quantize_scalar,
     dequantize_scalar,
     &kCombineExperts_scalar,
     &kScalarInt8,
     {kScalar, kScalar, kScalar}},
};

const CpuKernels* best() {
  for (const CpuKernels& row : kTable)
    if (row.is_supported()) return &row;
  return nullptr;  // not reached: scalar is always supported
}

std::atomic<const CpuKernels*> active{best()};

std::string supported_names() {
  std::string names;
  for (const CpuKernels& row : kTable)
    if (row.is_supported()) names += names.empty() ? row.name : std::string(" ") + row.name;
  return names;
}

}  // namespace

const CpuKernels& active_kernels() { return *active.load(std::memory_order_relaxed); }
bool runs_best_isa() {
  static const CpuKernels* const fastest = best();
  return &active_kernels() == fastest;
}

}  // namespace nf4::cpu

#define NF4_EXPORT __attribute__((visibility("default")))

extern "C" {

NF4_EXPORT const char* nf4kernels_cpu_isa() { return nf4::cpu::active_kernels().name; }

NF4_EXPORT const char* nf4kernels_cpu_isa_list() {
  static const std::string names = nf4::cpu::supported_names();
  return names.c_str();
}

// Null, or what is wrong with `name`.
NF4_EXPORT const char* nf4kernels_force_cpu_isa(const char* name) {
  thread_local std::string error;
  for (const nf4::cpu::CpuKernels& row : nf4::cpu::kTable) {
    if (std::strcmp(row.name, name) != 0 || !row.is_supported()) continue;
    nf4::cpu::active.store(&row);
    return nullptr;
  }
  error = std::string("must be one of ") + nf4::cpu::supported_names() + " on this machine, got " + name;
  return error.c_str();
}

}  // extern "C"
