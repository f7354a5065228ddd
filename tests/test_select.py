"""Which backend runs an op, by device, dtype and rows: decided once, forced by name, never silently another one."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from numerics import assert_product_within_bound, assert_same_bits

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends import measured, native, select
from nf4kernels.backends.measured import Rule
from nf4kernels.backends.registration import Registration
from nf4kernels.ops import OPS, SCHEMAS

TESTS = Path(__file__).parent
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120+PTX"]


@pytest.fixture
def machine(monkeypatch, cuda_library):
    """A machine with CUDA devices of these capabilities, as far as deciding goes."""
    monkeypatch.setattr(cuda_library, "architectures", ARCHITECTURES)

    def has(*capabilities, library=cuda_library, why_not=""):
        monkeypatch.setattr(select, "cuda_library", lambda: (library, why_not))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {capabilities[i]}")

    return has


@pytest.fixture
def without_triton(monkeypatch):
    find_spec = select.importlib.util.find_spec
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))


def decided(device_type="cuda"):
    decision = select.decide(device_type)
    return decision.backend, decision.implementation, decision.reason


def test_the_compiled_kernels_come_first(machine):
    machine((9, 0))
    assert decided() == ("native", "native sm_90a", "card (9, 0)")
    machine((8, 9), (8, 9))
    assert decided() == ("native", "native sm_89", "card (8, 9)")
    machine((8, 0), (8, 9))
    assert decided() == ("native", "native sm_80 sm_89", "card (8, 0)")


def test_triton_comes_where_the_library_has_no_code(machine, cuda_library, monkeypatch):
    machine((8, 0), (11, 0))
    backend, _, reason = decided()
    assert backend == "triton"
    assert "not native: this device is sm_110, and the library has code for 80 86 89 90a 100 120+PTX" in reason
    machine((9, 0), library=None, why_not="_cuda.abi3.so was not built")
    assert decided() == ("triton", "triton", "card (9, 0); not native: _cuda.abi3.so was not built")
    monkeypatch.setattr(cuda_library, "_driver_version", lambda: 12040)
    monkeypatch.setattr(cuda_library, "version", 13000)
    machine((9, 0))
    backend, _, reason = decided()
    assert backend == "triton"
    assert "built with CUDA 13.0, the driver is for CUDA 12.4" in reason


def test_the_reference_comes_last(machine, without_triton):
    machine((7, 5))
    backend, implementation, reason = decided()
    assert (backend, implementation) == ("reference", "reference (plain PyTorch)")
    assert "not native: this device is sm_75, and the kernels need sm_80" in reason
    assert "not triton: Triton is not installed" in reason


def test_triton_needs_sm_80(machine):
    machine((7, 5))
    assert decided()[0] == "reference"
    assert "not triton: this device is sm_75, and Triton needs sm_80" in decided()[2]


def test_amds_gpus_have_triton(machine, monkeypatch):
    machine((9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert decided()[:2] == ("triton", "triton")
    assert "not native: the compiled kernels are for NVIDIA's GPUs" in decided()[2]


def test_a_forced_backend_is_taken_or_refused(machine, monkeypatch, without_triton):
    machine((9, 0))
    monkeypatch.setattr(select, "FORCED", "reference")
    assert decided() == ("reference", "reference (plain PyTorch)", "card (9, 0); forced by NF4KERNELS_BACKEND")
    monkeypatch.setattr(select, "FORCED", "triton")
    assert decided() == (None, "none", "NF4KERNELS_BACKEND=triton, and Triton is not installed")
    machine((7, 5))
    monkeypatch.setattr(select, "FORCED", "native")
    assert decided()[0] is None
    refusing = select.implement("cuda")
    for op in OPS:
        with pytest.raises(RuntimeError, match=rf"nf4kernels\.{op}: no backend .*=native, and this device is sm_75"):
            refusing[op](1, two=2)


def test_backend_info_shows_the_kernels_and_why(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("", (), {"multi_processor_count": 132}))
    monkeypatch.setattr(select.REGISTRATIONS["cuda"], "settle", lambda: None)
    monkeypatch.setattr(select, "rules_for", lambda architecture: [RULES[0]] if architecture == "sm_90" else [])
    info = nf4.backend_info()
    assert info.devices["cuda"] == ("native sm_90a", "card (9, 0)")
    lines = info.kernels["cuda"]
    assert lines[:3] == [
        "linear bfloat16, up to 4 rows: reference (measured)",
        "linear bf16, fp16, up to 16 rows: small (at most 16 rows)",
        "linear bf16, fp16, up to 352 rows: tiled (predicted from copy 4.3 TB/s, cuBLAS 788, tiled 482 TFLOP/s)",
    ]
    assert lines[3].startswith("linear bf16, fp16, more rows: panel (predicted")
    assert [line.partition(":")[0] for line in lines[4:]] == [
        "linear_dgrad bf16, fp16, up to 256 rows", "linear_dgrad bf16, fp16, more rows",
    ]  # fmt: skip
    assert all(line in str(info) for line in lines)


def test_backend_info_without_a_gpu(machine):
    machine()
    implementation, reason = nf4.backend_info().devices["cuda"]
    assert implementation == "none"
    assert reason in ("torch has no CUDA", "torch sees no CUDA device")


@pytest.fixture
def namespace(request):
    """A namespace with our schemas and no kernels, for this test alone: the CUDA library stays registered; its name."""
    name = f"nf4kernels_{request.node.name}"
    with torch.library._scoped_library(name, "DEF") as library:
        for schema in SCHEMAS:
            library.define(schema)
        yield name


def product(namespace, x, qweight):
    return getattr(torch.ops, namespace).linear(x, *qweight.op_args(), None)


@pytest.mark.filterwarnings("error")
def test_the_first_call_settles_who_runs(namespace, simt):
    """Here as on a GPU: the library registers itself in place of the stand-in, and torch does not warn."""
    calls = []

    def implement():
        calls.append("settled")
        native.register_cuda_ops(simt.executor.library, namespace, "CPU")
        return {}

    registration = Registration(namespace, "CPU", implement)
    qweight, x = cases.quantized(40, 64), cases.activations(3, 64, torch.bfloat16)
    assert not calls
    for _ in range(2):
        y = product(namespace, x, qweight)
        assert_product_within_bound(y, x, cases.dense(qweight).T, "linear by the CUDA kernels")
    assert calls == ["settled"]
    assert sum(run.count for run in simt.launches() if "linear_small" in run.kernel) == 2
    registration.settle()
    assert calls == ["settled"]


def test_an_implementation_that_fails_is_asked_again_and_nothing_else_runs(namespace):
    attempts = []

    def implement():
        attempts.append(len(attempts))
        if len(attempts) < 3:
            raise ImportError(f"broken, attempt {len(attempts)}")
        return {"linear": reference.linear}

    registration = Registration(namespace, "CPU", implement)
    qweight, x = cases.quantized(5, 64), torch.randn(2, 64)
    for attempt in (1, 2):
        with pytest.raises(ImportError, match=f"broken, attempt {attempt}"):
            product(namespace, x, qweight)
    expected = reference.linear(x, *qweight.op_args(), None)
    assert torch.equal(product(namespace, x, qweight), expected)
    assert torch.equal(product(namespace, x, qweight), expected)
    assert len(attempts) == 3
    assert registration is not None  # its registrations go when it goes


def test_an_exception_of_a_kernel_comes_through(namespace):
    def broken(*arguments):
        raise MemoryError("the kernel's own")

    registration = Registration(namespace, "CPU", lambda: {"linear": broken})
    registration.settle()
    with pytest.raises(MemoryError, match="the kernel's own"):
        product(namespace, torch.randn(2, 64), cases.quantized(5, 64))


RULES = [
    Rule("linear", "bfloat16", 4, "reference", "measured"),
    Rule("linear", "bfloat16", 100, "triton", "measured"),
    Rule("linear", "float16", measured.ANY_ROWS, "triton", "measured"),
    Rule("dequantize", "uint8", measured.ANY_ROWS, "triton", "measured"),
]


def test_rules_choose_by_op_dtype_and_rows():
    kernels = {name: lambda x, *rest, name=name, **keywords: (name, rest, keywords) for name in measured.BACKENDS}
    linear = measured.by_rules("linear", RULES, kernels, "native")

    def runs(*shape, dtype=torch.bfloat16):
        name, rest, keywords = linear(torch.zeros(shape, dtype=dtype), "rest", key="word")
        assert (rest, keywords) == (("rest",), {"key": "word"})
        return name

    assert [runs(rows, 64) for rows in (0, 1, 4, 5, 100, 101)] == [
        "reference", "reference", "reference", "triton", "triton", "native",
    ]  # fmt: skip
    assert runs(2, 3, 64) == "triton"
    assert runs(64) == "reference"
    assert runs(1, 64, dtype=torch.float32) == "native"
    assert runs(10_000, 64, dtype=torch.float16) == "triton"
    assert measured.by_rules("dequantize", RULES, kernels, "native")(torch.zeros(9, dtype=torch.uint8))[0] == "triton"
    assert measured.by_rules("quantize", RULES, kernels, "native")(torch.zeros(9, 9))[0] == "native"


def test_backends_that_share_a_device(monkeypatch, machine, simt):
    """The library's ops under a namespace of their own, and another backend for the rows where it is faster."""
    machine((9, 0))
    library = select.cuda_library()[0]
    monkeypatch.setattr(library, "register", lambda name: native.register_cuda_ops(simt.executor.library, name, "CPU"))
    monkeypatch.setattr(select, "rules_for", lambda architecture: RULES[:1])
    functions = select.implement("cuda")
    qweight = cases.quantized(40, 64)
    for rows, by_kernels in ((4, False), (5, True)):
        x = cases.activations(rows, 64, torch.bfloat16)
        simt.executor.reset()
        y = functions["linear"](x, *qweight.op_args(), None)
        assert any("linear_small" in run.kernel for run in simt.launches()) == by_kernels
        assert_product_within_bound(y, x, cases.dense(qweight).T, f"{rows} rows")


