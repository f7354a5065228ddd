"""The time that a launch and a product should take, by counts that are made up here and by the committed ones."""

import itertools
from dataclasses import replace

import pytest

from benchmarks.gpu import bitsandbytes_kernels, cuda_report, launches, predictions
from benchmarks.gpu.cards import CARDS, Card, card_of
from benchmarks.gpu.cuda_report import Kernel
from benchmarks.gpu.kernel_time import ARRIVAL_MS, LATENCY_US, LAUNCH_MS, Work, launch_time, resident_blocks
from benchmarks.gpu.launches import Launch, Product
from benchmarks.gpu.work import product_work
from benchmarks.shapes import GPU_SHAPES

SMALL = "linear_small_kernel<BFloat16, 2, ScaledSums>"
KERNEL = Kernel(SMALL, "sm_90a", "13.0", 96, 1024, 0, 0, 900, 512, 128, 64, "LOP3 128 LDS 64 HMMA 32")
CARD = Card("a card", "sm_90a", 100, 1.0, 1000.0, 400e3, 90, 50)  # 100 * 1e9 cycles of SMs a second
H200 = CARDS[0]
ROUND_MS = LATENCY_US / 1e3


def launch(blocks: int, threads: int = 256, shared: int = 0) -> Launch:
    return Launch(SMALL, (blocks, 1, 1), threads, shared)


def ms(work: Work, blocks: int = 200, kernel: Kernel = KERNEL, card: Card = CARD) -> float:
    return launch_time(card, kernel, launch(blocks), work).ms - LAUNCH_MS


def test_a_launch_takes_the_longest_of_its_units():
    assert ms(Work(0, 1e6)) == pytest.approx(1e6 / 1000 / 1e6)
    assert ms(Work(0, 0, l2_bytes=1e6)) == pytest.approx(1e6 / 32 / 1e8)
    assert ms(Work(0, 0, multiply_adds=1e9)) == pytest.approx(1e9 / 1270 / 1e8)
    passages = 1e9  # of weights: loops / 128 lanes
    assert ms(Work(passages, 0)) == pytest.approx(passages * 512 / 128 / 128 / 1e8)
    integer = replace(KERNEL, kinds="LOP3 500 HMMA 32")
    assert ms(Work(passages, 0), kernel=integer) == pytest.approx(passages * 500 / 128 / 64 / 1e8)
    shared = replace(KERNEL, shared_words=400)
    assert ms(Work(passages, 0), kernel=shared) == pytest.approx(passages * 400 / 128 / 32 / 1e8)
    shuffled = replace(KERNEL, kinds="SHFL 400")
    assert launch_time(CARD, shuffled, launch(200), Work(passages, 0)).bound == "shared memory"


def test_half_of_the_processors_take_twice_the_time_and_three_waves_three_times():
    work = Work(1e9, 0)
    assert ms(work, blocks=50) == pytest.approx(2 * ms(work, blocks=100))
    resident = resident_blocks(CARD, KERNEL, launch(1))
    assert resident == 2
    whole, waves = launch_time(CARD, KERNEL, launch(600), work), 3
    assert whole.waves == waves
    # two waves more begin, half hidden behind the other block of an SM
    assert whole.ms - LAUNCH_MS == pytest.approx(ms(work, blocks=200) + (waves - 1) * ROUND_MS / resident)
    # 201 blocks have a last wave of one, which is as long as a block is
    assert ms(work, blocks=201) > 1.3 * ms(work, blocks=200)


def test_resident_blocks_are_limited_by_registers_shared_memory_threads_and_slots():
    def resident(registers: int, shared: int, threads: int, card: Card = CARD) -> int:
        return resident_blocks(card, replace(KERNEL, registers=registers), launch(1, threads, shared))

    assert resident(32, 0, 1024) == 2
    assert resident(96, 0, 256) == 2
    assert resident(97, 0, 256) == 2  # as 104
    assert resident(129, 0, 256) == 1
    assert resident(32, 75 << 10, 128) == 3
    assert resident(32, 76 << 10, 128) == 2  # and 1 KiB of the driver's
    assert resident(16, 0, 32) == 32
    assert resident(32, 0, 512, replace(CARD, arch="sm_89")) == 3
    assert resident(255, 227 << 10, 1024) == 1


