"""The host executor's numbers against exact rational arithmetic.

A fused multiply-add is rounded once; the sums of an mma can be truncated as a tensor core's are.
"""

import platform
import shutil
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from executor.build import CXX, EXECUTOR, build
from executor.executor import Executor
from executor.faults import THREADS, run

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tests/executor switches fibers in x86-64 assembly"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"tests/executor needs {CXX}"),
]


@pytest.fixture(scope="module")
def library():
    return build("faults", [EXECUTOR / "faults.cu"])


@pytest.fixture
def executor(library):
    executor = Executor(library)
    yield executor
    executor.set()
    executor.reset()


class Format(NamedTuple):
    dtype: torch.dtype
    bits: int  # of the significand
    least_exponent: int  # of a normal number
    overflow: Fraction  # what this and more is rounded to infinity

    def rounded(self, value: Fraction) -> float:
        """To nearest, ties to even."""
        if abs(value) >= self.overflow:
            return float("inf") if value > 0 else float("-inf")
        ulp = Fraction(2) ** (max(exponent(value), self.least_exponent) - self.bits + 1)
        return float(round(value / ulp) * ulp)


BF16 = Format(torch.bfloat16, 8, -126, Fraction(2) ** 128 - Fraction(2) ** 119)
FP16 = Format(torch.float16, 11, -14, Fraction(65520))


def exponent(value: Fraction) -> int:
    """floor(log2 |value|); of 0 a very small one."""
    if value == 0:
        return -10000
    e = abs(value).numerator.bit_length() - value.denominator.bit_length()
    return e if abs(value) >= Fraction(2) ** e else e - 1


def differs_by_way_of_fp32(form: Format, value: Fraction) -> bool:
    """Whether a rounding to fp32 and then to the format would give something else."""
    return abs(value) < 2**120 and form.rounded(value) != form.rounded(Fraction(float(np.float32(float(value)))))


def floats(words: np.ndarray, dtype: torch.dtype) -> list[float]:
    return torch.from_numpy(words.view(np.int16).copy()).view(dtype).double().tolist()


def ties_and_what_breaks_them(form: Format, rng: np.random.Generator, count: int) -> tuple:
    """a and b whose product lies midway between two numbers of the format, and c from 2^-20 to 2^-250 times smaller."""
    low, high = 2 ** (form.bits - 1), 2**form.bits
    significands = np.arange(low, high)
    products = significands[:, None] * significands[None, :]
    half = np.where(products < 2 ** (2 * form.bits - 1), 2 ** (form.bits - 2), 2 ** (form.bits - 1))
    i, j = np.nonzero(products % (2 * half) == half)
    chosen = rng.integers(0, len(i), count)
    powers = 2.0 ** rng.integers(0, 12, count)
    c = 2.0 ** rng.integers(-24 if form is FP16 else -133, -5, count) * rng.choice([-1, 1], count)
    as_form = [
        torch.from_numpy(x).to(form.dtype)
        for x in (significands[i[chosen]] / low * powers, significands[j[chosen]] / low, c)
    ]
    return tuple(x.view(torch.int16).numpy().view(np.uint16) for x in as_form)


@pytest.mark.parametrize("form", [BF16, FP16], ids=["bf16", "fp16"])
def test_a_multiply_add_is_rounded_once(executor, form):
    rng = np.random.default_rng(0)
    count, blocks = 2 * THREADS, 8
    any_bits = rng.integers(0, 2**16, (3, blocks // 2 * count), np.uint16)
    adversarial = ties_and_what_breaks_them(form, rng, blocks // 2 * count)
    a, b, c = (np.concatenate(pair) for pair in zip(any_bits, adversarial))
    out = np.zeros((3, blocks * count), np.uint16)
    assert run(executor, "fused", blocks, *(x.view(np.uint32) for x in (a, b, c)), out.view(np.uint32)) == 0
    results = floats(out[0 if form is BF16 else 1], form.dtype)
    broken_ties = 0
    for x, y, z, result in zip(*(floats(operand, form.dtype) for operand in (a, b, c)), results):
        if not np.isfinite([x, y, z]).all():
            np.testing.assert_equal(result, np.float64(x) * y + z)
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert result == form.rounded(exact), (x, y, z)
        broken_ties += differs_by_way_of_fp32(form, exact)
    assert broken_ties > 100, "a rounding by way of fp32 would pass"


def test_a_product_of_bf16_is_rounded_once_where_it_underflows(executor):
    """Around 2^-149, where fp32 ends, and 2^-133, where bf16 does."""
    powers = torch.arange(2 * THREADS).remainder(32).sub(85).double()
    a, b = ((torch.rand(2 * THREADS, dtype=torch.double) + 1) * 2.0**power for power in (powers, torch.tensor(-66.0)))
    words = [x.bfloat16().view(torch.int16).numpy().view(np.uint32) for x in (a, b)]
    out = np.zeros((3, 2 * THREADS), np.uint16)
    assert run(executor, "fused", 1, *words, words[0], out.view(np.uint32)) == 0
    operands = [floats(x.view(np.uint16), BF16.dtype) for x in words]
    assert floats(out[2], BF16.dtype) == [BF16.rounded(Fraction(x) * Fraction(y)) for x, y in zip(*operands)]


def truncated_sum(terms: list[Fraction]) -> float:
    """The terms cut off at the 25th bit of the largest, and their sum at its own 24th."""
    unit = Fraction(2) ** (max(exponent(term) for term in terms) - 24)
    total = sum((int(term / unit) * unit for term in terms), Fraction(0))  # int() truncates
    if total == 0:
        return 0.0
    ulp = Fraction(2) ** (exponent(total) - 23)
    return float(int(total / ulp) * ulp)


def mma(executor, a, b, c) -> np.ndarray:
    d = np.zeros((16, 8), np.float32)
    words = [t.contiguous().view(torch.int16).numpy() for t in (a, b.T)]
    assert run(executor, "mma", a.dtype == torch.bfloat16, 0, *words, c.numpy(), d) == 0
    return d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_truncated_sums_take_eight_products_at_a_time(executor, dtype):
    executor.set(sums="truncated")
    for spread in (1, 6):
        a, b, c = (
            torch.randn(*shape) * 2.0 ** torch.randint(-spread, spread + 1, shape)
            for shape in ((16, 16), (16, 8), (16, 8))
        )
        a, b = a.to(dtype), b.to(dtype)
        d = mma(executor, a, b, c)
        for m in range(16):
            for n in range(8):
                expected = c[m, n].item()
                for k in (0, 8):
                    products = [Fraction(a[m, i].item()) * Fraction(b[i, n].item()) for i in range(k, k + 8)]
                    expected = truncated_sum([Fraction(expected), *products])
                assert d[m, n] == expected, (m, n)


def test_truncated_sums_lose_what_lies_below_the_largest_term(executor):
    one, a = torch.ones(16, 8), torch.full((16, 16), 2.0**-12).half()
    below, last = (torch.full((16, 8), -x * 2.0**-12).half() for x in (0.75, 1))
    for sums, b, expected in (
        ("rounded", below, 1 - 2.0**-20),  # each of the 16 moves the sum to the next number below it, by 2^-24
        ("truncated", below, 1),
        ("truncated", last, 1 - 2.0**-20),  # 2^-24 is the last bit that is kept
        ("truncated", -last, 1 + 2.0**-20),
    ):
        executor.set(sums=sums)
        np.testing.assert_array_equal(mma(executor, a, b, one), expected)
