"""What the dense parts of a model are trained in: bf16 where the machine multiplies in it at full speed, else fp32."""

import os
import subprocess
import sys

import pytest
import torch
from support.laptop import AVX2
from support.paths import ROOT, python_path

from nf4kernels.backends import select
from nf4kernels.model.training import training_dtype


class Library:
    def __init__(self, isa):
        self.isa = isa


@pytest.mark.parametrize(
    ("isa", "onednn", "expected"),
    [
        ("avx512_bf16", True, torch.bfloat16),
        ("avx512_bf16", False, torch.float32),
        ("neon_bf16", True, torch.bfloat16),
        ("neon", True, torch.float32),
        ("avx512", True, torch.float32),  # there oneDNN says yes and emulates
        ("avx2", False, torch.float32),
        ("scalar", True, torch.float32),
        (None, True, torch.float32),
    ],
)
def test_both_libraries_must_have_the_instructions(isa, onednn, expected, monkeypatch):
    monkeypatch.setattr(select, "CPU_LIBRARY", None if isa is None else Library(isa))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    assert training_dtype("cpu") == expected
    assert training_dtype(torch.device("cpu")) == expected
    assert training_dtype() == expected  # the default device


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_says_for_itself(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert training_dtype("cuda:0") == (torch.bfloat16 if supported else torch.float32)


def test_a_torch_without_onednn_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(select, "CPU_LIBRARY", Library("avx512_bf16"))
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert training_dtype("cpu") == torch.float32


@pytest.mark.skipif(
    "avx2" not in (select.CPU_LIBRARY.isas if select.CPU_LIBRARY else ()), reason="no AVX2 kernels here"
)
def test_the_environment_of_a_laptop_is_seen():
    """The variables are read when torch and the library are loaded, so in a process of its own."""
    code = "from nf4kernels.model.training import training_dtype; print(training_dtype())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | python_path() | AVX2,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == "torch.float32\n"


def test_the_readme_gives_the_time_for_each_kind_of_machine():
    paragraph = next(
        p for p in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") if "The demo fetches" in p
    )
    assert "AVX2" in paragraph
    assert "TO-MEASURE" not in paragraph, "run `make demo` with AVX2 forced and write down how long it took"
