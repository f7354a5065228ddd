"""csrc/cuda/choose.h: every problem gets a kernel that can run it, by the committed table, with a reason."""

import ctypes
import itertools
import re

import pytest
from support.paths import ROOT

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 121)
FP32, BF16, FP16 = range(3)


@pytest.fixture
def choose(executor_ops):
    function = executor_ops.executor.library.nf4kernels_cuda_choose
    function.restype = ctypes.c_char_p
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_bool,
        ctypes.c_int32,
        *[ctypes.c_int64] * 4,
        *[ctypes.c_bool] * 2,
        *[ctypes.c_int] * 2,
    ]
    function.argtypes += [ctypes.POINTER(ctypes.c_int)] * 2 + [ctypes.POINTER(ctypes.c_char_p)]

    def call(dgrad, dtype, M, N, K, sums=True, aligned=True, arch=90, multiprocessors=132, experts=0):
        tile, splits, reason = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
        path = function(-1, dgrad, dtype, M, N, K, experts, sums, aligned, arch, multiprocessors, tile, splits, reason)
        return path.decode(), splits.value, reason.value.decode()

    yield call
    function.argtypes = None


def test_every_problem_has_a_kernel_and_a_reason(choose):
    rows = (1, 16, 17, 64, 65, 500, 4096, 1 << 24)
    sides = (64, 4096, 28672, 1 << 17)
    for dgrad, dtype, M, N, K in itertools.product((False, True), (FP32, BF16, FP16), rows, sides, sides):
        for sums, aligned, arch in itertools.product((True, False), (True, False), ARCHITECTURES):
            path, splits, reason = choose(dgrad, dtype, M, N, K, sums, aligned, arch)
            assert reason
            assert 1 <= splits <= 1024
            if dtype == FP32:
                assert path == "any"
            elif not aligned:
                assert path == ("any" if M <= 64 else "dequantize_gemm")
            elif M <= 16 and not dgrad:
                assert path == "small"
            else:
                assert path in ("tiled", "dequantize_gemm")


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "levels"])
def test_tensor_cores_need_k_in_64s_and_no_block_size(choose, sums):
    for dgrad in (False, True):
        assert choose(dgrad, BF16, 20, 4096, 4096, sums)[0] == "tiled"
        assert choose(dgrad, BF16, 20, 4096, 4096 + 32, sums)[0] == "any"
    assert choose(False, BF16, 5, 4096, 0, sums)[0] == "any"


def test_dgrad_on_tensor_cores_needs_n_in_eights(choose):
    assert choose(True, BF16, 20, 4100, 4096)[0] == "any"
    assert choose(True, BF16, 20, 4104, 4096)[0] == "tiled"
    assert choose(False, BF16, 20, 4100, 4096)[0] == "tiled"


def test_the_break_even_of_each_architecture_is_the_tables(choose):
    text = (ROOT / "csrc/cuda/choose.h").read_text(encoding="utf-8")
    table = re.findall(r'\{(\d+), (\d+), (\d+), "predicted', text)
    assert len(table) == 6
    for arch, linear, dgrad in ((int(a), int(b), int(c)) for a, b, c in table):
        for is_dgrad, rows in ((False, linear), (True, dgrad)):
            path, _, reason = choose(is_dgrad, BF16, rows, 4096, 4096, arch=arch)
            assert (path, "predicted" in reason) == ("tiled", True)
            path, _, reason = choose(is_dgrad, BF16, rows + 1, 4096, 4096, arch=arch)
            assert (path, "predicted" in reason) == ("dequantize_gemm", True)
    # An architecture that is not listed is as the one before it.
    assert choose(False, BF16, 353, 4096, 4096, arch=99) == choose(False, BF16, 353, 4096, 4096, arch=90)


def test_the_docs_show_the_table():
    choose_h, docs = (
        (ROOT / "csrc/cuda/choose.h").read_text(encoding="utf-8"),
        (ROOT / "docs/choosing.md").read_text(encoding="utf-8"),
    )
    table = re.findall(r'\{(\d+), (\d+), (\d+), "(predicted.*?)"\}', choose_h)
    assert re.findall(r"^\| sm_(\d+) \| (\d+) \| (\d+) \| (.*?) \|$", docs, re.MULTILINE) == table
    table = re.findall(r'\{(\d+), (\d+), (\d+), "experts, (predicted.*?)"\}', choose_h)
    assert re.findall(r"^\| experts, sm_(\d+) \| (\d+) \| (\d+) \| (.*?) \|$", docs, re.MULTILINE) == table


