"""csrc/cuda/tiles.h: the blocks that fit on a multiprocessor, and the tile and splits predicted to take least."""

import ctypes
import itertools
import re

import pytest
from support.paths import ROOT

from benchmarks.gpu import cuda_report
from nf4kernels.backends import native

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672), (28672, 8192), (14336, 4096))
CARDS = ((90, 132), (89, 128), (80, 108), (86, 84), (89, 48))  # architecture, multiprocessors
ROWS = (17, 32, 64, 128, 256, 512)
REGISTER_FILE, REGISTERS_AT_ONCE = 65536, 8  # of a multiprocessor; a thread's are a multiple
SHARED_MEMORY = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB: CUDA's guide, compute capabilities
OPS = {"linear": False, "linear_dgrad": True}


def tiles(op: str) -> list[dict[str, int]]:
    """The rows of the table."""
    text = (ROOT / "csrc/cuda/tiles.h").read_text(encoding="utf-8")
    name = "kDgradTiles" if OPS[op] else "kLinearTiles"
    table = re.search(rf"{name}\[\] = (.*?);", text, re.DOTALL)[1]
    names = ("M", "N", "K", "warps", "summing", "shared", "blocks", "sums", "levels")
    return [dict(zip(names, map(int, re.findall(r"\d+", row)))) for row in re.findall(r"\{\d[^{]*\{[^}]*\}\}", table)]


@pytest.fixture
def cycles(executor_ops):
    """(cycles, splits) of a tile on a card; 0 splits: those chosen."""
    function = executor_ops.executor.library.nf4kernels_executor_cycles
    function.restype = ctypes.c_float
    function.argtypes = [*[ctypes.c_bool] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 3, ctypes.POINTER(ctypes.c_int)]

    def call(op, M, N, K, arch, multiprocessors, tile, splits=0, sums=True):
        found = ctypes.c_int(splits)
        return function(OPS[op], sums, M, N, K, arch, multiprocessors, tile, found), found.value

    return call


@pytest.fixture
def chosen(executor_ops):
    """(tile, splits) of a product that tiled runs."""
    function = executor_ops.executor.library.nf4kernels_cuda_choose
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int, *native.CHOOSE_ARGUMENTS, *[ctypes.c_void_p] * 3]

    def call(op, M, N, K, arch, multiprocessors, sums=True, experts=0):
        tile, splits, reason = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
        problem = OPS[op], native.BFLOAT16, M, N, K, experts, sums, True, arch, multiprocessors
        if function(-1, *problem, *map(ctypes.byref, (tile, splits, reason))) != b"tiled":
            return None
        return tile.value, splits.value

    return call


