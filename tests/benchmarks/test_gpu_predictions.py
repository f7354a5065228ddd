"""The time that a kernel should take, by a made-up report on a made-up card."""

import pytest

from benchmarks.gpu import predictions

KERNEL = predictions.Kernel(
    "linear_small_kernel<BFloat16, 2>", "sm_90a", "13.0", 96, 0, 0, 0, 900, 512, 128, 64, "LOP3 128 LDS 64 HMMA 32"
)
CARD = predictions.Card("a card", "sm_90a", 100, 1.0, 1000.0, 400e3)  # 100 * 1e9 cycles of SMs a second


def test_a_product_takes_the_longest_of_its_units():
    units = predictions.decoding(CARD, KERNEL, 1e6)
    assert units["instructions"] == pytest.approx(1e6 * 512 / 128 / 128 / 1e8)
    assert units["integer pipe"] == pytest.approx(1e6 * 128 / 128 / 64 / 1e8)
    assert units["shared memory"] == pytest.approx(1e6 * 64 / 128 / 32 / 1e8)
    one = predictions.product(CARD, KERNEL, 4096, 4096, 16)  # 16 rows a decoded fragment
    assert one.bound == "bytes"
    assert one.ms == pytest.approx((0.516 * 2**24 + 2 * 16 * 8192) / 1e9 + predictions.LAUNCH_MS)
    many = predictions.product(CARD, KERNEL, 4096, 4096, 17)
    assert many.bound == "instructions"
    assert many.ms == pytest.approx(2 * 2**24 * 4 / 128 / 1e8 + predictions.LAUNCH_MS)


def test_predictions_are_of_the_committed_report(monkeypatch):
    monkeypatch.setattr(predictions, "_report", lambda: (KERNEL,))
    found = predictions.predictions(CARD, "linear", 4096, 4096, 16)
    assert set(found) == {"small", "dequantize_gemm"}
    assert set(predictions.predictions(CARD, "linear", 4096, 4096, 17)) == {"dequantize_gemm"}
    assert predictions.predicted_ms(CARD, "linear", 4096, 4096, 16) == found["small"].ms
    assert predictions.predicted_ms(CARD, "lora step", 4096, 4096, 16) is None
    assert found["dequantize_gemm"].ms == pytest.approx(
        (2.516 * 2**24 / 1e9) + 2**29 / 400e9 + 2 * predictions.LAUNCH_MS, 1e-3
    )


def test_a_device_is_predicted_by_the_architecture_that_it_runs():
    def arch(name: str) -> str:
        return predictions.card_of("a card", name, 1, 1.0, 1.0, 1.0).arch

    assert [arch(a) for a in ("sm_80", "sm_87", "sm_90a", "sm_103", "sm_121")] == [
        "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120",
    ]  # fmt: skip


def test_a_known_card_is_predicted_at_the_clock_that_it_keeps():
    assert predictions.card_of("NVIDIA H200", "sm_90a", 132, 1.98, 1.0, 1.0).ghz == 1.755
    assert predictions.card_of("Another", "sm_90a", 132, 1.98, 1.0, 1.0).ghz == 1.98
