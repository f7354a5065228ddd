"""What a side must get right before it is timed."""

import torch
from torch import Tensor

ROWS = 16  # of a product that are compared with fp64, spread over all of them
NF4_CHANGE = 0.12  # NF4 changes Gaussian weights, and so a product with them, by 9 %


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_as_exact_as_dense(
    actual: Tensor, a: Tensor, matrix: Tensor, what: str, added: Tensor | float = 0, more: float = 0
) -> None:
    """actual = a @ matrix + added: at most twice as far from the fp64 product as dense PyTorch, 1.5 eps and `more`.

    `matrix` is fp32 and dense PyTorch gets it rounded to a's dtype. ROWS rows are compared, in all their columns.
    """
    rows = torch.linspace(0, len(a) - 1, min(len(a), ROWS)).long()
    a, actual, added = a.detach()[rows], actual.detach()[rows], added[rows] if isinstance(added, Tensor) else added
    # in slices: the fp64 copy of a whole weight would be 500 MB
    exact = torch.cat([a.double() @ part.double() for part in matrix.split(1024, dim=1)], dim=1) + added
    dense = (a @ matrix.to(a.dtype)).double() + added
    allowed = 2 * relative_error(dense, exact) + 1.5 * torch.finfo(a.dtype).eps / matrix.shape[1] ** 0.5 + more
    error = relative_error(actual, exact)
    assert error <= allowed, f"{what}: error {error:.2e} against the fp64 product, allowed {allowed:.2e}"


def assert_close_to_dense(outputs: dict[str, Tensor], dense: str, what: str, factor: float = 1) -> None:
    """Every side's output differs from the unquantized product's as much as NF4 explains, `factor` times of several."""
    exact = outputs[dense].double()
    for side, output in outputs.items():
        change = relative_error(output, exact)
        assert change < factor * NF4_CHANGE, f"{what}, {side}: NF4 changes weights by 9 %, this changed by {change:.1%}"