def test_a_warp_waits_for_memory_where_nothing_was_asked_for_ahead():
    passages, blocks, threads = 10 * 128 * 256 * 100, 100, 256  # ten passes of every thread
    own = 512 * 2 / 1e6  # ms of one warp's pass at 1 GHz
    assert ms(Work(passages, 0, passes_ahead=0), blocks) == pytest.approx(10 * (ROUND_MS + own))
    assert ms(Work(passages, 0, passes_ahead=1), blocks) == pytest.approx(10 * own)
    short = replace(KERNEL, loop=10, shared_words=0, kinds="HMMA 4")
    assert ms(Work(passages, 0, passes_ahead=2), blocks, short) == pytest.approx(10 * ROUND_MS / 2)
    assert launch_time(CARD, short, launch(blocks, threads), Work(passages, 0)).bound == "latency"


def test_every_committed_product_has_a_prediction_and_the_chosen_one_is_marked():
    facts = predictions.committed()
    for card, op, (N, K), M in itertools.product(CARDS, ("linear", "linear_dgrad"), GPU_SHAPES, launches.ROWS):
        found = predictions.by_kernel(card, op, N, K, M)
        assert [name for name, prediction in found.items() if prediction.is_chosen] == [predictions.chosen(found)[0]]
        assert ("small" in found) == (op == "linear" and M <= 16)
        for prediction in found.values():
            limit = predictions.share(card, N, K, M, prediction.ms)
            assert 0 < limit <= 1, (card.name, op, N, K, M, prediction)
        assert 0 < predictions.share(card, N, K, M, predictions.bitsandbytes_ms(card, op, N, K, M)[0]) <= 1
    assert len(facts.plans) == len(list(launches.products()))


def test_a_product_that_fills_half_of_the_card_is_not_predicted_by_ideal_division():
    """64 blocks of 128 x 128 on 132 SMs, of which each has one: what it was taken for before waves were counted."""
    name = "linear_tiled_kernel<BFloat16, LinearShape<LinearM128>, ScaledSums>"
    product = Product(90, 132, "linear", 4096, 4096, 256, "tiled")
    plan = launches.Plan((Launch(name, (32, 2, 1), 256, 94208),), True, (128, 128))
    kernel = next(k for k in cuda_report.read_csv() if (k.kernel, k.arch) == (name, "sm_90a"))
    facts = predictions.Facts({(name, "sm_90a"): kernel}, {product: plan})
    ideal = 4 * 4096**2 / 64 * kernel.loop / 128 / 132 / H200.ghz / 1e6
    assert predictions.by_kernel(H200, "linear", 4096, 4096, 256, facts)["tiled"].ms > 1.9 * ideal


def test_a_second_launch_is_counted():
    product = Product(90, 132, "linear", 4096, 4096, 1, "tiled")
    first, reduce = Launch(SMALL, (32, 1, 4), 128, 65536), Launch("reduce_splits_kernel<BFloat16>", (16, 1, 1), 256, 0)
    kernels = {(SMALL, "sm_90a"): KERNEL, (reduce.kernel, "sm_90a"): replace(KERNEL, kernel=reduce.kernel)}
    one, two = (
        predictions.by_kernel(
            H200, "linear", 4096, 4096, 1,
            predictions.Facts(kernels, {product: launches.Plan(launched, True, (32, 128))}),
        )["tiled"]
        for launched in ((first,), (first, reduce))
    )  # fmt: skip
    assert (one.launches, two.launches) == (1, 2)
    assert two.ms - one.ms == pytest.approx(LAUNCH_MS - ARRIVAL_MS, rel=0.2)


