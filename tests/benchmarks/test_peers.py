"""The peers that compute with 4-bit weights of their own, and the forced instruction sets."""

import argparse
import copy
import os
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the benchmarks have no peer")

from benchmarks import checks, forced, peer_ggml, peer_int4, plans
from benchmarks.harness import DTYPES, INT4, OURS
from benchmarks.report import tables
from benchmarks.shapes import FOCUS, LONG

NOTHING = argparse.Namespace(
    all=False, ops=[], shapes=None, rows=None, cache=None, threads=(2, 1), threads_given=None, seconds=2.0, dtype=None
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_torchs_int4_multiplies_with_the_weights_that_are_decoded_here(dtype):
    weight, x = torch.randn(96, 256).to(dtype), torch.randn(5, 256).to(dtype)
    before = weight.clone()
    layer, decoded = peer_int4.Int4Linear(weight), peer_int4.decoded(weight)
    assert torch.equal(weight, before)
    sums = torch.finfo(torch.float32).eps * 256**0.5
    checks.assert_as_exact_as_dense(layer(x), x, decoded.T, "INT4", more=sums)
    steps = (weight.float().view(96, -1, 64).amax(2) - weight.float().view(96, -1, 64).amin(2)) / 15
    # half a step, and the roundings of scale and zero to the dtype, on 8 steps and on the zero
    allowed = (0.5 + 16 * torch.finfo(dtype).eps) * steps + torch.finfo(dtype).eps * weight.float().abs().max()
    assert ((decoded - weight.float()).view(96, -1, 64).abs().amax(2) <= allowed).all()
    bias = torch.randn(96).to(dtype)
    assert torch.equal(peer_int4.Int4Linear(weight, bias)(x.view(1, 5, 256)), (layer(x) + bias).view(1, 5, 96))


def test_a_models_linear_layers_become_int4_but_its_head():
    body = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(60, 128))
    model = torch.nn.ModuleDict({"body": body, "lm_head": torch.nn.Linear(64, 32)}).bfloat16().requires_grad_(False)
    x = torch.randn(3, 128).bfloat16()
    expected = peer_int4.Int4Linear(body[0].weight, body[0].bias)(x)
    assert torch.equal(peer_int4.replace_linears(model)["body"][0](x), expected)
    assert [type(layer) for layer in (model["body"][1], model["lm_head"])] == [torch.nn.Linear] * 2


@pytest.mark.parametrize("kind", peer_ggml.TYPES)
def test_ggmls_blocks_hold_the_nearest_levels(kind):
    weight = torch.randn(8, 96)
    weight[3, 32:64] = 0
    decoded = peer_ggml.numbers_from_rows(peer_ggml.quantize(weight, kind), kind).view(8, -1, peer_ggml.BLOCK)
    blocks = weight.view(8, -1, peer_ggml.BLOCK)
    levels = peer_ggml.CODEBOOKS[peer_ggml.IN_4_BITS[kind]]
    scale = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / levels[0]).half().float()
    nearest = (blocks[..., None] - scale[..., None] * levels).abs().amin(-1)
    torch.testing.assert_close((decoded - blocks).abs(), nearest)


@pytest.mark.skipif(not peer_ggml.find(), reason="no ggml: neither llama-cpp-python nor xllamacpp is installed")
@pytest.mark.parametrize("kind", peer_ggml.TYPES)
def test_ggml_multiplies_with_its_blocks(kind):
    layer = peer_ggml.GgmlLinear.from_weight(peer_ggml.load(), kind, torch.randn(64, 128).bfloat16())
    for own in (layer, copy.deepcopy(layer)):
        for M in (1, 5, 1):
            x = torch.randn(M, 128).bfloat16()
            exact = x.double() @ layer.decoded().double().T
            assert checks.relative_error(own(x), exact) <= peer_ggml.allowed_error(x)
    other = copy.deepcopy(layer)  # it shares x and y with the layer, whose graph is of other memory after this
    for M in (5, 1):
        x = torch.randn(M, 128)
        assert torch.equal(other(x).clone(), layer(x))


def test_ggml_is_found_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NF4KERNELS_GGML", str(tmp_path))
    assert peer_ggml.find() == []
    (tmp_path / "lib").mkdir()
    for name in peer_ggml.PARTS:
        (tmp_path / "lib" / name).touch()
    assert peer_ggml.find() == [tmp_path / "lib" / name for name in peer_ggml.PARTS]
    monkeypatch.setenv("NF4KERNELS_GGML", str(tmp_path / "lib" / "libggml.so"))
    assert peer_ggml.find() == [tmp_path / "lib" / "libggml.so"]


def test_long_rows_are_measured_at_few_rows_of_x_and_with_every_thread_count():
    found = {(weight, op): plan for weight, _, work in plans.work(NOTHING, ("linear",)) for op, plan in reversed(work)}
    for weight in LONG:
        assert found[weight, "linear"].rows == (1, 2, 3, 4)
        assert found[weight, "linear"].threads == (2, 1)
    assert found[FOCUS[0], "linear"].rows == plans.ALL_M["linear"]
    assert found[(14336, 4096), "linear"].rows == (1, 64)


def test_every_dtype_is_measured_with_an_instruction_set_forced():
    work = list(plans.forced_work(NOTHING))
    assert [(weight, dtype) for weight, dtype, _ in work] == [
        *((forced.SHAPES[0], dtype) for dtype in DTYPES), (forced.SHAPES[1], "bf16"),
    ]  # fmt: skip
    assert [op for op, _ in work[0][2]] == ["linear", "linear_dgrad"]
    assert [op for op, _ in work[-1][2]] == ["linear"]


def test_a_level_is_forced_on_ours_torch_onednn_and_mkl(monkeypatch):
    monkeypatch.delenv("NF4KERNELS_CPU_ISA", raising=False)
    assert forced.in_force() == ""
    for best, isas, expected in (
        ("best", ["best", "avx512", "avx2", "scalar"], ["avx512", "avx2"]),
        ("avx2", ["avx2"], []),
    ):
        info = argparse.Namespace(devices={"cpu": (f"native {best}", "")}, cpu_isas=isas)
        monkeypatch.setattr(forced.nf4, "backend_info", lambda info=info: info)
        assert forced.lesser_levels() == expected
    for name, value in forced.environment("avx2").items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    assert forced.in_force() == "avx2"
    assert forced.lesser_levels() == []
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512")
    assert forced.in_force() == ""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has no AVX2")
def test_a_run_with_avx2_forced_says_so_in_its_rows(tmp_path):
    path = tmp_path / "forced.csv"
    command = [sys.executable, "-m", "benchmarks", "--isa", "avx2", "--shapes", "64x128", "--rows", "4"]
    command += ["--threads", "1", "--cache", "in", "--dtype", "fp32", "--csv", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "NF4KERNELS_CPU_ISA"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    rows, about = tables.read_csv(path)
    assert about["kernels"] == "native avx2"
    assert [(row.op, row.dtype, row.isa) for row in rows] == [
        (op, "fp32", "avx2") for op in ("linear", "linear + dgrad")
    ]
    for row in rows:
        assert {OURS, "dense fp32"} <= set(row.ms)
        assert (INT4 in row.ms) == (row.op == "linear")
