"""The CUDA ops against bad arguments: op and argument named, nothing launched, and the next call works."""

import pytest
import torch
from test_ops import WRONG, replaced, samples, wrong_id

from nf4kernels.ops import OPS

# The host does not read a device's offsets: those that no host would take are the grouped products' own tests'.
NOT_READ = "must not fall"


@pytest.mark.parametrize("case", [case for case in WRONG if NOT_READ not in case[2]], ids=wrong_id)
def test_refuses(cuda_ops, case):
    op, changes, names, _ = case
    arguments = cuda_ops.move(replaced(op, **changes))
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        getattr(cuda_ops.ops, op)(*arguments)
    assert names in str(raised.value)
    assert f"nf4kernels.{op.removesuffix('_out')}: " in str(raised.value)
    assert not cuda_ops.launches()


@pytest.mark.parametrize("op", OPS)
def test_refuses_tensors_of_two_devices(gpu, op):
    """Each tensor in turn stays on the CPU."""
    arguments = samples(op)
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            mixed = gpu.move(arguments)
            mixed[i] = argument
            with pytest.raises(RuntimeError, match=rf"nf4kernels\.{op.removesuffix('_out')}: .*the CPU"):
                getattr(gpu.ops, op)(*mixed)


def test_refuses_an_out_of_overlapping_rows(cuda_ops):
    out = torch.empty(1000, device=cuda_ops.device)
    for strides in ((8, 1), (0, 1)):
        arguments = cuda_ops.move(replaced("dequantize_out"))
        arguments[-1] = out.as_strided(arguments[-1].shape, strides)
        with pytest.raises(RuntimeError, match=r"nf4kernels\.dequantize: out's rows must not overlap"):
            cuda_ops.ops.dequantize_out(*arguments)
    assert not cuda_ops.launches()


def test_refuses_a_weight_beyond_63_bits(cuda_ops):
    arguments = cuda_ops.move(replaced("dequantize", N=2**40, K=2**40))
    with pytest.raises(RuntimeError, match=r"nf4kernels\.dequantize: N and K must have a product within 63 bits"):
        cuda_ops.ops.dequantize(*arguments)


@pytest.mark.parametrize("op", OPS)
def test_a_failed_launch_is_an_error_of_its_op(executor_ops, op):
    arguments = samples(op)
    expected = getattr(executor_ops.ops, op)(*arguments)
    before = [a.clone() for a in arguments if isinstance(a, torch.Tensor)]
    executor_ops.set(shared_limit=0)
    with pytest.raises(RuntimeError, match=rf"nf4kernels\.{op.removesuffix('_out')}: the launch on the CPU failed: "):
        getattr(executor_ops.ops, op)(*arguments)
    executor_ops.set()
    again = getattr(executor_ops.ops, op)(*arguments)
    for a, b in zip(before, (a for a in arguments if isinstance(a, torch.Tensor))):
        assert torch.equal(a, b)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
