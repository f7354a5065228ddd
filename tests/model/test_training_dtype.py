"""What the dense parts of a model are trained in: bf16 where the machine multiplies in it at full speed, else fp32."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.laptop import AVX2
from support.paths import ROOT, python_path

import nf4kernels as nf4
from nf4kernels import input_checks
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


def told(monkeypatch, isa, dtype=torch.bfloat16, autocast=False, grad=True):
    """What the first two layers that train in 16 bits on such a CPU warn of."""
    monkeypatch.setattr(input_checks, "_untold", True)
    monkeypatch.setattr(select, "CPU_LIBRARY", Library(isa))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: isa == "avx512_bf16", raising=False)
    layer = nf4.QuantLinear(64, 64, bias=False, dtype=dtype, lora=nf4.LoraConfig(r=4))
    x = torch.randn(2, 64, dtype=dtype, requires_grad=grad)
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        warnings.simplefilter("always")
        layer(layer(x)).sum()
    return [str(warning.message) for warning in caught if "nf4kernels: training in" in str(warning.message)]


def test_who_trains_in_16_bits_where_that_is_slow_is_told_once(monkeypatch):
    (said,) = told(monkeypatch, "avx2")
    assert "training in bfloat16 is slow on this CPU" in said
    assert "nf4kernels.prepare_for_training(model)" in said
    (said,) = told(monkeypatch, "avx512", torch.float32, autocast=True)  # a Trainer's bf16=True
    assert "training in bfloat16" in said
    assert "bf16=False" in said
    (said,) = told(monkeypatch, "avx2", torch.float16)
    assert "training in float16" in said


def test_nobody_else_is_told(monkeypatch):
    assert not told(monkeypatch, "avx512_bf16")
    assert not told(monkeypatch, "avx2", torch.float32)
    with torch.no_grad():
        assert not told(monkeypatch, "avx2", grad=False)


def test_the_readme_gives_the_time_for_each_kind_of_machine():
    paragraph = next(
        p for p in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") if "The demo fetches" in p
    )
    assert "AVX2" in paragraph
    assert "TO-MEASURE" not in paragraph, "run `make demo` with AVX2 forced and write down how long it took"
