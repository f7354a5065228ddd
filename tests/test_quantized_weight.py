"""QuantizedWeight: the rules its tensors keep, and the shapes and sizes of the format."""

import dataclasses

import pytest
import torch
from support import cases
from support.cases import EMPTY_SHAPES, SHAPES, Layout, shape_id

from nf4kernels import quantize
from nf4kernels.quantized_weight import QuantizedWeight, absmax_shape, packed_shape, superblocks


@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=shape_id)
@pytest.mark.parametrize("block_size", [32, 64, 512])
def test_shapes(shape, block_size):
    N, K = shape
    rows_are_separate = packed_shape(N, K) == (N, K // 2)
    assert rows_are_separate == (K % 2 == 0)
    packed_bytes = 1
    for size in packed_shape(N, K):
        packed_bytes *= size
    assert packed_bytes == (N * K + 1) // 2
    blocks = 1
    for size in absmax_shape(N, K, block_size):
        blocks *= size
    assert blocks == (N * K + block_size - 1) // block_size
    assert (len(absmax_shape(N, K, block_size)) == 2) == (K % block_size == 0)
    assert superblocks(N, K, block_size) == (blocks + 255) // 256


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(32, scale_codebook=None), Layout(128, "custom", "dynamic8")], ids=str
)
def test_fields(layout):
    qweight = quantize(cases.weight(16, 96, torch.float16), **layout.options)
    assert qweight.shape == (16, 96)
    assert qweight.dtype == torch.float16
    assert qweight.block_size == layout.block_size
    assert qweight.codebook == layout.codebook
    assert qweight.scale_codebook == layout.scale_codebook
    assert qweight.double_quant == (layout.scale_codebook is not None)
    assert torch.equal(qweight.code, layout.code)
    assert qweight.device == torch.device("cpu")
    assert not qweight.packed.requires_grad


def test_bits_per_weight():
    """4 bits, 8 bits of scale per 64, fp32 of scale per 64 * 256, and the two codebooks and offset once."""
    fixed = 4 * (16 + 256 + 1)
    qweight = quantize(torch.randn(1024, 1024))
    assert qweight.nbytes - fixed == 1024 * 1024 * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    plain = quantize(torch.randn(1024, 1024), double_quant=False)
    assert plain.nbytes - 4 * 16 == 1024 * 1024 * (4 + 32 / 64) / 8


def test_frozen():
    qweight = cases.quantized(4, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        qweight.block_size = 128


def test_to_shares_tensors_already_there():
    qweight = cases.quantized(4, 64)
    assert qweight.to("cpu").packed is qweight.packed
    moved = qweight.to("meta")
    assert moved.device.type == "meta"
    assert moved.absmax.device.type == "meta"
    assert moved.shape == (4, 64)


SHARED = {"packed": torch.zeros(4, 32, dtype=torch.uint8), "absmax": torch.zeros(4, 1, dtype=torch.uint8)}
# changed fields, the error, and what its message must hold beside the argument's name
BAD = {
    "packed-dtype": ({"packed": SHARED["packed"].char()}, TypeError, "packed", "torch.int8"),
    "packed-shape": ({"packed": SHARED["packed"].view(128, 1)}, ValueError, "packed", r"\[128, 1\]"),
    "packed-too-small": ({"packed": SHARED["packed"][:, :31].contiguous()}, ValueError, "packed", r"\[4, 31\]"),
    "packed-strided": ({"packed": SHARED["packed"].T.contiguous().T}, ValueError, "packed", "contiguous"),
    "packed-none": ({"packed": None}, TypeError, "packed", "NoneType"),
    "packed-list": ({"packed": [1, 2]}, TypeError, "packed", "list"),
    "absmax-fp32-with-double-quant": ({"absmax": torch.zeros(4, 1)}, TypeError, "absmax", "float32"),
    "absmax-shape": ({"absmax": SHARED["absmax"].view(-1)}, ValueError, "absmax", r"\[4, 1\]"),
    "scale_absmax-none": ({"scale_absmax": None}, ValueError, "scale_offset", "None with codes"),
    "scale_absmax-half": ({"scale_absmax": torch.zeros(1).half()}, TypeError, "scale_absmax", "float16"),
    "scale_absmax-shape": ({"scale_absmax": torch.zeros(2)}, ValueError, "scale_absmax", r"\[1\]"),
    "scale_offset-1d": ({"scale_offset": torch.zeros(1)}, ValueError, "scale_offset", r"\[\]"),
    "scale_offset-float": ({"scale_offset": 0.5}, TypeError, "scale_offset", "float"),
    "code-shape": ({"code": torch.zeros(15)}, ValueError, "code", r"\[16\]"),
    "code-dtype": ({"code": torch.zeros(16).double()}, TypeError, "code", "float64"),
    "code-device": ({"code": torch.zeros(16, device="meta")}, ValueError, "code", "meta"),
    "scale_code-shape": ({"scale_code": torch.zeros(255)}, ValueError, "scale_code", r"\[256\]"),
    "scale_code-none-leaves-the-rest": ({"scale_code": None}, TypeError, "absmax", "uint8"),
    "shape-3d": ({"shape": (4, 64, 1)}, ValueError, "shape", r"\(N, K\)"),
    "shape-negative": ({"shape": (-4, 64)}, ValueError, "shape", "-4"),
    "dtype-double": ({"dtype": torch.float64}, TypeError, "dtype", "float64"),
    "dtype-int": ({"dtype": torch.int8}, TypeError, "dtype", "int8"),
    "block_size-48": ({"block_size": 48}, ValueError, "block_size", "48"),
    "block_size-8": ({"block_size": 8}, ValueError, "block_size", "8"),
    "block_size-8192": ({"block_size": 8192}, ValueError, "block_size", "8192"),
    "block_size-negative": ({"block_size": -64}, ValueError, "block_size", "-64"),
    "block_size-zero": ({"block_size": 0}, ValueError, "block_size", "0"),
    "block_size-of-another-weight": ({"block_size": 32}, ValueError, "absmax", r"\[4, 2\]"),
}


@pytest.mark.parametrize(("changes", "error", "argument", "came"), BAD.values(), ids=BAD)
def test_refuses(changes, error, argument, came):
    good = cases.quantized(4, 64)
    with pytest.raises(error, match=came) as raised:
        dataclasses.replace(good, **changes)
    assert str(raised.value).startswith(f"nf4kernels.QuantizedWeight: {argument} must")


def test_refuses_scales_without_double_quantization():
    good = cases.quantized(4, 64, Layout(scale_codebook=None))
    with pytest.raises(ValueError, match="scale_absmax must be None"):
        dataclasses.replace(good, scale_absmax=torch.zeros(1))
    with pytest.raises(ValueError, match="scale_offset must be None"):
        dataclasses.replace(good, scale_offset=torch.zeros(()))


def test_equality_is_identity():
    """Tensors have no truth value: == of two weights must not try to compare them."""
    qweight = cases.quantized(4, 64)
    assert qweight == qweight
    assert qweight != cases.quantized(4, 64)
    assert isinstance(hash(qweight), int)
    assert isinstance(qweight, QuantizedWeight)
