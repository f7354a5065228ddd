"""What the CUDA ops return: shapes, dtypes and strides as the fakes say, and the reference's bits through the binding.

The kernels' own tests are `test_<stem>_cuda.py`.
"""

import cases
import pytest
import torch
from cases import DEFAULT, Layout
from test_bad_input_cuda import OPS
from test_ops import SHAPES, fake_tensors, samples

from nf4kernels import reference


def tensors(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("layout", [DEFAULT, Layout(32, "fp4", None)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_result_is_what_the_fake_and_the_reference_say(cuda_ops, op, layout):
    for shape in (*SHAPES, (0, 7), (300, 64)):
        arguments = samples(op, *shape, layout)
        expected = getattr(reference, op)(*arguments)
        here = cuda_ops.move(arguments)
        result = getattr(cuda_ops.ops, op)(*here)
        if op == "dequantize_out":
            assert result is None
            assert torch.equal(here[-1].cpu(), arguments[-1])
            continue
        fake = getattr(torch.ops.nf4kernels, op)(*fake_tensors(arguments))
        for r, f, e in zip(tensors(result), tensors(fake), tensors(expected)):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
            assert r.device.type == cuda_ops.device
            assert torch.equal(r.cpu(), e)


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


@pytest.mark.parametrize("op", OPS)
def test_is_captured_in_a_graph(gpu, op):
    arguments = gpu.move(samples(op, 300, 640))
    call = getattr(gpu.ops, op)
    call(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*arguments)
    graph.replay()
    expected = call(*arguments)
    for a, b in zip(tensors(captured), tensors(expected)):
        assert a is None or torch.equal(a, b)


def test_runs_on_a_second_gpu(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only: nothing ran on a second one")
    for op in OPS:
        arguments = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in samples(op)]
        expected = getattr(reference, op)(*samples(op))
        result = getattr(gpu.ops, op)(*arguments)
        assert torch.cuda.current_device() == 0
        for r, e in zip(tensors(result), tensors(expected)):
            assert r is None or (r.device.index == 1 and torch.equal(r.cpu(), e))