def test_the_committed_measurements_are_readable():
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert all(rule.op in OPS for rule in measured.rules_for(architecture))


def test_measured_rules_are_read_and_checked(tmp_path):
    path = tmp_path / "measured.csv"
    head = "architecture,op,dtype,rows,backend,reason\n"
    path.write_text(
        head
        + "sm_90,linear,bfloat16,,triton,all\nsm_90,linear,bfloat16,8,native,few\nsm_80,linear,float16,1,triton,other\n"
    )
    assert measured.rules_for("sm_90", path) == [
        Rule("linear", "bfloat16", 8, "native", "few"), Rule("linear", "bfloat16", measured.ANY_ROWS, "triton", "all"),
    ]  # fmt: skip
    for line in ("sm_90,lineal,bfloat16,,triton,x", "sm_90,linear,bf16,,triton,x", "sm_90,linear,bfloat16,,cuda,x"):
        path.write_text(head + line + "\n")
        with pytest.raises(ValueError, match=r"measured\.csv must have ops, dtypes and backends of ours"):
            measured.rules_for("sm_90", path)


LAYOUTS = (cases.DEFAULT, cases.Layout(64, "fp4", "dynamic8"), cases.Layout(32, "int4", None))
SHAPES = ((40, 128), (33, 65))
EVERY_OP = """
import os, sys, torch, cases
if os.environ["NF4KERNELS_BACKEND"] == "triton":
    import triton_interpreter
    triton_interpreter.correct()
import nf4kernels as nf4
from test_select import LAYOUTS, SHAPES
ops, results = torch.ops.nf4kernels, {}
for layout in LAYOUTS:
    for N, K in SHAPES:
        w = cases.weight(N, K)
        q = nf4.quantize(w, layout.codebook, layout.block_size, layout.scale_codebook is not None,
                         layout.scale_codebook or "e4m3")
        own = results[str(layout), N, K] = {"quantize": q.op_args()[:6]}
        for dtype in cases.DTYPES:
            x, dy = cases.activations(5, K, dtype), cases.activations(5, N, dtype)
            own["dequantize", dtype] = nf4.dequantize(q, dtype)
            own["linear", dtype] = ops.linear(x, *q.op_args(), None)
            own["linear_dgrad", dtype] = ops.linear_dgrad(dy, *q.op_args())
            own["lora_grad", dtype] = ops.lora_grad(x[:, :8].contiguous(), dy, 0.5, torch.float32)
torch.save(results, sys.argv[1])
print(nf4.backend_info())
"""


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """Every op's results by a backend, forced by its name in a process of its own, on the CPU."""

    def run(backend: str) -> dict:
        path = tmp_path_factory.mktemp(backend) / "results.pt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NF4KERNELS_")}
        environment |= {"NF4KERNELS_BACKEND": backend, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        environment |= {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-c", EVERY_OP, str(path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert re.search(rf"cpu   {backend}.*forced by NF4KERNELS_BACKEND", result.stdout)
        return torch.load(path)

    return functools.cache(run)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_every_backend_gives_the_same_bits_or_keeps_the_same_bound(native_library, results_of, backend):
    for ours, expected in zip(results_of(backend).values(), results_of("reference").values()):
        for a, b in zip(ours["quantize"], expected["quantize"]):
            assert a is b is None or torch.equal(a, b)
        dense = expected["dequantize", torch.float32]
        N, K = dense.shape
        for (op, dtype), result in ((key, result) for key, result in ours.items() if key != "quantize"):
            x, dy = cases.activations(5, K, dtype), cases.activations(5, N, dtype)
            if op == "dequantize":
                assert_same_bits(result, expected[op, dtype], f"{backend} {op} {dtype}")
                continue
            small = 0.5 * x[:, :8].T.float()
            a, matrix = {"linear": (x, dense.T), "linear_dgrad": (dy, dense), "lora_grad": (small, dy.float())}[op]
            assert_product_within_bound(result, a, matrix, f"{backend} {op}")
