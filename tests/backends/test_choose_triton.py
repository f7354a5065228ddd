"""The tables of Triton's configurations: sound, found for any device, and marked where nothing was measured."""

import pytest
import torch

from nf4kernels.backends import tuned_files, tuned_table
from nf4kernels.backends.tuned_table import Config, Table

pytestmark = pytest.mark.ways("interpreter", "triton")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


@pytest.fixture
def choose(way):
    return way.backend.choose


def test_every_table_says_where_it_is_from(choose):
    assert tuned_files.predicted_architectures() == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        table = choose.table_for(architecture)
        assert all(why.startswith("predicted, not measured: ") for why in table.why.values())
        assert set(table.dequantize_gemm_from) == set(table.configs) == set(tuned_table.PRODUCTS)


@pytest.mark.parametrize(
    ("architecture", "table"),
    [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_75", "sm_86"),
     ("gfx950", "gfx942"), ("gfx1201", "gfx1100"), ("gfx1100", "gfx1100"), ("pvc", "sm_86")],
)  # fmt: skip
def test_every_device_finds_a_table(architecture, table):
    assert tuned_files.known_architecture(architecture, frozenset(ARCHITECTURES)) == table


def test_choice_by_rows(choose, way):
    device = torch.device(way.device, 0) if way.device == "cuda" else torch.device("cpu")
    table = choose.table_on(device)
    for op in tuned_table.PRODUCTS:
        for dtype in (torch.bfloat16, torch.float16):
            least = table.dequantize_gemm_from[op]
            assert choose.choose(op, least - 1, 128, 64, dtype, device).path == "fused"
            assert choose.choose(op, least, 128, 64, dtype, device).path == "dequantize_gemm"
            assert choose.choose(op, 64, 65, 64, dtype, device) == choose.Choice("fused", choose.ELEMENTS, 32, 0)
            assert choose.choose(op, 65, 65, 64, dtype, device).path == "dequantize_gemm"
        assert choose.choose(op, 10**6, 128, 64, torch.float32, device) == choose.Choice("fused", choose.FP32, 64, 1)


@pytest.mark.parametrize(
    ("K", "block_size", "step"),
    [(128, 64, (64, 1)), (128, 4096, (64, 1)), (128, 32, (64, 2)), (128, 16, (64, 4)), (96, 64, (32, 1)),
     (96, 32, (32, 1)), (96, 16, (32, 2)), (65, 64, (0, 0)), (48, 16, (0, 0)), (16, 32, (0, 0)), (0, 64, (64, 1))],
)  # fmt: skip
def test_steps_that_rows_are_made_of(choose, K, block_size, step):
    assert choose.whole_step(K, block_size) == step


def test_forcing_refuses_an_unknown_path_and_is_undone(choose):
    with pytest.raises(ValueError, match=r"a path must be one of .*got 'fast'"), choose.forcing("fast"):
        pass
    before = dict(choose._forced)
    with choose.forcing("dequantize_gemm"):
        with choose.forcing("fused"):
            assert choose._forced["path"] == "fused"
        assert choose._forced["path"] == "dequantize_gemm"
    assert choose._forced == before


def test_the_paths_are_told_with_their_origin(choose):
    table = choose.table_for("sm_80")  # the interpreter's
    lines = list(choose.kernel_lines(torch.device("cpu")))
    assert len(lines) == 2 * len(tuned_table.PRODUCTS)
    for op, (fused, gemm) in zip(tuned_table.PRODUCTS, (lines[:2], lines[2:])):
        assert fused == f"{op} bf16, fp16, up to {table.dequantize_gemm_from[op] - 1} rows: fused ({table.why[op]})"
        assert gemm == f"{op} bf16, fp16, more rows: dequantize_gemm ({table.why[op]})"


def test_measured_rows_take_the_place_of_predicted_ones(choose):
    predicted, own = choose.table_for("sm_90"), Config(32, 32, 8, 2, 512)
    measured = Table("sm_90", "2026-11-29", triton={"linear": {16: own, 99: own}}, dequantize_gemm_from={"linear": 77})
    table = choose.table_for("sm_90", tuned_files.Found(measured, tuned_files.HERE))
    assert table.config("linear", 16) == own != predicted.config("linear", 16)
    assert table.config("linear", 4) == predicted.config("linear", 4)
    assert [most for most, _ in table.configs["linear"]] == [most for most, _ in predicted.configs["linear"]]
    assert table.configs["linear_dgrad"] == predicted.configs["linear_dgrad"]
    assert table.dequantize_gemm_from == predicted.dequantize_gemm_from | {"linear": 77}
    assert table.why == predicted.why | {"linear": "measured here, 2026-11-29"}


def test_measured_rows_are_told(choose, monkeypatch):
    measured = Table("sm_80", "2026-11-29", triton={"linear": {4: Config(32, 32, 8, 2, 512)}},
                     dequantize_gemm_from={"linear": 77, "linear_dgrad": tuned_table.ANY_ROWS})  # fmt: skip
    found = tuned_files.Found(measured, tuned_files.ON_SUCH_A_CARD)
    monkeypatch.setattr(choose, "table_on", lambda device: choose.table_for("sm_80", found))
    lines = list(choose.kernel_lines(torch.device("cpu")))
    assert lines[:3] == [
        "linear bf16, fp16, up to 76 rows: fused (measured on such a card, 2026-11-29)",
        "linear bf16, fp16, more rows: dequantize_gemm (measured on such a card, 2026-11-29)",
        "linear, configurations up to 4 rows: measured on such a card, 2026-11-29; others: predicted",
    ]
    assert lines[3:] == ["linear_dgrad bf16, fp16, any rows: fused (measured on such a card, 2026-11-29)"]