def test_experts_get_a_kernel_by_the_mean_of_their_rows(choose):
    for dgrad, dtype, mean, experts in itertools.product(
        (False, True), (FP32, BF16, FP16), (1, 16, 17, 64, 65, 5000), (1, 8, 128)
    ):
        for sums, aligned, arch in itertools.product((True, False), (True, False), ARCHITECTURES):
            path, splits, reason = choose(
                dgrad, dtype, mean * experts, 1536, 2048, sums, aligned, arch, experts=experts
            )
            assert reason
            assert splits == 1, "experts are tiles enough"
            has_gemm = dtype == BF16 and aligned and arch in (90, 100, 103)
            if dtype == FP32:
                assert path == "any"
            elif not aligned:
                assert path == ("dequantize_gemm" if has_gemm and mean > 64 else "any")
            elif mean <= 16 and not dgrad:
                assert path == "small"
            else:
                assert path == ("dequantize_gemm" if has_gemm and mean == 5000 else "tiled")
    assert choose(False, BF16, 33, 1536, 2048, experts=2)[0] == "tiled", "a mean of 16.5"


def test_the_break_even_of_experts_is_the_tables(choose):
    table = re.findall(
        r'\{(\d+), (\d+), (\d+), "experts, predicted', (ROOT / "csrc/cuda/choose.h").read_text(encoding="utf-8")
    )
    assert len(table) == 2
    for arch, linear, dgrad in ((int(a), int(b), int(c)) for a, b, c in table):
        for is_dgrad, rows in ((False, linear), (True, dgrad)):
            assert choose(is_dgrad, BF16, 8 * rows, 1536, 2048, arch=arch, experts=8)[0] == "tiled"
            assert choose(is_dgrad, BF16, 8 * rows + 1, 1536, 2048, arch=arch, experts=8)[0] == "dequantize_gemm"
            assert choose(is_dgrad, FP16, 8 * rows + 1, 1536, 2048, arch=arch, experts=8)[0] == "tiled"


def test_experts_sums_of_small_are_no_longer_than_design_allows(choose):
    for K in (8 * 32768, 8 * 32768 + 64):
        assert choose(False, BF16, 16, 2048, K, experts=4)[:2] == ("small", -(-K // (8 * 32768)))


def test_numbers_of_32_bits_bound_the_sizes(choose):
    for is_dgrad, at_limit in ((False, (8, 1 << 24)), (False, (1 << 18, 1 << 20)), (True, (1 << 24, 64))):
        below = tuple(n - 64 if n > 64 else n for n in at_limit)
        assert choose(is_dgrad, BF16, 20, *below)[0] == "tiled"
        assert choose(is_dgrad, BF16, 20, *at_limit)[0] == "any"
    for is_dgrad in (False, True):  # 2^32 blocks of 16
        assert choose(is_dgrad, BF16, 20, (1 << 16) - 8, 1 << 20, sums=False)[0] == "tiled"
        assert choose(is_dgrad, BF16, 20, 1 << 16, 1 << 20, sums=False)[0] == "any"


def test_small_blocks_fill_the_machine_and_none_is_idle(executor_ops):
    """At least eight units a block, but for a weight of fewer; whole tiles where that leaves few idle."""
    blocks_of = executor_ops.executor.library.nf4kernels_cuda_small_blocks
    blocks_of.argtypes = [*[ctypes.c_int64] * 3, ctypes.c_int]
    assert blocks_of(1, 4096, 4096, 132) == blocks_of(16, 8192, 4096, 132) == 128, "128 tiles"
    assert blocks_of(16, 4096, 4096, 132) == blocks_of(1, 11008, 4096, 132) == 132
    assert blocks_of(16, 11000, 1 << 16, 5000) == 1024, "as many as arrival counters"
    assert blocks_of(16, 64, 64, 132) == blocks_of(16, 64, 1024, 132) == blocks_of(1, 32, 1024, 132) == 1
    assert blocks_of(16, 64, 1024 + 64, 132) == 2
    sizes = (1, 16), (1, 64, 65, 1024, 4096), (64, 192, 4096, 1 << 20), (1, 2, 128, 132, 170)
    for M, N, K, multiprocessors in itertools.product(*sizes):
        tiles = -(-N // (32 if M <= 8 else 64))
        units, blocks = tiles * -(-K // 128), blocks_of(M, N, K, multiprocessors)
        assert 1 <= blocks <= min(multiprocessors, units)
        assert (
            blocks == multiprocessors
            or 8 * blocks >= units
            or (tiles % blocks == 0 and blocks > 0.93 * multiprocessors)
        )
