"""Which backend runs an op, by device, dtype and rows: decided once, forced by name, never silently another one."""

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from support import cases, every_op
from support.numerics import assert_product_within_bound, assert_same_bits
from support.paths import python_path

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends import native, select, tuned_table
from nf4kernels.backends.registration import Registration, stand_in
from nf4kernels.backends.tuned_files import HERE, ON_SUCH_A_CARD, Found
from nf4kernels.backends.tuned_table import CudaOp, Rule, Table, Tile
from nf4kernels.ops import OPS, SCHEMAS

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


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """What was measured on the devices: nothing, unless the test says so."""
    tables = []

    def set_to(*of_each):
        tables[:] = of_each

    monkeypatch.setattr(select, "found_tables", lambda device_type: tuple(tables))
    return set_to


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """As on a GPU, where Triton compiles. Our kernels are not imported: other tests of this process interpret them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = SimpleNamespace(OPS=dict.fromkeys(OPS, print), kernel_lines=lambda device: [f"Triton's on {device}"])
    monkeypatch.setattr(select, "triton_backend", lambda: backend)


@pytest.fixture
def without_triton(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(select, "triton_backend", missing)


def decided(device_type="cuda"):
    decision = select.decide(device_type)
    return decision.backend, decision.implementation, decision.reason


def test_the_compiled_kernels_come_first(machine):
    machine((9, 0))
    assert decided() == ("native", "native sm_90a", "card (9, 0)")
    machine((8, 9), (8, 9))
    assert decided() == ("native", "native sm_89", "card (8, 9)")
    machine((8, 0), (8, 9))
    assert decided() == ("native", "native sm_80 sm_89", "card (8, 0); card (8, 9)")
    machine((9, 0), (6, 1))  # which gets errors, and does not take the kernels from the other
    assert decided() == ("native", "native sm_90a", "card (9, 0); card (6, 1)")


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


def test_it_says_whose_code_a_device_runs(machine):
    machine((12, 1))
    assert decided() == ("native", "native sm_120", "card (12, 1); sm_121 runs sm_120's code")
    machine((10, 0), (10, 3))
    assert decided() == ("native", "native sm_100", "card (10, 0); card (10, 3); sm_103 runs sm_100's code")
    machine((13, 0))
    assert decided()[1:] == (
        "native sm_120 by PTX", "card (13, 0); the driver compiles it for sm_130 when it is first needed",
    )  # fmt: skip


@pytest.mark.parametrize("capability", [(8, 7), (11, 0)])
def test_a_gpu_beside_the_cpu_runs_no_card_s_code(machine, cuda_library, monkeypatch, capability):
    """Jetson's Orin and Thor."""
    number = "{}{}".format(*capability)
    machine(capability)
    backend, _, reason = decided()
    assert backend == "triton"
    assert f"not native: this device is sm_{number}, and the library has code for 80 86" in reason
    monkeypatch.setattr(cuda_library, "architectures", [*ARCHITECTURES, number])
    assert decided()[:2] == ("native", f"native sm_{number}")


def test_the_reference_comes_last(machine, without_triton):
    machine((11, 0))
    backend, implementation, reason = decided()
    assert (backend, implementation) == ("reference", "reference (plain PyTorch)")
    assert "not native: this device is sm_110" in reason
    assert "not triton: Triton cannot be imported: No module named 'triton'" in reason


def test_triton_needs_sm_80(machine):
    machine((7, 5))
    assert decided()[0] == "reference"
    assert "not triton: this device is sm_75, and Triton needs sm_80" in decided()[2]


