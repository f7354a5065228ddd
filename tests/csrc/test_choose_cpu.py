"""csrc/cpu/choose.h: every product gets kernels that can run it, by M, dtype and scales alone, with a reason."""

import ctypes
import itertools

import pytest

from nf4kernels.backends import native

FP32, BF16, FP16 = range(3)
GEMV_MOST_M, DGRAD_CODES_MOST_M = 4, {64: 128, 32: 96, 16: 64}


@pytest.fixture(scope="module")
def choose():
    function = ctypes.CDLL(str(native.CPU_LIBRARY)).nf4kernels_cpu_choose
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_bool, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
    function.argtypes += [ctypes.POINTER(ctypes.c_bool), ctypes.POINTER(ctypes.c_char_p)]

    def call(is_dgrad, dtype, M, code_run=64):
        is_gemv, reason = ctypes.c_bool(), ctypes.c_char_p()
        products = function(is_dgrad, dtype, M, code_run, is_gemv, reason)
        return products.decode(), is_gemv.value, reason.value.decode()

    return call


def test_every_product_has_kernels_and_a_reason(choose):
    rows = (1, 4, 5, 64, 65, 96, 97, 128, 129, 512, 1 << 24)
    for is_dgrad, dtype, M, run in itertools.product((False, True), (FP32, BF16, FP16), rows, (64, 32, 16, 0)):
        products, is_gemv, reason = choose(is_dgrad, dtype, M, run)
        assert reason
        assert is_gemv == (not is_dgrad and M <= GEMV_MOST_M)
        if dtype != BF16:
            assert products == "fp32"
        elif run == 0 or (is_dgrad and M not in range(DGRAD_CODES_MOST_M[run] + 1)):
            assert products == "bf16"
        else:
            assert products == "bf16_codes"


def test_no_kernel_of_codes_runs_where_rows_are_not_whole_runs(choose):
    for is_dgrad, M in itertools.product((False, True), (1, 16, 500)):
        assert choose(is_dgrad, BF16, M, code_run=0)[0] == "bf16"


def test_dgrad_has_no_gemv(choose):
    assert not choose(True, BF16, 1)[1]


def test_the_numbers_of_the_reasons_are_the_code_s(choose):
    most = "M > {}, {} or {} at {}, {} or {} weights".format(*DGRAD_CODES_MOST_M.values(), *DGRAD_CODES_MOST_M)
    assert most in choose(True, BF16, 129)[2]
