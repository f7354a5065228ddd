"""patch(): the bytes and the bits of bitsandbytes' functions and ops, and that unpatch() puts everything back."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import modules

import nf4kernels as nf4
from nf4kernels.integrations.bitsandbytes import is_patched, patch, unpatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# K a multiple of the block size, of 2 alone, odd, less than a block; vectors; three dimensions; nothing
SHAPES = ((16, 128), (16, 4304), (5, 33), (3, 10), (7,), (2,), (1, 2), (2, 3, 65), (0, 64), (4, 0))


@pytest.fixture
def patched():
    patch()
    yield
    unpatch()


def as_ours(weight, quant_type, blocksize, nested):
    """What `nf4kernels.quantize` makes of any tensor, flat."""
    return nf4.quantize(weight.reshape(1, -1), quant_type, blocksize, nested, "dynamic8")


def assert_same_bytes(packed, state, qweight):
    assert torch.equal(packed.contiguous().view(-1).view(torch.uint8), qweight.packed.view(-1))
    assert torch.equal(state.absmax, qweight.absmax.view(-1))
    assert (state.state2 is not None) == state.nested == qweight.double_quant
    if state.nested:
        assert torch.equal(state.offset, qweight.scale_offset)
        assert torch.equal(state.state2.absmax, qweight.scale_absmax)
        assert torch.equal(state.state2.code, qweight.scale_code)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_has_our_bytes_and_bits(patched, shape, quant_type, nested):
    for blocksize in BLOCK_SIZES:
        for dtype in DTYPES:
            weight = torch.randn(shape).to(dtype)
            packed, state = functional.quantize_4bit(
                weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
            )
            qweight = as_ours(weight, quant_type, blocksize, nested)
            assert packed.shape == ((weight.numel() + 1) // 2, 1)
            assert_same_bytes(packed, state, qweight)
            assert state.shape == weight.shape
            assert state.dtype == dtype
            expected = nf4.dequantize(qweight, dtype).view(shape)
            found = functional.dequantize_4bit(packed, state)
            assert found.dtype == dtype
            assert found.shape == expected.shape
            assert torch.equal(found, expected)


def attributes():
    owners = (bnb, functional, _functions, _functions.MatMul4Bit, modules, modules.Linear4bit, modules.Params4bit)
    return [dict(vars(owner)) for owner in owners]


def outputs():
    """Of each op and class, on a weight whose K no block size divides: where bitsandbytes and we differ."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 4304, generator=generator) for n in (16, 4))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    y = bnb.matmul_4bit(x.requires_grad_(), packed.t(), state)
    y.sum().backward()
    return [
        packed,
        state.absmax,
        state.offset,
        state.state2.absmax,
        functional.dequantize_4bit(packed, state),
        y,
        x.grad,
    ]


def has_cpu_kernel(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{op}", "CPU")


def test_unpatch_puts_everything_back():
    assert not is_patched()
    assert not has_cpu_kernel("quantize_4bit")  # nor does bitsandbytes have one: its own is for every device
    before, values = attributes(), outputs()
    patch()
    patch()
    assert is_patched()
    assert has_cpu_kernel("quantize_4bit")
    assert attributes() != before
    unpatch()
    assert not is_patched()
    assert not has_cpu_kernel("quantize_4bit")
    after = attributes()
    assert all(a.keys() == b.keys() and all(a[name] is b[name] for name in a) for a, b in zip(after, before))
    assert all(map(torch.equal, outputs(), values))
    unpatch()
