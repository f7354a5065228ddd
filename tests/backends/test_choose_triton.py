"""The tables of Triton's configurations: sound, found for any device, and marked where nothing was measured."""

import json

import pytest
import torch

pytestmark = pytest.mark.ways("interpreter", "triton")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")


@pytest.fixture
def choose(way):
    return way.backend.choose


def test_every_table_is_sound_and_says_where_it_is_from(choose):
    assert {path.stem for path in choose.TABLES.glob("*.json")} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        table = choose.table_for(architecture)
        assert table.origin.startswith(("predicted, not measured: ", "measured on "))
        assert table.to_json() == (choose.TABLES / f"{architecture}.json").read_text()
        assert set(table.dequantize_gemm_from) == set(choose.PRODUCTS)


@pytest.mark.parametrize(
    ("architecture", "table"),
    [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_75", "sm_86"),
     ("gfx950", "gfx942"), ("gfx1201", "gfx1100"), ("gfx1100", "gfx1100"), ("pvc", "sm_86")],
)  # fmt: skip
def test_every_device_finds_a_table(choose, architecture, table):
    assert choose.known_architecture(architecture, frozenset(ARCHITECTURES)) == table


def test_choice_by_rows(choose, way):
    device = torch.device(way.device, 0) if way.device == "cuda" else torch.device("cpu")
    table = choose.table_for(choose.architecture_of(device))
    for op in choose.PRODUCTS:
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


def test_refuses_what_is_no_table(choose):
    data = json.loads(choose.table_for("sm_80").to_json())
    for change in (
        {"linear": []},
        {"linear": data["linear"][::-1]},
        {"linear": [data["linear"][0] | {"depth": 100}]},
        {"linear": [data["linear"][0] | {"depth": 16384}]},
        {"dequantize_gemm_from": {"linear": 3}},
        {"more": 1},
    ):
        with pytest.raises(ValueError, match="nf4kernels: "):
            choose.Table.from_json(json.dumps(data | change))


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
    assert len(lines) == 2 * len(choose.PRODUCTS)
    for op, (fused, gemm) in zip(choose.PRODUCTS, (lines[:2], lines[2:])):
        assert fused == f"{op} bf16, fp16, up to {table.dequantize_gemm_from[op] - 1} rows: fused ({table.origin})"
        assert gemm == f"{op} bf16, fp16, more rows: dequantize_gemm ({table.origin})"