def test_split_sums_are_written_to_the_l2_and_read_there():
    def work(kernel: str, tile: tuple[int, int], M: int, grid: tuple[int, ...], *more: Launch) -> list[Work]:
        plan = launches.Plan((Launch(SMALL, grid, 256, 0), *more), True, tile)
        product = Product(90, 132, "linear", 4096, 4096, M, kernel)
        return [product_work(KERNEL, plan, each, product) for each in plan.launches]

    (unsplit,), (split,) = (work("tiled", (32, 128), 40, (32, 2, splits)) for splits in (1, 4))
    sums = 4 * 64 * 4096  # of whole tiles
    assert (unsplit.is_split, split.is_split) == (False, True)
    assert split.l2_bytes - unsplit.l2_bytes == 8 * sums
    assert split.nbytes == unsplit.nbytes
    first, second = work("tiled", (32, 128), 40, (32, 2, 4), Launch("reduce_splits_kernel<BFloat16>", (16,), 256, 0))
    assert not first.is_split
    assert unsplit.l2_bytes - 2 * 40 * 4096 + 4 * sums == first.l2_bytes
    assert second.l2_bytes == 4 * sums + 2 * 40 * 4096
    (whole,), (cut,) = (work("small", (16, 32), 4, (blocks, 1, 1)) for blocks in (128, 132))
    assert (whole.is_split, cut.is_split) == (False, True)
    assert cut.l2_bytes - whole.l2_bytes == 8 * 2 * 132 * 4 * 32, "of two tiles a block"
    assert ms(Work(0, 1e6, is_split=True)) == pytest.approx(ms(Work(0, 1e6)) + ARRIVAL_MS)


def test_slices_share_the_weight_by_their_blocks():
    facts = predictions.committed()
    product = Product(90, 132, "linear", 28672, 8192, 2048, "dequantize_gemm")
    name = "dequantize_kernel<BFloat16, true>"
    equal = launches.Plan((Launch(name, (1000, 1, 1), 256, 1088, 4),), True)
    split = launches.Plan((Launch(name, (1000, 1, 1), 256, 1088, 3), Launch(name, (500, 1, 1), 256, 1088, 2)), True)
    four, five = (
        predictions.by_kernel(H200, "linear", 28672, 8192, 2048, replace(facts, plans={product: plan}))[
            predictions.GEMM
        ]
        for plan in (equal, split)
    )
    assert (four.launches, five.launches) == (8, 10)
    assert four.ms < five.ms < four.ms + 5 * LAUNCH_MS


def test_nothing_is_predicted_of_what_was_not_planned():
    other = replace(H200, sms=131)
    assert predictions.by_kernel(other, "linear", 4096, 4096, 1) == {}
    assert predictions.predicted_ms(other, "linear", 4096, 4096, 1) is None
    assert predictions.predicted_ms(H200, "lora step", 4096, 4096, 16) is None
    assert predictions.predicted_ms(replace(H200, ghz=0.0), "linear", 4096, 4096, 16) is None
    assert predictions.predicted_ms(H200, "dequantize out=", 4096, 4096, None) == pytest.approx(
        2.516 * 2**24 / 4300e6 + LAUNCH_MS
    )


# What bitsandbytes 0.50.2's sources say of an H200 (132 SMs), an A100 (108) and an RTX 4090 (128).
DISPATCHED = [
    ("H200", 4096, 4096, 1, "gemm_4bit_simt<__nv_bfloat16, 1>", (1024, 1, 1), 0),
    ("H200", 4096, 4096, 4, "gemm_4bit_simt<__nv_bfloat16, 4>", (1024, 1, 1), 0),
    ("H200", 4096, 4096, 16, None, None, None),
    ("H200", 28672, 8192, 16, "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 32, 256, 128>", (1, 112, 1), 2 * 288 * 136 * 2),
    ("H200", 28672, 8192, 64, "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 64, 64, 64>", (1, 448, 1), 2 * 128 * 72 * 2),
    ("H200", 28672, 8192, 128, None, None, None),
    ("A100", 28672, 8192, 128, "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 128, 128, 64>", (1, 224, 1), 2 * 256 * 72 * 2),
    ("A100", 4096, 4096, 128, None, None, None),
    ("A100", 4096, 4096, 4, "gemm_4bit_simt<__nv_bfloat16, 4>", (1024, 1, 1), 0),
    ("RTX 3090", 8192, 28672, 64, "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 64, 64, 128>", (1, 128, 1), None),
    ("RTX 4090", 4096, 4096, 4, "gemm_4bit_simt<__nv_bfloat16, 4>", (1024, 1, 1), 0),
    ("RTX 4090", 28672, 8192, 256, "gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 128, 128, 64>", (2, 224, 1), None),
    ("RTX 4090", 28672, 8192, 2048, None, None, None),
]