def test_triton_is_not_interpreted_on_a_gpu(machine, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    machine((11, 0))
    assert decided()[0] == "reference"
    assert "not triton: TRITON_INTERPRET=1 is set" in decided()[2]
    with pytest.warns(UserWarning, match=r"plain PyTorch runs on cuda: card \(11, 0\); not native"):
        assert select.implement("cuda") is None


def test_a_backend_that_lacks_an_op_is_refused(machine, monkeypatch):
    functions = {op: print for op in OPS if op != "linear"}
    monkeypatch.setattr(select, "triton_backend", lambda: SimpleNamespace(OPS=functions))
    machine((11, 0))
    with pytest.raises(RuntimeError, match="the triton backend must have every op, and lacks linear"):
        select.implement("cuda")


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
    missing = "NF4KERNELS_BACKEND=triton, and Triton cannot be imported: No module named 'triton'"
    assert decided() == (None, "none", missing)
    machine((7, 5))
    monkeypatch.setattr(select, "FORCED", "native")
    assert decided()[0] is None
    refusing = select.implement("cuda")
    for op in OPS:
        with pytest.raises(RuntimeError, match=rf"nf4kernels\.{op}: no backend .*=native, and this device is sm_75"):
            refusing[op](1, two=2)


def test_backend_info_shows_the_kernels_and_why(machine, found, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("", (), {"multi_processor_count": 132}))
    monkeypatch.setattr(select.REGISTRATIONS["cuda"], "settle", lambda: None)
    found(Found(Table("sm_90", "of a test", rules=(RULES[0],)), HERE, "a file is ignored: it must be JSON"))
    info = nf4.backend_info()
    assert info.devices["cuda"] == ("native sm_90a", "card (9, 0)")
    lines = info.kernels["cuda"]
    assert lines[:5] == [
        "a file is ignored: it must be JSON",
        "linear bfloat16, up to 4 rows: reference (measured)",
        "linear bf16, fp16, up to 16 rows: small (predicted: at most 16 rows)",
        "linear bf16, fp16, up to 352 rows: tiled (predicted from copy 4.3 TB/s, cuBLAS 788, tiled 482 TFLOP/s)",
        "linear bf16, fp16, more rows: dequantize_gemm (predicted from copy 4.3 TB/s, cuBLAS 788, tiled 482 TFLOP/s)",
    ]
    assert [line.partition(":")[0] for line in lines[5:]] == [
        "linear_dgrad bf16, fp16, up to 256 rows", "linear_dgrad bf16, fp16, more rows",
        "grouped_linear bf16, up to 16 rows of each expert", "grouped_linear bf16, up to 832 rows of each expert",
        "grouped_linear bf16, more rows of each expert", "grouped_linear_dgrad bf16, up to 416 rows of each expert",
        "grouped_linear_dgrad bf16, more rows of each expert", "weights of int8",
    ]  # fmt: skip
    assert all(line in str(info) for line in lines)


def test_info_says_of_which_device_the_rows_are(machine, found, cuda_library, monkeypatch):
    """Each by its own capability: of the first that the kernels run on, where devices differ."""
    asked = []
    monkeypatch.setattr(cuda_library, "choices", lambda op, *device: asked.append(device) or [])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(multi_processor_count=100 + i))
    monkeypatch.setattr(select.REGISTRATIONS["cuda"], "settle", lambda: None)
    for capabilities, said, device in (
        ([(9, 0), (9, 0)], "", (0, (9, 0), 100)),
        ([(8, 9), (9, 0)], "the rows below are those of cuda:0, card (8, 9)", (0, (8, 9), 100)),
        ([(7, 5), (9, 0)], "the rows below are those of cuda:1, card (9, 0)", (1, (9, 0), 101)),
    ):
        machine(*capabilities)
        *lines, of_int8 = nf4.backend_info().kernels["cuda"]
        assert [line.partition(";")[0] for line in lines] == [said][: bool(said)]
        assert of_int8 == "weights of int8: triton, as the CUDA library has no kernel of them"
        assert set(asked) == {device}
        asked.clear()
    machine((9, 0), (9, 0))
    found(Found(Table("sm_90", "one"), HERE), Found(None))
    assert nf4.backend_info().kernels["cuda"][0].startswith("the rows below are those of cuda:0"), (
        "measured differently"
    )


