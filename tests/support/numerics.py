"""The checks of docs/design.md, section 7: equal bits, and the row-wise bound on a product's error."""

import math

import torch
from torch import Tensor


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """dtype, shape and every element equal; NaN equals NaN, and 0 equals -0 as in torch.equal."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    same = actual == expected
    if expected.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not same.all():
        wrong = (~same).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {expected.numel()} elements differ, the first at {list(first)}:"
            f" got {actual[first].item()!r}, expected {expected[first].item()!r}"
        )


WIDE = 32  # columns from which a row's error norm is a statistic, see `row_bounds`
LONGEST_SUM = 512  # terms in one fp32 running sum, docs/design.md, section 7


def row_bounds(a: Tensor, matrix: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(exact, bound): the fp64 product a @ matrix + bias and, per row, the error norm that a kernel may have.

    `matrix` [contraction, columns] is the fp32 Ŵ, never rounded. The bound is twice the error of dense PyTorch with Ŵ
    rounded to a's dtype, plus 1.5 eps / sqrt(columns) of the row's norm, plus 2^-22 of the norm of |a|·|Ŵ| over
    sqrt(contraction).

    Two equally good kernels differ by more than a factor of 2 in a row's error norm with probability P(F(n, n) > 4)
    for n columns: 0.009 % at 32, 8 % at 5, 30 % at 1. In narrower rows dense PyTorch's error is a draw, so the worst
    case is allowed there as well: each rounding of a sum of at most 512 terms and of the sums' sum, of Ŵ to the dtype,
    and of the result.
    """
    contraction, columns = matrix.shape
    exact = a.double() @ matrix.double()
    dense = a @ matrix.to(a.dtype)
    magnitude = a.double().abs() @ matrix.double().abs()
    section_7_magnitude = magnitude.norm(dim=1)
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
        dense = torch.nn.functional.linear(a, matrix.to(a.dtype).T.contiguous(), bias.to(a.dtype))
    dense_error = (dense.double() - exact).norm(dim=1)
    eps = torch.finfo(a.dtype).eps
    bound = 2 * dense_error + 1.5 * eps / max(columns, 1) ** 0.5 * exact.norm(dim=1)
    bound += 2.0**-22 * section_7_magnitude / max(contraction, 1) ** 0.5
    if columns < WIDE:
        sums = min(contraction, LONGEST_SUM) + math.ceil(contraction / LONGEST_SUM) + 1  # the last adds the bias
        weight_rounding = 0 if a.dtype == torch.float32 else eps / 2
        worst = (sums * 2.0**-24 + weight_rounding) * magnitude + eps / 2 * exact.abs()
        bound = torch.maximum(bound, worst.norm(dim=1))
    return exact, bound


def assert_product_within_bound(
    actual: Tensor, a: Tensor, matrix: Tensor, what: str, bias: Tensor | None = None
) -> None:
    """actual [rows, columns] against a [rows, contraction] @ matrix [contraction, columns], row by row."""
    exact, bound = row_bounds(a, matrix, bias)
    assert actual.dtype == a.dtype, f"{what}: dtype {actual.dtype}, expected {a.dtype}"
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.numel() == 0:
        return
    difference = actual.double() - exact
    error = difference.norm(dim=1)
    excess = torch.where(error.isnan(), torch.inf, error - bound)  # a NaN is the worst row
    row = excess.argmax().item()
    if excess[row] > 0:
        column = torch.where(difference[row].isnan(), torch.inf, difference[row].abs()).argmax().item()
        raise AssertionError(
            f"{what}, x {list(a.shape)} {a.dtype}, Ŵ {list(matrix.shape)}: row {row} has error {error[row]:.4g},"
            f" allowed {bound[row]:.4g} (rows over: {(excess > 0).sum()} of {len(error)});"
            f" worst element [{row}, {column}]: got {actual[row, column].item()!r}, exact {exact[row, column].item()!r}"
        )


def assert_unbiased(actual: Tensor, a: Tensor, matrix: Tensor, what: str) -> None:
    """The slope of actual on the exact product is 1: a factor common to all outputs hides below the rows' bound.

    Rounding Ŵ and the output to the dtype moves an output by at most eps of the terms' typical size, with a random
    sign; the slope over n outputs then has a deviation of at most eps / sqrt(n), five of which are allowed.
    """
    exact = a.double() @ matrix.double()
    slope = (actual.double() * exact).sum() / exact.square().sum()
    allowed = 5 * torch.finfo(a.dtype).eps / exact.numel() ** 0.5
    assert abs(slope - 1) <= allowed, f"{what}, {a.dtype}: slope {slope.item():.6f}, allowed 1 +- {allowed:.2g}"
