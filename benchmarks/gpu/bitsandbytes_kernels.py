"""The kernels that bitsandbytes 0.50.2 launches for a product; bitsandbytes_counts has what nvcc made of them.

Which one it launches is what csrc/gemm_4bit.cu, csrc/gemm_4bit_sm80.cu and backends/cuda/ops.py of that release say,
for bf16 and weights of 4M and more with K a multiple of 128. Up to M = 7 it is taken to launch its own always (at 6 and
7 it does not for a few shapes on HBM).
"""

from functools import cache
from pathlib import Path

from .cards import Card
from .cuda_report import Kernel, read_csv
from .launches import Launch

COUNTS = Path(__file__).with_name("bitsandbytes.csv")
SIMT, MMA = "gemm_4bit_simt<__nv_bfloat16, {}>", "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, {}, {}, {}>"
SIMT_WARPS, MMA_WARPS = 4, 8


@cache
def counts(arch: str) -> dict[str, Kernel]:
    return {kernel.kernel: kernel for kernel in read_csv(COUNTS) if kernel.arch == arch}


def fused(card: Card, N: int, K: int, M: int) -> tuple[Kernel, Launch] | None:
    """Its fused kernel; None where it dequantizes the whole weight and calls cuBLAS."""
    if not _is_fused(card, N, K, M):
        return None
    if _is_simt(card, N, K, M):
        rows = min(M, 8)
        grid = (-(-N // SIMT_WARPS), -(-M // rows), 1)
        return counts(card.arch)[SIMT.format(rows)], Launch(SIMT.format(rows), grid, 32 * SIMT_WARPS, 0)
    mt, nt, kc = _tile(card, N, K, M)
    shared = 2 * (mt + nt) * (kc + 8) * 2
    name = MMA.format(mt, nt, kc)
    grid = (-(-M // mt), -(-N // nt), 1)
    return counts(card.arch)[name], Launch(name, grid, 32 * MMA_WARPS, shared)


def _is_fused(card: Card, N: int, K: int, M: int) -> bool:
    n, sms = -(-N // 64), card.sms
    if card.capability in (87, 110):
        return M <= 4
    if card.capability // 10 == 10:
        return (32 if n >= 3 * sms else 8 if n >= sms and K < N else 4) >= M
    if M < 8 or M > 512:
        return M < 8
    if card.capability == 80:
        return _most_on_sm80(n, sms, N, K) >= M
    if card.capability == 86:
        return (128 if n >= sms else 64 if n >= sms // 2 else 16) >= M
    if card.capability // 10 == 9:
        square = 0 if K >= N and n * 4 < sms * 3 else 16
        return (64 if n >= 3 * sms else 48 if n >= 2 * sms else 32 if n >= sms else square if n >= sms // 2 else 0) >= M
    if card.capability == 121 and n >= sms:
        return M <= 256
    if card.capability == 120:
        if n >= 2 * sms:
            return (256 if n >= 3 * sms else 128) >= M
        if n * 5 >= sms * 4:
            return (96 if K >= N else 64) >= M
        if n >= sms // 2:
            return (64 if 2 * K >= N and n >= 128 else 8) >= M
        return (16 if K > 2 * N and n > 64 else 8) >= M
    return _most_on_sm89(n, sms, N, K) >= M


def _most_on_sm80(n: int, sms: int, N: int, K: int) -> int:
    if n >= sms:
        return 128 if n >= 3 * sms else 64 if K < N else 32
    if (K >= 3 * N and n * 4 > sms) or (K == N and n >= 48 and n * 5 < sms * 3):
        return 0
    if n * 2 < sms and (K <= N or n * 3 >= sms):
        return 128 if K <= N else 0
    return 128 if n >= sms // 2 and K < N else 16


def _most_on_sm89(n: int, sms: int, N: int, K: int) -> int:
    tall = K > 2 * N
    if n >= 2 * sms:
        return 256 if n >= 3 * sms else 128
    if n * 5 >= sms * 4:
        return 128 if tall or n >= 200 or (K >= N and sms >= 60) else 32 if K >= N else 64
    if n >= sms // 2:
        return 64 if tall else 8 if n >= 64 else 32
    if K > N and n <= 48:
        return 12 if K >= 3 * N else 10
    return 16 if tall or n < 48 else 8


def _is_simt(card: Card, N: int, K: int, M: int) -> bool:
    if M <= 3:
        return True
    sms, blocks, c = card.sms, -(-M // 32) * -(-N // 64), card.capability
    if (M == 4 and c in (86, 89, 120) and sms >= 48) or (M <= 8 and blocks * 3 <= sms * 2):
        return True
    if M == 4 and card.is_hbm and c // 10 != 12 and blocks <= sms:
        return True
    if M <= 6 and blocks >= sms and ((c == 89 and sms >= 60) or (c in (120, 121) and sms >= 48)):
        return True
    if not card.is_hbm and K > N and M <= 17 and blocks * 3 < sms:
        return True
    return (M <= 16 and blocks * 4 <= sms) or (M <= 32 and blocks * 8 <= sms)


def _tile(card: Card, N: int, K: int, M: int) -> tuple[int, int, int]:
    """(tokens, weight rows, k) of a block."""
    sms, c, hbm = card.sms, card.capability, card.is_hbm
    m32, m64, m128, n64, n128 = -(-M // 32), -(-M // 64), -(-M // 128), -(-N // 64), -(-N // 128)
    wasted_128, enough_128 = 0 < M % 128 <= 64, m128 * n128 * 4 >= sms * 3
    wasted_32 = m32 > m64 and m64 * n64 >= sms
    takes_32 = M <= 128 and not (wasted_32 and enough_128) and m32 * n64 >= 2 * sms and m32 * 32 < m64 * 64
    if (M < 48 and not wasted_32) or takes_32:
        mt = 32
    elif (wasted_128 or not enough_128) and m64 * n64 > m128 * n128:
        mt = 64
    else:
        mt = 128
    low_86, many_120 = c == 86 and sms <= 72, c // 10 == 12 and sms >= 150
    if mt == 64:
        if low_86 and K >= N and not wasted_128 and m128 * n128 * 2 >= sms:
            mt = 128
        elif (many_120 and m64 * n64 < sms) or (hbm and m64 * n64 < sms // 2):
            mt = 32
        elif not hbm and K * 2 < N and sms >= 60 and sms // 4 <= m64 * n64 < sms * 3 // 4:
            return 32, 64, 128
    if mt == 32:
        return _tile_of_32(card, N, K, m32, m64, n64, n128, many_120)
    if mt == 64:
        nt = 64 if c // 10 in (9, 10) or m64 * n128 < sms else 128
        return 64, nt, 128 if nt == 64 and (c // 10 == 10 or (not hbm and K >= N)) else 64
    return 128, 128 if m128 * n128 >= (sms // 2 if low_86 else sms) else 64, 64


def _tile_of_32(card: Card, N: int, K: int, m32: int, m64: int, n64: int, n128: int, many_120: bool):
    sms, is_86 = card.sms, card.capability == 86
    if card.is_hbm:
        n256 = -(-N // 256)
        return 32, 256 if sms * 3 <= m32 * n256 * 4 and m32 * n256 <= sms else 64, 128
    if m32 >= 2 and m32 * n64 > sms:
        wide = m32 >= 3 and sms < m32 * n128 <= 2 * sms and (is_86 or K * 3 <= N)
        return 32, 128 if wide else 64, 64
    if m32 == 1:
        if sms < n64 < sms + sms // 5:
            return 32, 64, 64
        if is_86 and n64 > 3 * sms:
            return 32, 128, 64
    if not many_120 and m64 * -(-N // 32) <= sms:
        return 64, 32, 128
    return 32, 128 if m32 * n128 * 3 >= 2 * sms else 64, 128