def test_info_says_of_each_row_how_it_is_known(machine, found, cuda_library, monkeypatch):
    """What was measured of linear here; and of experts, on such a card; the rest is predicted."""
    machine((9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("", (), {"multi_processor_count": 132}))
    monkeypatch.setattr(select.REGISTRATIONS["cuda"], "settle", lambda: select.implement("cuda"))
    monkeypatch.setattr(cuda_library, "register", lambda name: None)
    for op, source, ranges in (
        ("linear", HERE, ["up to 8 rows: small", "up to 100 rows: tiled", "more rows: dequantize_gemm"]),
        ("grouped_linear_dgrad", ON_SUCH_A_CARD,
         ["up to 100 rows of each expert: tiled", "more rows of each expert: dequantize_gemm"]),
    ):  # fmt: skip
        tiles = native.cuda_tiles(cuda_library.handle, op)
        own = CudaOp(8, 100, tuple(Tile(tile, 32 << i) for i, tile in enumerate(tiles)))
        found(Found(Table("sm_90", "2026-11-29", cuda={op: own}), source))
        *lines, _ = nf4.backend_info().kernels["cuda"]  # the last is of int8
        dtypes = "bf16" if op.startswith("grouped") else "bf16, fp16"
        measured = [f"{op} {dtypes}, {rows} ({source}, 2026-11-29)" for rows in ranges]
        assert [line for line in lines if "2026" in line] == measured
        assert all("predicted" in line for line in lines if line not in measured)
        native.tune_cuda(cuda_library.handle, 0, {}, "")


def test_a_table_of_other_tiles_is_ignored_with_a_warning(machine, found, cuda_library, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(cuda_library, "register", lambda name: None)
    own = CudaOp(8, 100, (Tile("1x2x3", 9),))
    found(Found(Table("sm_90", "2026-11-29", "A Card", cuda={"linear": own}, rules=(RULES[0],)), HERE))
    ignored = "the table of A Card, 2026-11-29, is ignored for CUDA's kernels and the choice between backends: it must"
    with pytest.warns(UserWarning, match=f"{ignored} have the tiles .* got 1x2x3") as warned:
        assert select.implement("cuda") == {}, "the library alone: the rules go with the kernels that they were for"
    assert len(warned) == 1
    assert [line.partition(" have the tiles")[0] for line in select.ignored_tables("cuda")] == [ignored]
    assert "predicted" in cuda_library.choice(0, False, 1, 4, 4096, 4096, 0, True, True, 90, 132)[3]


def test_what_is_ignored_is_warned_of_once(machine, found, cuda_library, monkeypatch):
    machine((9, 0), (9, 0))
    monkeypatch.setattr(cuda_library, "register", lambda name: None)
    found(*[Found(None, ignored="/cache/card.json is ignored: it must be JSON")] * 2)
    with pytest.warns(UserWarning, match="is ignored") as warned:
        select.implement("cuda")
    assert [str(w.message) for w in warned] == ["nf4kernels: /cache/card.json is ignored: it must be JSON"]


def test_devices_that_were_measured_differently_have_no_rules(machine, found):
    machine((9, 0), (9, 0))
    table = Table("sm_90", "one", rules=(RULES[0],))
    found(Found(table, HERE), Found(table, HERE))
    assert select.measured_rules("cuda") == [RULES[0]]
    found(Found(table, HERE), Found(None))
    assert select.measured_rules("cuda") == []


def test_backend_info_shows_tritons_paths(machine, monkeypatch):
    machine((11, 0))
    monkeypatch.setattr(select.REGISTRATIONS["cuda"], "settle", lambda: True)
    info = nf4.backend_info()
    assert info.devices["cuda"][0] == "triton"
    assert info.kernels["cuda"] == ["Triton's on cuda:0"]
    assert "      Triton's on cuda:0" in str(info).splitlines()


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "visible", "reason"),
    [
        (None, None, None, "torch has no CUDA"),
        (
            None,
            13000,
            None,
            "torch has no CUDA, and this machine has an NVIDIA driver: a CUDA build of torch could use it",
        ),
        ("13.0", 12080, None, "torch was built with CUDA 13.0, the driver is for CUDA 12.8: update one of them"),
        ("13.0", 0, None, "this machine has no NVIDIA driver"),
        ("12.8", 13000, None, "torch sees no CUDA device"),
        ("12.8", 13000, "", "torch sees no CUDA device, CUDA_VISIBLE_DEVICES is ''"),
    ],
)
def test_backend_info_says_why_there_is_no_gpu(
    machine, cuda_library, monkeypatch, tmp_path, torch_cuda, driver, visible, reason
):
    machine()
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda_library, "_driver_version", lambda: driver)
    monkeypatch.setattr("nf4kernels.backends.info.NVIDIA_DRIVER", tmp_path / ("" if driver else "missing"))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    info = nf4.backend_info()
    assert info.devices["cuda"] == ("none", reason)
    assert f"cuda  none ({reason})" in str(info).splitlines()


