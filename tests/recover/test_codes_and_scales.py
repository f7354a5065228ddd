"""The codes and scales that roundings write: the reference's rule, and only what the kernels decode."""

import pytest
import torch

import nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.codebook import CODEBOOKS
from nf4kernels.recover.roundings.encoding import (
    Lattice,
    codes_of,
    decoded_scales,
    nearest_codes,
    scale_of_each,
    with_codes,
)
from nf4kernels.recover.roundings.levels import fitted_levels
from nf4kernels.recover.roundings.scales import searched_scales

CUSTOM = torch.linspace(-1, 0.9, 16)
OPTIONS = [
    {},
    {"scale_codebook": "dynamic8"},
    {"double_quant": False},
    {"codebook": "fp4", "block_size": 32},
    {"codebook": CUSTOM},
    {"codebook": "mxfp4"},
    {"codebook": "nvfp4"},
    {"codebook": "int4_symmetric"},
]


def weight_of(N: int, K: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)).to(dtype)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", CUSTOM])
def test_codes_at_the_scales_of_quantize_are_its_codes_ties_included(codebook):
    weight = weight_of(7, 100, torch.float32)
    code = CODEBOOKS[codebook] if isinstance(codebook, str) else codebook
    levels = code.sort().values
    weight[0, :16] = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.ones(1)])  # midpoints, at a scale of 1
    weight[0, 16:64] = 0
    plain = nf4.quantize(weight, codebook, double_quant=False)
    scales = scale_of_each(decoded_scales(plain), (7, 100), 64)
    codes = nearest_codes(weight, scales, plain.code)
    assert torch.equal(codes, codes_of(plain))
    assert torch.equal(with_codes(plain, codes).packed, plain.packed)


@pytest.mark.parametrize("shape", [(6, 192), (5, 77), (1, 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scales_decode_as_the_reference_decodes_them(options, shape):
    qweight = nf4.quantize(weight_of(*shape), **options)
    values = qweight.code[codes_of(qweight).long()] * scale_of_each(decoded_scales(qweight), shape, qweight.block_size)
    expected = reference.dequantize(*qweight.op_args(), 0, shape[0], 0, shape[1], torch.float32)
    assert torch.equal(values, expected)
    assert torch.equal(nf4.dequantize(qweight, torch.float32), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_nearest_storable_scale_against_all_of_them(options):
    qweight = nf4.quantize(weight_of(40, 640), **options)
    lattice = Lattice.of(qweight)
    wanted = decoded_scales(qweight) * (
        0.6 + torch.rand(qweight.absmax.numel(), generator=torch.Generator().manual_seed(1))
    )
    stored = lattice.nearest(wanted)
    found = lattice.decoded(stored)
    assert stored.dtype == qweight.absmax.dtype
    if lattice.numbers is None:
        assert torch.equal(stored, wanted.to(qweight.absmax.dtype))
        return
    every = torch.stack([lattice.decoded(torch.full_like(stored, int(byte))) for byte in lattice.codes], 1)
    best = (every - wanted[:, None]).abs().amin(1)
    assert ((found - wanted).abs() <= best + 1e-6 * wanted.abs()).all()
    if qweight.scale_codebook == "e4m3":
        assert not torch.isin(stored, torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(8, 256), (6, 100)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_block_is_worse_with_a_searched_scale(options, shape, weighted):
    weight = weight_of(*shape)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    plain = nf4.quantize(weight, **options)
    scales = scale_of_each(decoded_scales(plain), shape, plain.block_size)
    recoded = with_codes(plain, nearest_codes(weight.float(), scales, plain.code))
    found = searched_scales(weight, plain, importance)

    def errors(qweight):
        left = (weight.float() - nf4.dequantize(qweight, torch.float32)).square()
        left = (left if importance is None else left * importance).view(-1)
        size = qweight.block_size
        return torch.nn.functional.pad(left, (0, -left.numel() % size)).view(-1, size).sum(1)

    assert (errors(found) <= errors(recoded) * (1 + 1e-5)).all()
    # a scale of MXFP4 is a power of 2: without weights there may be none better
    allowed = errors(plain).sum()
    assert errors(found).sum() <= allowed if options.get("codebook") == "mxfp4" else errors(found).sum() < allowed


def test_a_searched_scale_against_every_storable_one():
    weight = weight_of(4, 256)
    plain = nf4.quantize(weight)
    lattice = Lattice.of(plain)
    blocks = weight.float().view(-1, 64)
    every = []
    for byte in lattice.codes:
        scale = lattice.decoded(torch.full((16,), int(byte), dtype=torch.uint8))[:, None]
        every.append((plain.code[nearest_codes(blocks, scale, plain.code).long()] * scale - blocks).square().sum(1))
    best = torch.stack(every, 1).amin(1)
    found = (
        (nf4.dequantize(searched_scales(weight, plain), torch.float32) - weight.float()).view(-1, 64).square().sum(1)
    )
    assert found.sum() <= 1.05 * best.sum()
    assert (found >= best * (1 - 1e-5)).all()


def test_k_means_finds_levels_that_are_there():
    levels = torch.tensor([-1, -0.8, -0.6, -0.45, -0.3, -0.2, -0.1, -0.02, 0.05, 0.13, 0.22, 0.33, 0.5, 0.7, 0.85, 1])
    choices = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0))
    found = fitted_levels(levels[choices] * 0.5, torch.full((64, 64), 0.5), nf4.codebook.NF4)
    torch.testing.assert_close(found, levels, atol=2**-15, rtol=0)


def test_k_means_weighs_columns_and_never_gets_worse():
    weight = weight_of(64, 128, torch.float32)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(3)) ** 3
    scales = scale_of_each(decoded_scales(nf4.quantize(weight)), (64, 128), 64)

    def error(code):
        decoded = code[nearest_codes(weight, scales, code).long()] * scales
        return ((decoded - weight).square() * importance).sum()

    weighted, plain = (
        fitted_levels(weight, scales, nf4.codebook.NF4, importance),
        fitted_levels(weight, scales, nf4.codebook.NF4),
    )
    assert error(weighted) < error(plain) < error(nf4.codebook.NF4)
    assert (weighted.diff() >= 0).all()
    assert weighted.abs().max() <= 1
