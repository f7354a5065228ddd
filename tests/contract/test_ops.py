"""The raw ops: opcheck, fakes that agree with the real thing, and what every binding does around a kernel."""

import inspect

import pytest
import torch
from support import cases
from support.cases import DEFAULT, DTYPES, Layout, dtype_id
from support.numerics import assert_same_bits
from support.op_calls import SHAPES, fake_tensors, samples, tensors
from torch.library import opcheck

from nf4kernels import ops as schemas
from nf4kernels import reference
from nf4kernels.ops import OPS

ops = torch.ops.nf4kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, dtype):
    opcheck(getattr(ops, op).default, samples(op, dtype=dtype))


@pytest.mark.parametrize("layout", [Layout(scale_codebook=None), Layout(32, "fp4", "dynamic8")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=cases.shape_id)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_shapes(op, shape, layout):
    opcheck(getattr(ops, op).default, samples(op, *shape, layout), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("x_shape", [(100,), (0, 100), (4, 100), (2, 0, 100), (1, 2, 3, 100)], ids=cases.shape_id)
def test_opcheck_of_leading_dimensions(x_shape):
    weight = cases.quantized(37, 100).op_args()
    opcheck(ops.linear.default, (torch.randn(x_shape), *weight, None))
    opcheck(ops.linear_dgrad.default, (torch.randn(*x_shape[:-1], 37), *weight))


def test_opcheck_of_strided_inputs():
    weight = cases.quantized(37, 100).op_args()
    opcheck(ops.linear.default, (torch.randn(100, 6).T, *weight, None))
    opcheck(ops.linear_dgrad.default, (torch.randn(1).expand(6, 37), *weight))
    opcheck(ops.quantize.default, (torch.randn(100, 6).T, DEFAULT.code, 64))
    opcheck(ops.dequantize_out.default, (*weight, 0, 37, 0, 100, torch.empty(37, 128)[:, 5:105]))


def test_every_op_is_checked_here():
    registered = {name.removeprefix("nf4kernels::") for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("nf4kernels::")}  # fmt: skip
    assert registered == set(OPS)


@pytest.mark.parametrize("layout", [DEFAULT, Layout(32, "fp4", None)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_result_is_as_the_fake_says(way, op, layout):
    """In shape, dtype, strides and device; and no element is left as it was allocated, which is NaN here."""
    for shape in (*SHAPES, (0, 7), (300, 64)):
        arguments = samples(op, *shape, layout)
        result = getattr(way.ops, op)(*way.move(arguments))
        fake = getattr(ops, op)(*fake_tensors(arguments))
        for r, f in zip(tensors(result), tensors(fake)):
            if op == "dequantize_out":
                assert r is f is None
                continue
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
            assert r.device.type == way.device
            assert not r.is_floating_point() or r.isfinite().all(), "an element that no kernel wrote is NaN"


@pytest.mark.ways("interpreter", "triton")
def test_every_op_has_the_reference_s_arguments(way):
    assert set(way.backend.OPS) == set(OPS)
    for name, function in way.backend.OPS.items():
        assert inspect.signature(function) == inspect.signature(getattr(reference, name)), name


NAMESPACE = "nf4kernels_triton"


@pytest.fixture(scope="module")
def triton_library():
    """The schemas once more, for the Triton ops to be registered as select.py would."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in schemas.SCHEMAS:
        library.define(schema)
    yield library
    library._destroy()


def test_triton_functions_are_registered_as_ops(interpreter, triton_library):
    for name, function in interpreter.backend.OPS.items():
        triton_library.impl(name, function, "CPU")
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        arguments = samples(name, dtype=torch.float32)
        expected = getattr(ops, name)(*(a.clone() if torch.is_tensor(a) else a for a in arguments))
        actual = op(*arguments)
        if name != "dequantize_out":
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        opcheck(op, arguments, test_utils="test_schema")


# What a GPU alone has: streams, graphs, several devices.


@pytest.mark.gpu
def test_runs_on_the_current_stream_of_its_tensors_device(gpu):
    """A second stream that waits for the first would see the result of a launch on the wrong stream too early."""
    w = torch.randn(4096, 4096, device=gpu.device)
    code = DEFAULT.code.to(gpu.device)
    expected = gpu.ops.quantize(w, code, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = w * 2
        result = gpu.ops.quantize(late, code, 64)
    stream.synchronize()
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1] * 2)


def assert_captured(call, arguments):
    """A graph of the call gives what the call gives; dequantize_out gives it in its last argument."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*arguments)
    graph.replay()
    captured = [t.clone() for t in (arguments[-1:] if captured is None else tensors(captured))]
    expected = call(*arguments)
    for a, b in zip(captured, arguments[-1:] if expected is None else tensors(expected), strict=True):
        assert_same_bits(a, b, "captured")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_is_captured_in_a_graph(gpu, op):
    assert_captured(getattr(gpu.ops, op), gpu.move(samples(op, 300, 640)))


class EveryProductInAGraph:
    op: str

    @pytest.mark.ways("cuda")
    @pytest.mark.every_kernel
    @pytest.mark.parametrize("splits", [False, True])
    @pytest.mark.parametrize("rows", [5, 20, 50, 200])
    def test_is_captured_in_a_graph(self, way, rows, splits):
        """Also the first launch of a kernel, whose code is loaded then; long contractions of few columns are split."""
        if way.kernel == "small" and rows > 5:
            pytest.skip("the small kernel takes at most 16 rows")
        forward = self.op == "linear"
        N, K = (64, 8192) if splits == forward else (8192, 64)
        x = cases.activations(rows, K if forward else N, torch.bfloat16)
        factors = (cases.activations(r, c, torch.bfloat16) for r, c in ((rows, 8), (N, 8) if forward else (8, K)))
        rest = (None, *factors, 2.0) if forward else (*factors, 2.0)
        assert_captured(getattr(way.ops, self.op), way.move((x, *cases.quantized(N, K).op_args(), *rest)))


class TestLinearInAGraph(EveryProductInAGraph):
    op = "linear"


class TestLinearDgradInAGraph(EveryProductInAGraph):
    op = "linear_dgrad"


@pytest.mark.gpu
def test_lora_grad_of_a_long_depth_is_captured_in_a_graph(gpu):
    small, wide = cases.activations(4096, 16, torch.bfloat16), cases.activations(4096, 512, torch.bfloat16)
    assert_captured(gpu.ops.lora_grad, gpu.move((small, wide, 0.5, torch.float32)))


@pytest.mark.gpu
def test_runs_on_a_second_gpu(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only: nothing ran on a second one")
    for op in OPS:
        arguments = samples(op)
        results = []
        for device in ("cuda:0", "cuda:1"):
            here = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
            result = getattr(gpu.ops, op)(*here)
            results.append(here[-1:] if op == "dequantize_out" else tensors(result))
            assert torch.cuda.current_device() == 0
            assert all(r.device == torch.device(device) for r in results[-1])
        for a, b in zip(*results):
            torch.testing.assert_close(a.cpu(), b.cpu())  # the same bits only where both are of one kind
