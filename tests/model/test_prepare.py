"""A model made ready for training: its dense parts in the dtype that the machine is fast in."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from nf4kernels.backends.info import backend_info
from nf4kernels.model.training import training_dtype

# What a CPU without bf16 instructions makes of torch and of this package.
AVX2 = {"NF4KERNELS_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # fmt: skip
PREPARE = """
    import torch, nf4kernels as nf4
    from support import tiny
    model = tiny.Net(torch.bfloat16)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4), progress=False)
    nf4.prepare_for_training(model)
    dense = {str(p.dtype) for n, p in model.named_parameters() if p.is_floating_point() and "lora_" not in n}
    print("dense:", *dense)
    model(torch.arange(10).view(2, 5)).square().mean().backward()
"""


def prepared(tmp_path, **environment):
    """(standard output, the warnings in standard error) of PREPARE in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in AVX2}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREPARE)], capture_output=True, encoding="utf-8", cwd=tmp_path,
        env=clean | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-500:]
    return result.stdout, [line for line in result.stderr.splitlines() if "prepare_for_training: dense parts" in line]


def test_dense_parts_are_fp32_without_bf16_instructions(tmp_path):
    """A step of SmolLM2 takes 2.6 s so, and 34 s in bf16."""
    if "avx2" not in backend_info().cpu_isas:
        pytest.skip("this machine has no AVX2 kernels to force")
    output, said = prepared(tmp_path, **AVX2)
    assert "dense: torch.float32\n" in output
    assert len(said) == 1
    assert "bfloat16 trains slowly on this cpu" in said[0]


def test_dense_parts_stay_bf16_with_them(tmp_path):
    if training_dtype() != torch.bfloat16:
        pytest.skip("this CPU has no bf16 instructions")
    output, said = prepared(tmp_path)
    assert "dense: torch.bfloat16\n" in output
    assert not said
