"""csrc/cpu/choose.h: every product gets kernels that can run it, by M, dtype, scales and AMX alone, with a reason."""

import ctypes
import itertools

import pytest

from nf4kernels.backends import native

FP32, BF16, FP16 = range(3)
NOTHING, FUSED, DEQUANTIZE_GEMM = range(3)
AMX = {FP32: 0, BF16: native.AMX_BF16, FP16: native.AMX_FP16}
DGRAD_CODES_MOST_M = {64: 128, 32: 96, 16: 64}
AMX_LEAST_M, AMX_LEAST_PRODUCTS = 32, 2**24
LARGE = 4096 * 4096
ROWS = (1, 3, 4, 5, 15, 16, 31, 32, 64, 65, 96, 97, 128, 129, 512, 1 << 24)


@pytest.fixture(scope="module")
def choose():
    function = ctypes.CDLL(str(native.CPU_LIBRARY)).nf4kernels_cpu_choose
    function.restype, function.argtypes = ctypes.c_char_p, native.CPU_CHOOSE_ARGUMENTS

    def call(is_dgrad, dtype, M, code_run=64, weights=LARGE, amx=0, forced=NOTHING, has_tiles=False):
        reason = ctypes.c_char_p()
        products = function(is_dgrad, dtype, M, code_run, weights, has_tiles, amx, forced, reason)
        return products.decode(), reason.value.decode()

    return call


@pytest.fixture(scope="module")
def row_parts():
    function = ctypes.CDLL(str(native.CPU_LIBRARY)).nf4kernels_cpu_row_parts
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 4
    return function


def test_threads_share_rows_where_there_are_few_columns(row_parts):
    """The thread with the most has the least: a decoding of W is 40 rows, another's packed row 160 columns."""
    sizes = itertools.product((1, 63, 128, 200, 512), (1, 3, 9, 16, 24, 64), (32, 64), (1, 2, 3, 8, 32, 96))
    for rows, c_tiles, tile_c, threads in sizes:
        work = {}
        for parts in range(1, max(rows // 64, 1) + 1):
            part_rows = -(-rows // parts)
            foreign = max(part_rows - rows // threads, 0)
            work[parts] = -(-c_tiles * parts // threads) * (part_rows + 40) + foreign * 160 // tile_c
        assert row_parts(rows, c_tiles, tile_c, threads) == min(work, key=work.get), (rows, c_tiles, tile_c, threads)
    of_512 = [(128, 2), (64, 2), (48, 2), (18, 2), (16, 32), (64, 48)]
    assert [row_parts(512, c_tiles, 32, threads) for c_tiles, threads in of_512] == [1, 1, 2, 2, 8, 6]


def test_every_product_has_kernels_and_a_reason(choose):
    for is_dgrad, dtype, M, run in itertools.product((False, True), (FP32, BF16, FP16), ROWS, (64, 32, 16, 0)):
        products, reason = choose(is_dgrad, dtype, M, run)
        assert reason
        if dtype != BF16:
            assert products == "fp32"
        elif run == 0 or (is_dgrad and M not in range(DGRAD_CODES_MOST_M[run] + 1)):
            assert products == "bf16"
        else:
            assert products == "bf16_codes"


def test_no_kernel_of_codes_runs_where_rows_are_not_whole_runs(choose):
    for is_dgrad, M in itertools.product((False, True), (1, 16, 500)):
        assert choose(is_dgrad, BF16, M, code_run=0)[0] == "bf16"


def test_the_numbers_of_the_reasons_are_the_code_s(choose):
    most = "M > {}, {} or {} at {}, {} or {} weights".format(*DGRAD_CODES_MOST_M.values(), *DGRAD_CODES_MOST_M)
    assert most in choose(True, BF16, 129)[1]
    assert f"from M = {AMX_LEAST_M} on" in choose(False, BF16, 512, amx=AMX[BF16])[1]


def test_amx_takes_products_of_its_dtypes_from_32_rows_on(choose):
    for is_dgrad, dtype, M, run, amx in itertools.product((False, True), AMX, ROWS, (64, 16, 0), range(4)):
        products, reason = choose(is_dgrad, dtype, M, run, amx=amx)
        assert reason
        if M >= AMX_LEAST_M and amx & AMX[dtype]:
            assert products == "dequantize_gemm"
        else:
            assert (products, reason) == choose(is_dgrad, dtype, M, run), "AMX changes nothing below"


def test_tiles_take_bf16_products_from_few_rows_on_or_16_where_rows_are_spread(choose):
    for is_dgrad, dtype, M, run, amx in itertools.product((False, True), AMX, ROWS, (64, 32, 16, 0), range(4)):
        for forced in (NOTHING, FUSED, DEQUANTIZE_GEMM):
            found = choose(is_dgrad, dtype, M, run, amx=amx, forced=forced, has_tiles=True)
            least = 16 if run != 64 else 3 if is_dgrad else 5
            if dtype == BF16 and least <= M and forced != DEQUANTIZE_GEMM:
                assert found[0] == "tiles"
            else:
                assert found == choose(is_dgrad, dtype, M, run, amx=amx, forced=forced)


def test_amx_leaves_weights_whose_products_take_less_time_than_its_calls(choose):
    for M in (64, 512):
        least = AMX_LEAST_PRODUCTS // M
        assert choose(False, BF16, M, weights=least, amx=3)[0] == "dequantize_gemm"
        assert choose(False, BF16, M, weights=least - 1, amx=3)[0] == "bf16_codes"


def test_a_forced_way_runs_whatever_there_is_and_true_fp32_is_always_fused(choose):
    for is_dgrad, dtype, M, amx in itertools.product((False, True), AMX, ROWS, range(4)):
        fused = choose(is_dgrad, dtype, M)
        assert choose(is_dgrad, dtype, M, amx=amx, forced=FUSED) == fused
        forced = choose(is_dgrad, dtype, M, amx=amx, weights=1, forced=DEQUANTIZE_GEMM)
        assert forced == (fused if dtype == FP32 else ("dequantize_gemm", "forced"))


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [(None, 3), ("ALL", 3), ("avx512_core_amx", 1), ("AVX512_CORE_AMX_FP16", 3), ("AVX10_1_512_AMX", 1), ("AVX2", 0)],
)
def test_what_onednn_may_use(monkeypatch, limit, allowed):
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    found, why_not = native.amx_of_onednn()
    assert found == allowed
    assert why_not == ("" if allowed == 3 else f"ONEDNN_MAX_CPU_ISA is {limit.upper()}")
