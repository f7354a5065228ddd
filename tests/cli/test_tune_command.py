"""nf4kernels tune: where there is no GPU, which device, and what it says in the end."""

import argparse

import pytest
import torch

from nf4kernels.backends.info import backend_info
from nf4kernels.backends.tuned_table import ANY_ROWS, Config, CudaOp, Rule, Table, Tile
from nf4kernels.cli import main, tune
from nf4kernels.tuning.tune import TuneError

TILES = (Tile("32x128x64", cost=1150, blocks=3), Tile("128x128x64", cost=1000, blocks=1))
GROUPED_TILES = (Tile("32x128x64", 32), Tile("64x128x64", 32), Tile("128x128x64", ANY_ROWS))
TABLE = Table(
    "sm_90", "2026-11-29, 98 s", "NVIDIA H200",
    cuda={"linear": CudaOp(16, 352, TILES), "grouped_linear": CudaOp(0, ANY_ROWS, GROUPED_TILES)},
    triton={"linear": {4: Config(16, 64, 4, 5, 1024), 16: Config(16, 64, 4, 5, 1024)}},
    dequantize_gemm_from={"linear": 129, "linear_dgrad": ANY_ROWS},
    rules=(Rule("linear", "bfloat16", 8, "triton", "measured: ..."),),
)  # fmt: skip


def has_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_without_a_gpu_it_is_an_error(monkeypatch, capsys):
    has_gpus(monkeypatch, 0)
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    why = backend_info().devices["cuda"][1]
    assert error == f"nf4kernels tune: there must be a GPU to measure, got none: {why}\n"
    assert len(error.splitlines()) == 1


def test_the_first_gpu_or_the_one_that_is_asked_for(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(tune, "tune", lambda *arguments: asked.append(arguments) or (tune.Path("/cache/a.json"), TABLE))
    has_gpus(monkeypatch, 2)
    assert main(["tune"]) == 0
    assert main(["tune", "--quick", "--device", "cuda:1", "--output", "here.json"]) == 0
    assert asked == [
        (torch.device("cuda", 0), False, None), (torch.device("cuda", 1), True, tune.Path("here.json")),
    ]  # fmt: skip
    for device in ("cuda:2", "cpu"):
        assert main(["tune", "--device", device]) == 2
        assert f"--device must be a GPU of this machine, got {device}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "--device", "card"])
    assert "must be a device like cuda:0, got card" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError):
        tune._parsed("card")


def test_the_summary_says_what_was_found(monkeypatch, capsys):
    monkeypatch.setattr(tune, "tune", lambda *arguments: (tune.Path("/cache/a.json"), TABLE))
    has_gpus(monkeypatch, 1)
    assert main(["tune"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "NVIDIA H200, 2026-11-29, 98 s",
        "  linear: small to 16, tiled (cost by what is predicted: 32x128x64 1.15, 128x128x64 1.00) to 352, "
        "dequantize_gemm",
        "  grouped_linear: 32x128x64 to 32, 128x128x64",
        "  linear in Triton: configurations up to 4, 16 rows",
        "  linear in Triton: dequantize + GEMM from 129 rows on",
        "  linear_dgrad in Triton: dequantize + GEMM with no number of rows",
        "  linear bfloat16, up to 8 rows: triton (measured: ...)",
        "wrote /cache/a.json",
    ]


def test_an_error_and_an_interrupt_end_in_a_line(monkeypatch, capsys):
    has_gpus(monkeypatch, 1)
    for error, status, text in (
        (TuneError("must write /cache/a.json, got Read-only file system"), 2, "nf4kernels tune: must write /cache"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "nf4kernels tune: interrupted"),
    ):

        def fails(*arguments, error=error):
            raise error

        monkeypatch.setattr(tune, "tune", fails)
        assert main(["tune"]) == status
        assert text in capsys.readouterr().err
