"""Codebooks against their published values, and how a caller's own is taken."""

import math

import pytest
import torch
from support import oracle

from nf4kernels import codebook

# QLoRA, appendix E, as bitsandbytes stores it; hexadecimal so that no digit is lost.
NF4_PUBLISHED = """
    -0x1.000000p+0 -0x1.647362p-1 -0x1.0cd660p-1 -0x1.946540p-2 -0x1.23449ap-2 -0x1.7a6a7ep-3 -0x1.74f0e2p-4 0x0p+0
    0x1.45f5fep-4 0x1.4995c6p-3 0x1.f809bap-3 0x1.5a0674p-2 0x1.c34970p-2 0x1.200f56p-1 0x1.722766p-1 0x1.0p+0
"""


def test_nf4_equals_the_published_table():
    published = torch.tensor([float.fromhex(v) for v in NF4_PUBLISHED.split()], dtype=torch.float64)
    assert torch.equal(codebook.NF4.double(), published)
    assert torch.equal(codebook.normal_float(), codebook.NF4)


def test_nf4_equals_scipy_stats_ppf():
    from scipy.stats import norm

    def quantiles(count):
        return torch.from_numpy(norm.ppf(torch.linspace(0.9677083, 0.5, count + 1)[:-1].numpy())).float()

    levels = torch.cat([quantiles(8), torch.zeros(1), -quantiles(7)]).sort().values
    assert torch.equal(levels / levels.max(), codebook.NF4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_has_an_exact_zero_and_both_ends(bits):
    levels = codebook.normal_float(bits)
    assert levels.shape == (2**bits,)
    assert levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    assert levels[2 ** (bits - 1) - 1] == 0


@pytest.mark.parametrize("bits", [1, 0, -4, 9])
def test_normal_float_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="bits must be 2 to 8"):
        codebook.normal_float(bits)


def test_int4_is_sevenths_with_two_zeros():
    expected = torch.tensor([-7, -6, -5, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 5, 6, 7]).float() / 7
    assert torch.equal(codebook.INT4, expected)


def test_fp4_is_e2m1_in_bitsandbytes_code_order():
    def value(bits):  # sign, two exponent bits, one fraction bit; the one subnormal is 0.0625, and 12 is the largest
        magnitudes = {0: 0.0, 1: 0.0625, 2: 8.0, 3: 12.0, 4: 4.0, 5: 6.0, 6: 2.0, 7: 3.0}
        return (-1 if bits & 8 else 1) * magnitudes[bits & 7] / 12

    expected = torch.tensor([value(b) for b in range(16)], dtype=torch.float64).float()
    torch.testing.assert_close(codebook.FP4, expected, rtol=2**-23, atol=0)
    assert sorted(codebook.FP4.tolist()) != codebook.FP4.tolist()


def test_af4_is_ascending_with_an_exact_zero():
    assert (codebook.AF4.diff() > 0).all()
    assert codebook.AF4[7] == 0
    assert codebook.AF4[0] == -1
    assert codebook.AF4[15] == 1


def test_no_codebook_holds_a_negative_zero_but_e2m1():
    codebooks = {name: levels for name, levels in codebook.CODEBOOKS.items() if name not in ("mxfp4", "nvfp4")}
    assert torch.signbit(codebook.E2M1[8])
    for name, levels in (codebooks | {"dynamic8": codebook.SCALE_CODEBOOKS["dynamic8"]}).items():
        zeros = levels[levels == 0]
        assert not torch.signbit(zeros).any(), name


def test_e4m3_entries_are_the_fp8_numbers_over_448():
    table = codebook.SCALE_CODEBOOKS["e4m3"]
    assert table.dtype == torch.float32
    for pattern in range(256):
        value = oracle.e4m3_value(pattern)
        expected = 0.0 if math.isnan(value) else float(torch.tensor(value) / 448)
        assert table[pattern].item() == expected, f"pattern {pattern:#x}"


def test_dynamic8_is_sorted_signed_and_has_both_ends():
    table = codebook.SCALE_CODEBOOKS["dynamic8"]
    assert table.shape == (256,)
    assert (table.diff() > 0).all()
    assert table[-1] == 1
    assert table[table == 0].numel() == 1
    assert set((-table[table < 0]).tolist()) == set(table[(table > 0) & (table < 1)].tolist())


@pytest.mark.parametrize("name", list(codebook.CODEBOOKS))
def test_resolve_by_name_gives_a_copy(name):
    resolved, levels = codebook.resolve(name, "test")
    assert resolved == name
    levels.fill_(500)
    assert codebook.CODEBOOKS[name].max() < 500


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resolve_of_own_levels_gives_fp32(dtype):
    given = torch.linspace(-1, 1, 16, dtype=dtype)
    name, levels = codebook.resolve(given, "test")
    assert name == "custom"
    assert levels.dtype == torch.float32
    assert torch.equal(levels, given.float())
    levels.fill_(5)
    assert given.max() == 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nf5", ValueError, "nf5"),
        (torch.linspace(-1, 1, 15), ValueError, "16 levels"),
        (torch.linspace(-1, 1, 16).view(4, 4), ValueError, "16 levels"),
        (torch.linspace(1, -1, 16), ValueError, "ascending"),
        (torch.linspace(-1, 1.01, 16), ValueError, r"\[-1, 1\]"),
        (torch.full((16,), torch.nan), ValueError, "ascending"),
        (torch.arange(16), TypeError, "floating-point"),
        ([0.0] * 16, TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
    ids=["name", "15-levels", "2-D", "descending", "beyond-1", "nan", "int", "list", "none"],
)
def test_resolve_refuses(given, error, message):
    with pytest.raises(error, match=message) as raised:
        codebook.resolve(given, "caller")
    assert str(raised.value).startswith("caller: codebook must")


def test_resolve_scale_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"caller: scale_codebook must be one of .*'e5m2'"):
        codebook.resolve_scale("e5m2", "caller")