@pytest.fixture
def registered(request):
    """A namespace with our schemas for this test alone (kernels stay registered), settled by what the test gives."""
    name = f"nf4kernels_{request.node.name}"
    with torch.library._scoped_library(name, "DEF") as library:
        for schema in SCHEMAS:
            library.define(schema)
        registrations = {}

        def make(implement) -> tuple[Registration, Callable]:
            registrations["cpu"] = Registration(name, "CPU", lambda: implement(name))
            for op in OPS:
                function = stand_in(name, op, getattr(reference, op), registrations)
                library.impl(op, function, "CompositeExplicitAutograd")
            linear = getattr(torch.ops, name).linear
            return registrations["cpu"], lambda x, qweight: linear(x, *qweight.op_args(), None)

        yield make


@pytest.mark.filterwarnings("error")
def test_the_first_call_settles_who_runs(registered, executor_ops):
    """Here as on a GPU: the library registers itself, and torch does not warn."""
    calls = []

    def implement(name):
        calls.append("settled")
        native.register_cuda_ops(executor_ops.executor.library, name, "CPU")
        return {}

    registration, linear = registered(implement)
    qweight, x = cases.quantized(40, 64), cases.activations(3, 64, torch.bfloat16)
    assert not calls
    for _ in range(2):
        assert_product_within_bound(linear(x, qweight), x, cases.dense(qweight).T, "linear by the CUDA kernels")
    assert calls == ["settled"]
    assert sum(run.count for run in executor_ops.launches() if "linear_small" in run.kernel) == 2
    assert registration.settle()
    assert calls == ["settled"]


def test_first_calls_of_many_threads_all_wait_for_the_same_kernel(registered):
    """None runs the reference meanwhile, or a kernel that is being taken away."""
    ran, settling = [], []

    def kernel(x, *arguments):
        ran.append("kernel")
        return reference.linear(x, *arguments)

    def implement(name):
        settling.append(name)
        time.sleep(0.2)
        return {"linear": kernel}

    _, linear = registered(implement)
    qweight, x = cases.quantized(5, 64), torch.randn(2, 64)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: linear(x, qweight), range(200)))
    assert (len(ran), len(settling)) == (200, 1)
    assert all(torch.equal(y, results[0]) for y in results)


def test_the_reference_runs_where_it_was_decided(registered):
    registration, linear = registered(lambda name: None)
    qweight, x = cases.quantized(5, 64), torch.randn(2, 64)
    assert torch.equal(linear(x, qweight), reference.linear(x, *qweight.op_args(), None))
    assert not registration.settle()


def test_an_implementation_that_fails_is_asked_again_and_nothing_else_runs(registered):
    attempts = []

    def implement(name):
        attempts.append(name)
        if len(attempts) < 3:
            raise ImportError(f"broken, attempt {len(attempts)}")
        return {"linear": reference.linear}

    _, linear = registered(implement)
    qweight, x = cases.quantized(5, 64), torch.randn(2, 64)
    for attempt in (1, 2):
        with pytest.raises(ImportError, match=f"broken, attempt {attempt}"):
            linear(x, qweight)
    expected = reference.linear(x, *qweight.op_args(), None)
    assert torch.equal(linear(x, qweight), expected)
    assert torch.equal(linear(x, qweight), expected)
    assert len(attempts) == 3


def test_an_exception_of_a_kernel_comes_through(registered):
    def broken(*arguments):
        raise MemoryError("the kernel's own")

    _, linear = registered(lambda name: {"linear": broken})
    for _ in range(2):
        with pytest.raises(MemoryError, match="the kernel's own"):
            linear(torch.randn(2, 64), cases.quantized(5, 64))


RULES = [
    Rule("linear", "bfloat16", 4, "reference", "measured"),
    Rule("linear", "bfloat16", 100, "triton", "measured"),
    Rule("linear", "float16", tuned_table.ANY_ROWS, "triton", "measured"),
    Rule("dequantize", "uint8", tuned_table.ANY_ROWS, "triton", "measured"),
]


def test_rules_choose_by_op_dtype_and_rows():
    kernels = {name: lambda x, *rest, name=name, **keywords: (name, rest, keywords) for name in tuned_table.BACKENDS}
    linear = tuned_table.by_rules("linear", RULES, kernels, "native")

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
    assert (
        tuned_table.by_rules("dequantize", RULES, kernels, "native")(torch.zeros(9, dtype=torch.uint8))[0] == "triton"
    )
    assert tuned_table.by_rules("quantize", RULES, kernels, "native")(torch.zeros(9, 9))[0] == "native"


