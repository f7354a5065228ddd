"""How `quantize` writes MXFP4, NVFP4 and symmetric INT4: each format's own rule, by exact fractions."""

from fractions import Fraction

import pytest
import torch
from support import cases, oracle

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.codebook import E2M1, FORMATS, SCALE_CODEBOOKS, default_block_size
from nf4kernels.published_formats import WRITERS

MAGNITUDES = [Fraction(value) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def nearest_even(value: Fraction, levels: list[Fraction]) -> int:
    """The index of the nearest level; of two as near the even one."""
    return min(range(len(levels)), key=lambda i: (abs(levels[i] - value), i % 2))


def fractions_of(tensor):
    return [Fraction(value) for value in tensor.double().tolist()]


def codes_of(qweight):
    flat = qweight.packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[: qweight.shape[0] * qweight.shape[1]].tolist()


def scales_of(qweight):
    absmax = qweight.absmax.reshape(-1)
    return absmax.float() if qweight.scale_code is None else qweight.scale_code[absmax.long()]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
def test_each_weight_takes_the_nearest_e2m1_of_its_quotient(name, dtype):
    weight = cases.weight(6, 80, dtype)
    weight[0, :32] = (
        torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -5, -6, 0, 100, -7, 1] * 2) / 64
    )
    qweight = nf4.quantize(weight, codebook=name)
    size = default_block_size(name)
    scales = fractions_of(scales_of(qweight))
    for i, (value, code) in enumerate(zip(fractions_of(weight.reshape(-1)), codes_of(qweight))):
        # What is divided is fp32, as the kernels' decode is: the quotient is rounded once before it is compared.
        quotient = Fraction(float(torch.tensor(float(value), dtype=torch.float32) / float(scales[i // size])))
        expected = nearest_even(min(abs(quotient), Fraction(6)), MAGNITUDES)
        assert code & 7 == expected, (i, value)
        assert expected == 0 or (code >> 3 == 1) == (value < 0), (i, value)


def test_mxfp4_scales_are_the_power_of_two_that_the_largest_needs():
    """Microscaling formats 1.0, section 6.3: floor(log2(largest)) - 2, so that it may saturate at 6."""
    largest = torch.tensor([7.9, 8.0, 4.0, 1e-3, 0.0, 2.0**-140, 3e38, 6.0])
    weight = torch.zeros(8, 32)
    weight[:, 5] = -largest
    qweight = nf4.quantize(weight, codebook="mxfp4")
    assert qweight.absmax.view(-1).tolist() == [127, 128, 127, 115, 0, 0, 252, 127]
    decoded = nf4.dequantize(qweight, torch.float32)[:, 5].neg()
    assert decoded[:3].tolist() == [6, 8, 4]
    assert decoded[4:6].tolist() == [0, 0]


def test_nvfp4_scales_are_e4m3_of_the_block_over_the_tensor():
    weight = cases.weight(8, 64)
    qweight = nf4.quantize(weight, codebook="nvfp4")
    whole = weight.abs().max() / torch.tensor(6.0 * 448.0)
    blocks = weight.view(-1, 16).abs().amax(1)
    numbers = [oracle.e4m3_value(b) for b in range(127)]
    for byte, block in zip(qweight.absmax.view(-1).tolist(), fractions_of(blocks / (6 * whole))):
        assert byte == nearest_even(block, [Fraction(number) for number in numbers])
    assert torch.equal(qweight.scale_code[:127], torch.tensor(numbers) * whole)
    assert int(qweight.absmax.max()) == 126  # 448: the largest block uses the whole range


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("block_size", [16, 128])
def test_int4_symmetric_is_the_integer_nearest_to_the_quotient(dtype, block_size):
    weight = cases.weight(4, 256, dtype)
    qweight = nf4.quantize(weight, codebook="int4_symmetric", block_size=block_size)
    assert qweight.absmax.dtype == dtype
    absmax = weight.float().view(-1, block_size).abs().amax(1)
    assert torch.equal(qweight.absmax.view(-1), (absmax / torch.full_like(absmax, 7.5)).to(dtype))
    quotient = weight.float().view(-1, block_size) / scales_of(qweight)[:, None]
    assert codes_of(qweight) == (quotient.round().clamp(-8, 7) + 8).int().view(-1).tolist()


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (3, 7), (5, 33), (2, 4096)], ids=str)
def test_every_shape_reads_as_what_was_written(name, shape):
    weight = cases.weight(*shape)
    qweight = nf4.quantize(weight, codebook=name)
    assert (qweight.codebook, qweight.scale_codebook) == (name, FORMATS[name].scale_codebook)
    expected = reference.dequantize(*qweight.op_args(), 0, shape[0], 0, shape[1], torch.float32)
    assert torch.equal(nf4.dequantize(qweight, torch.float32), expected)
    if weight.numel():
        assert (expected - weight).norm() < 0.13 * weight.norm()


def test_mxfp4_of_what_mxfp4_decodes_to_is_the_same():
    weight = nf4.dequantize(nf4.quantize(cases.weight(16, 256), codebook="mxfp4"), torch.float32)
    assert torch.equal(nf4.dequantize(nf4.quantize(weight, codebook="mxfp4"), torch.float32), weight)


def test_chunks_change_nothing(monkeypatch):
    weight = cases.weight(10, 64)
    whole = {name: nf4.quantize(weight, codebook=name) for name in WRITERS}
    monkeypatch.setattr("nf4kernels.published_formats.CHUNK", 128)
    for name, expected in whole.items():
        got = nf4.quantize(weight, codebook=name)
        assert torch.equal(got.packed, expected.packed)
        assert torch.equal(got.absmax, expected.absmax)


def test_experts_are_their_weights_stacked():
    weight = cases.expert_weights(3, 32, 64)
    for name in WRITERS:
        experts = nf4.quantize_experts(weight, codebook=name)
        for expert, own in zip(experts, (nf4.quantize(w, codebook=name) for w in weight)):
            assert torch.equal(nf4.dequantize(expert, torch.float32), nf4.dequantize(own, torch.float32))


def test_refuses():
    weight = torch.randn(4, 64)
    for name, message in {
        "q4_0": "codebook must be one that is written, got 'q4_0'",
        "iq4_nl": "codebook must be one that is written, got 'iq4_nl'",
    }.items():
        with pytest.raises(ValueError, match=message):
            nf4.quantize(weight, codebook=name)
    with pytest.raises(ValueError, match="block_size must be 32 with codebook='mxfp4', got 64"):
        nf4.quantize(weight, codebook="mxfp4", block_size=64)
    with pytest.raises(ValueError, match="nonfinite must be 'raise' with codebook='nvfp4'"):
        nf4.quantize(weight, codebook="nvfp4", double_quant=False, nonfinite="propagate")
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight[2, 3] = bad
        for name in WRITERS:
            with pytest.raises(ValueError, match=r"finite, got .* at row 2, column 3"):
                nf4.quantize(weight, codebook=name)


def test_the_tables_are_the_formats():
    assert [abs(Fraction(value)) for value in E2M1[:8].tolist()] == MAGNITUDES
    assert torch.equal(E2M1[8:], -E2M1[:8])
    table = SCALE_CODEBOOKS["e8m0"]
    assert [Fraction(value) for value in table[:255].tolist()] == [Fraction(2) ** (b - 127) for b in range(255)]
    assert table[255].isnan()