@pytest.mark.parametrize("op", OPS)
def test_registers_and_shared_memory_have_room_for_the_resident_blocks(executor_ops, op):
    resident = executor_ops.executor.library.nf4kernels_executor_resident_blocks
    for (i, tile), (arch, kilobytes) in itertools.product(enumerate(tiles(op)), SHARED_MEMORY.items()):
        blocks = resident(OPS[op], i, arch)
        assert 1 <= blocks <= tile["blocks"]
        assert blocks * (tile["shared"] + 1024) <= kilobytes << 10
        assert blocks == tile["blocks"] or (blocks + 1) * (tile["shared"] + 1024) > kilobytes << 10
    at_m = {tile["M"]: tile for tile in tiles(op)}
    seen = set()
    for kernel in cuda_report.read_csv():
        found = re.match(rf"(grouped_)?{op}_tiled_kernel<(\w+), \w+<[A-Za-z]+(\d+)>, (\w+)>", kernel.kernel)
        if not found:
            continue
        tile = at_m[int(found[3])]
        seen.add(tile["M"])
        registers = -(-kernel.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
        assert registers * 32 * tile["warps"] * tile["blocks"] <= REGISTER_FILE, kernel
        if kernel.arch == "sm_90a" and found[1] is None and found[2] == "BFloat16":  # a warp's step is the main loop
            counted = tile["sums" if found[4] == "ScaledSums" else "levels"]
            assert abs(kernel.loop - counted) <= 0.05 * counted, kernel
    assert seen == set(at_m)


def test_splits_fill_the_last_wave(cycles):
    """Of tiles of 128 x 128, one block of which is resident."""
    for N, arch, multiprocessors, splits in (
        (4096, 90, 132, 2), (6144, 90, 132, 4), (4096, 89, 128, 2), (4096, 86, 84, 5), (8192, 90, 132, 1),
    ):  # fmt: skip
        assert cycles("linear", 256, N, 4096, arch, multiprocessors, 2)[1] == splits, (N, multiprocessors)


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "levels"])
@pytest.mark.parametrize("op", OPS)
def test_no_split_is_predicted_to_take_much_less(cycles, op, sums):
    """Of all that could be forced, up to eight times what is looked at."""
    for (N, K), card, M, tile in itertools.product(SHAPES, CARDS, ROWS, range(len(tiles(op)))):
        took, splits = cycles(op, M, N, K, *card, tile, sums=sums)
        step = tiles(op)[tile]["N" if OPS[op] else "K"]
        steps, longest = -(-(N if OPS[op] else K) // step), 512 * (64 if sums and not OPS[op] else 16)
        least = -(-(N if OPS[op] else K) // (longest * tiles(op)[tile]["summing"]))
        assert least <= splits <= min(steps, 64)
        others = [cycles(op, M, N, K, *card, tile, s, sums)[0] for s in range(least, min(steps, 48) + 1)]
        assert took <= 1.03 * min(others), (op, M, N, K, card, tile, splits)


@pytest.mark.parametrize("op", OPS)
def test_the_tile_and_splits_keep_the_card_busy(cycles, chosen, op):
    """No tile of about M rows is better unsplit, and the blocks fill two thirds of the waves or more."""
    resident = {}
    for (N, K), card, M in itertools.product(SHAPES, CARDS, ROWS):
        choice = chosen(op, M, N, K, *card)
        if choice is None:
            continue
        tile, splits = choice
        took = cycles(op, M, N, K, *card, tile, splits)[0]
        for other in range(max(tile - 1, 0), min(tile + 2, len(tiles(op)))):
            assert took <= 1.02 * cycles(op, M, N, K, *card, other, 1)[0], (op, M, N, K, card)
        own = tiles(op)[tile]
        width, columns = (own["K"], K) if OPS[op] else (own["N"], N)
        blocks = -(-M // own["M"]) * -(-columns // width) * splits
        waves = -(-blocks // card[1])  # of one block on each multiprocessor
        resident[op, M, N, K, card] = blocks / (waves * card[1])
    idle = {key: busy for key, busy in resident.items() if busy < 2 / 3}
    assert not idle, idle


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("sums", [True, False], ids=["sums", "levels"])
def test_no_running_sum_is_longer_than_design_allows(chosen, sums, experts):
    """512 terms (or mma's of 16) in a warp's sum: long contractions are split where nothing else asks for it."""
    for op, M in itertools.product(OPS, (20, 40, 200)):
        for times, more in itertools.product((8192, 2 * 8192, 4 * 8192, 3 * 32768), (0, 64)):
            size = times + more
            N, K = (size, 1 << 17) if OPS[op] else (1 << 17, size)
            tile, splits = chosen(op, M * max(experts, 1), N, K, 89, 1, sums=sums, experts=experts)
            longest = 512 * (64 if sums and not OPS[op] else 16) * tiles(op)[tile]["summing"]
            assert splits == -(-size // longest), (op, M, size)


def test_experts_have_the_tile_of_their_mean_rows(chosen):
    for op in OPS:
        at_m = [tile["M"] for tile in tiles(op)]
        for mean in (17, 20, 40, 65, 100, 300):
            tile = next((i for i, most in enumerate(at_m) if mean <= most), len(at_m) - 1)
            assert chosen(op, 8 * mean, 1536, 2048, 89, 128, experts=8) == (tile, 1), (op, mean)