def test_backends_that_share_a_device(monkeypatch, machine, found, executor_ops):
    """The library's ops under a namespace of their own, and another backend for the rows where it is faster."""
    machine((9, 0))
    library = select.cuda_library()[0]
    monkeypatch.setattr(
        library, "register", lambda name: native.register_cuda_ops(executor_ops.executor.library, name, "CPU")
    )
    found(Found(Table("sm_90", "of a test", rules=tuple(RULES[:1])), HERE))
    functions = select.implement("cuda")
    qweight = cases.quantized(40, 64)
    for rows, by_kernels in ((4, False), (5, True)):
        x = cases.activations(rows, 64, torch.bfloat16)
        executor_ops.executor.reset()
        y = functions["linear"](x, *qweight.op_args(), None)
        assert any("linear_small" in run.kernel for run in executor_ops.launches()) == by_kernels
        assert_product_within_bound(y, x, cases.dense(qweight).T, f"{rows} rows")


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """Every op's results by a backend in a process of its own, on the CPU: forced by its name, Triton interpreted."""

    def run(backend: str) -> dict:
        path = tmp_path_factory.mktemp(backend) / "results.pt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("NF4KERNELS_", "TRITON_"))}
        environment |= python_path() | {"OMP_WAIT_POLICY": "passive"}
        environment |= {"TRITON_INTERPRET": "1"} if backend == "triton" else {"NF4KERNELS_BACKEND": backend}
        command = [sys.executable, every_op.__file__, str(path)]
        result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert backend == "triton" or re.search(rf"cpu   {backend}.*forced by NF4KERNELS_BACKEND", result.stdout)
        return torch.load(path)

    return functools.cache(run)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_every_backend_gives_the_same_bits_or_keeps_the_same_bound(native_library, results_of, backend):
    for ours, expected in zip(results_of(backend).values(), results_of("reference").values()):
        for a, b in zip(ours["quantize"], expected["quantize"]):
            assert a is b is None or torch.equal(a, b)
        dense = expected["dequantize", torch.float32]
        N, K = dense.shape
        assert ours.keys() == expected.keys()
        for (op, dtype), result in ((key, result) for key, result in ours.items() if key != "quantize"):
            what = f"{backend} {op} {dtype}"
            x, dy, bias = (cases.activations(*shape, dtype) for shape in ((5, K), (5, N), (1, N)))
            P, B, A = (cases.activations(*shape, dtype, seed=1) for shape in ((5, 3), (N, 3), (3, K)))
            if op == "combine_experts_wgrad":
                torch.testing.assert_close(result, expected[op, dtype], rtol=1e-5, atol=1e-5)
            elif op in ("dequantize", "sort_by_expert", "combine_experts", "combine_experts_dgrad"):
                assert_same_bits(result, expected[op, dtype], what)
            elif op == "linear":
                matrix = torch.cat([dense.T, 0.5 * B.float().T])
                assert_product_within_bound(result, torch.cat([x, P], 1), matrix, what, bias[0])
            elif op == "linear_dgrad":
                matrix = torch.cat([dense, 0.5 * A.float()])
                assert_product_within_bound(result, torch.cat([dy, P], 1), matrix, what)
            elif op == "lora_grad":
                assert_product_within_bound(result, 0.5 * x[:, :8].T.float(), dy.float(), what)
            elif op == "grouped_lora_grad":
                assert_product_within_bound(result, 0.5 * P[:4].T.float(), dy[:4].float(), what)
            else:
                operands = {"grouped_linear": (x, dense.T), "grouped_lora_inner": (x, A.float().T)}
                a, matrix = operands.get(op, (dy, dense))
                assert not result[4:].any(), "rows of no expert"
                assert_product_within_bound(result[:4], a[:4], matrix, what)


def test_triton_is_refused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(select, "FORCED", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decided("cpu") == (None, "none", "NF4KERNELS_BACKEND=triton, and Triton runs on GPUs")


@pytest.mark.parametrize("variable", ["NF4KERNELS_CPU_ISA", "NF4KERNELS_CPU_PRODUCTS"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_the_native_backend_is_told_is_not_forced_beside_another(backend, variable):
    environment = os.environ | {"NF4KERNELS_BACKEND": backend, variable: "scalar"}
    command = [sys.executable, "-c", "import nf4kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert f"{variable} must be unset where NF4KERNELS_BACKEND={backend} is set" in result.stderr
