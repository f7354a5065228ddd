"""The environment that makes this machine compute as one without bf16 instructions, for a process of its own."""

AVX2 = {
    "NF4KERNELS_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
