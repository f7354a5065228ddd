"""What the CUDA ops' binding does: results of the shape, dtype and strides that the fakes say, on the right stream and
device. What the kernels compute is tested by `test_<stem>_cuda.py`."""

import pytest
import torch
from support import cases
from support.cases import DEFAULT, Layout
from test_ops import SHAPES, fake_tensors, samples

from nf4kernels.ops import OPS


def tensors(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("layout", [DEFAULT, Layout(32, "fp4", None)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_result_is_as_the_fake_says(cuda_ops, op, layout):
    for shape in (*SHAPES, (0, 7), (300, 64)):
        arguments = samples(op, *shape, layout)
        result = getattr(cuda_ops.ops, op)(*cuda_ops.move(arguments))
        fake = getattr(torch.ops.nf4kernels, op)(*fake_tensors(arguments))
        for r, f in zip(tensors(result), tensors(fake)):
            if op == "dequantize_out":
                assert r is f is None
                continue
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
            assert r.device.type == cuda_ops.device
            assert not r.is_floating_point() or r.isfinite().all(), "an element that no kernel wrote is NaN"


@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_leading_dimensions(cuda_ops, op):
    """One row at a time or all at once, in any strides: as many rows, and the same shape around them."""
    qweight = cases.quantized(24, 64)
    weight, width = cuda_ops.move(qweight.op_args()), 64 if op == "linear" else 24
    call = getattr(cuda_ops.ops, op)
    rest = (None,) if op == "linear" else ()
    for shape in ((), (0,), (5,), (2, 0), (2, 3), (1, 2, 1, 3)):
        x = torch.randn(*shape, width, device=cuda_ops.device)
        y = call(x, *weight, *rest)
        assert y.shape == (*shape, 88 - width)
        assert torch.equal(y, call(x.reshape(-1, width), *weight, *rest).view(y.shape))
    x = torch.randn(width, 6, device=cuda_ops.device).T
    assert torch.equal(call(x, *weight, *rest), call(x.contiguous(), *weight, *rest))


def test_a_strided_weight_is_quantized_as_its_copy(cuda_ops):
    w = cases.weight(64, 37).to(cuda_ops.device)
    code = DEFAULT.code.to(cuda_ops.device)
    for strided in (w.T, w[::2], w[:, 3:30]):
        for a, b in zip(
            cuda_ops.ops.quantize(strided, code, 64), cuda_ops.ops.quantize(strided.contiguous(), code, 64)
        ):
            assert torch.equal(a, b)


def test_dequantize_out_writes_its_rows_and_nothing_between(cuda_ops):
    qweight = cases.quantized(33, 65)
    buffer = torch.full((40, 128), 7.0, device=cuda_ops.device)
    cuda_ops.ops.dequantize_out(*cuda_ops.move(qweight.op_args()), 0, 33, 0, 65, buffer[3:36, 10:75])
    expected = torch.full((40, 128), 7.0)
    expected[3:36, 10:75] = cases.dense(qweight)
    assert torch.equal(buffer.cpu(), expected)


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
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_is_captured_in_a_graph(gpu, op):
    assert_captured(getattr(gpu.ops, op), gpu.move(samples(op, 300, 640)))


PRODUCTS = [(op, kernel, rows) for op in ("linear", "linear_dgrad") for kernel in ("tiled", "dequantize_gemm", "any")
            for rows in (5, 20, 50, 200)]  # fmt: skip


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize(("op", "kernel", "rows"), [("linear", "small", 5), *PRODUCTS])
def test_every_product_is_captured_in_a_graph(gpu, op, kernel, rows, splits):
    """Also the first launch of a kernel, whose code is loaded then; long contractions of few columns are split."""
    N, K = (64, 8192) if splits == (op == "linear") else (8192, 64)
    x = cases.activations(rows, K if op == "linear" else N, torch.bfloat16)
    factors = (cases.activations(r, c, torch.bfloat16) for r, c in ((rows, 8), (N, 8) if op == "linear" else (8, K)))
    rest = (None, *factors, 2.0) if op == "linear" else (*factors, 2.0)
    with gpu.running(kernel):
        assert_captured(getattr(gpu.ops, op), gpu.move((x, *cases.quantized(N, K).op_args(), *rest)))


def test_lora_grad_is_captured_in_a_graph(gpu):
    small, wide = cases.activations(4096, 16, torch.bfloat16), cases.activations(4096, 512, torch.bfloat16)
    assert_captured(gpu.ops.lora_grad, gpu.move((small, wide, 0.5, torch.float32)))


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
