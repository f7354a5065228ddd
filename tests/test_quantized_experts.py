"""quantize_experts and QuantizedExperts: each expert is quantized as alone, and the stack is a value."""

import copy
import dataclasses
import pickle

import pytest
import torch
from support import cases
from support.cases import DTYPES, dtype_id
from support.experts import LAYOUTS
from support.numerics import assert_same_bits

from nf4kernels import QuantizedExperts, dequantize, quantize, quantize_experts

Q = quantize_experts(torch.randn(3, 16, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_quantize_experts_is_quantize_of_each(isa, layout, dtype):
    """300 x 256 at blocks of 64 are 1200 scales: a superblock over two experts would change the second one's bytes."""
    weight = cases.expert_weights(3, 300, 256, dtype)
    qweights = quantize_experts(weight, **layout.options)
    assert len(qweights) == 3
    for expert, qweight in zip(weight, qweights):
        expected = quantize(expert, **layout.options)
        for a, b in zip(qweight.op_args()[:6], expected.op_args()[:6]):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        assert (qweight.shape, qweight.dtype, qweight.codebook) == ((300, 256), dtype, layout.codebook)
        assert_same_bits(dequantize(qweight), dequantize(expected), f"{isa} {layout}")


def test_quantize_experts_of_strided_weights():
    weight = cases.expert_weights(3, 64, 128)
    expected = quantize_experts(weight)
    for strided in (weight.permute(1, 2, 0).contiguous().permute(2, 0, 1), weight.mT.contiguous().mT):
        assert not strided.is_contiguous()
        for a, b in zip(quantize_experts(strided).op_args()[:6], expected.op_args()[:6]):
            assert torch.equal(a, b)
    assert quantize_experts(weight.requires_grad_()).absmax.requires_grad is False


def test_experts_as_a_value():
    qweights = quantize_experts(cases.expert_weights(3, 300, 256))
    assert (qweights.shape, qweights.double_quant, qweights.block_size) == ((3, 300, 256), True, 64)
    assert qweights.scale_absmax.shape == (3, 5)
    assert qweights.scale_offset.shape == (3,)
    assert qweights.nbytes == sum(q.nbytes for q in qweights) - 2 * (16 + 256) * 4
    assert torch.equal(dequantize(qweights[-1]), dequantize(qweights[2]))
    qweights[1].packed.zero_()
    assert (qweights.packed[1] == 0).all(), "a view, not a copy"
    with pytest.raises(IndexError, match="expert must be one of 3, got 3"):
        qweights[3]
    for other in (copy.deepcopy(qweights), pickle.loads(pickle.dumps(qweights)), qweights.to("cpu")):
        assert type(other) is QuantizedExperts
        assert torch.equal(other.packed, qweights.packed)
    meta = quantize_experts(torch.empty(3, 300, 256, device="meta"))
    assert meta.device.type == "meta"
    for a, b in zip(meta.op_args()[:6], qweights.op_args()[:6]):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_nan_is_named_with_its_expert():
    weight = cases.expert_weights(3, 40, 128)
    weight[2, 5, 77] = torch.inf
    with pytest.raises(ValueError, match=r"quantize_experts: expert 2: .* got inf at row 5, column 77"):
        quantize_experts(weight)
    propagated = quantize_experts(weight, double_quant=False, nonfinite="propagate")
    assert propagated.absmax.isnan().sum() == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (3, 16)}, ValueError, r"shape must be \(E, N, K\), got \(3, 16\)"),
        ({"scale_offset": torch.zeros(())}, ValueError, r"scale_offset must have shape \[3\], got \[\]"),
        ({"packed": Q.packed.float()}, TypeError, "packed must be torch.uint8, got torch.float32"),
        ({"absmax": Q.absmax.repeat(1, 1, 2)[..., ::2]}, ValueError, "absmax must be contiguous, got strides"),
        ({"block_size": 128}, ValueError, "absmax must have shape"),
    ],
    ids=["shape", "scale_offset", "packed", "absmax", "block_size"],
)
def test_experts_check_their_tensors(changes, error, message):
    with pytest.raises(error, match=f"nf4kernels.QuantizedExperts: {message}"):
        dataclasses.replace(Q, **changes)