@pytest.mark.parametrize(("name", "N", "K", "M", "kernel", "grid", "shared"), DISPATCHED)
def test_bitsandbytes_launches_what_its_sources_say(name, N, K, M, kernel, grid, shared):
    card = next(card for card in CARDS if card.name == name)
    found = bitsandbytes_kernels.fused(card, N, K, M)
    if kernel is None:
        assert found is None
        return
    counted, launched = found
    assert (counted.kernel, counted.arch, launched.kernel) == (kernel, card.arch, kernel)
    assert counted.weights > 0
    assert grid in (None, launched.grid)
    assert shared in (None, launched.shared)


def test_bitsandbytes_instructions_a_weight_are_those_of_its_wheel():
    """By hand, of gemm_4bit_simt for one row on sm_90a: 279 instructions for the 32 weights of a lane."""
    one = bitsandbytes_kernels.counts("sm_90a")["gemm_4bit_simt<__nv_bfloat16, 1>"]
    assert one.per_weight == pytest.approx(8.72, abs=0.01)
    for arch in {card.arch for card in CARDS}:
        found = bitsandbytes_kernels.counts(arch)
        assert all(2 < kernel.per_weight < 60 and not kernel.spills for kernel in found.values())
        assert sum(kernel.startswith("gemm_4bit_simt") for kernel in found) == 8


def test_a_device_is_predicted_by_the_architecture_that_it_runs():
    def arch(capability: int) -> str:
        return card_of("a card", capability, 1, 1.0, 1.0, 1.0, 1.0).arch

    assert [arch(c) for c in (80, 87, 90, 103, 121)] == ["sm_80", "sm_86", "sm_90a", "sm_100", "sm_120"]


def test_a_known_card_is_predicted_at_the_clock_that_it_keeps():
    assert card_of("NVIDIA H200", 90, 132, 1.98, 1.0, 1.0, 50).ghz == 1.755
    assert card_of("Another", 90, 132, 1.98, 1.0, 1.0, 50).ghz == 1.98


def test_a_report_that_is_older_than_the_launches_is_said(monkeypatch, capsys):
    facts = predictions.committed()
    assert predictions.uncounted(facts) == []
    old = replace(facts, kernels={key: k for key, k in facts.kernels.items() if not key[0].startswith("linear_small")})
    assert predictions.by_kernel(H200, "linear", 4096, 4096, 1, old).keys() == {"tiled", "dequantize_gemm"}
    monkeypatch.setattr(predictions, "committed", lambda *paths: old)
    monkeypatch.setattr("sys.argv", ["predictions"])
    with pytest.raises(SystemExit):
        predictions.main()
    assert "linear_small_kernel<BFloat16, 1" in capsys.readouterr().err


def test_the_tables_show_another_version_beside_this_one():
    before = predictions.committed()
    slower = replace(before, kernels={key: replace(k, loop=3 * k.loop) for key, k in before.kernels.items()})
    lines = list(predictions.tables([H200], before, slower, every_kernel=False))
    assert "H200: sm_90a, 132 SMs" in lines[0]
    body = lines[1].splitlines()
    assert body[0].split()[1:4] == ["before", "gain", "ms"]
    assert len(body) == 2 + 2 * len(GPU_SHAPES) * len(launches.ROWS)
    assert any("decode 28672x8192 M=1:" in line for line in lines)
    assert sum("of cuBLAS, least" in line for line in lines) == 2
    assert any("slower than bitsandbytes by" in line for line in lines)
