"""The kernels on AMX tiles, with the tiles emulated: the contract of the products on CPUs that have none."""

from dataclasses import dataclass

import pytest
import torch
from arm.machine import Machine
from contract import test_grouped_linear, test_linear, test_linear_dgrad
from support import cases
from support.cases import Layout
from support.program_cases import GROUPED, PRODUCT, case_id
from support.ways import Way
from tiles import build

ISA = "amx_bf16"
MISSING = build.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@dataclass(frozen=True)
class TilesWay(Way):
    """Sizes around a tile's 16 rows, a C tile's 64 columns, the 128 k of four tiles and a slice's 256."""

    def run(self, op: str, *arguments):
        return self.ops.run(op, *arguments)

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,)

    def shapes(self, op: str) -> tuple[tuple[int, int], ...]:
        return (5, 63), (17, 32), (33, 65), (64, 64), (65, 192), (37, 100), (130, 320), (10, 1088)

    def rows(self, op: str) -> tuple[int, ...]:
        return 0, 1, 4, 5, 15, 16, 17, 33, 67

    def few_rows(self, op: str) -> tuple[int, ...]:
        return 5, 16, 21


@pytest.fixture(scope="module")
def machine():
    machine = Machine(build.build())
    if ISA not in machine.isas:
        machine.close()
        pytest.skip("this CPU has no AVX512-BF16, with which the kernels decode")
    with machine.running(ISA):
        yield machine
    machine.close()


@pytest.fixture
def tiles(machine):
    return TilesWay(f"emulated {ISA}", machine)


def of_bf16(cases_of_a_contract):
    """Without those of other dtypes, which have no tiles."""
    others = torch.float32, torch.float16
    return [case for case in cases_of_a_contract if not any(argument in others for argument in case[1:])]


@pytest.mark.parametrize("case", of_bf16(PRODUCT), ids=case_id)
@pytest.mark.parametrize("contract", [test_linear.TestLinear, test_linear_dgrad.TestLinearDgrad])
def test_product(tiles, contract, case):
    getattr(contract(), case[0])(tiles, *case[1:])


@pytest.mark.parametrize("case", of_bf16(GROUPED), ids=case_id)
@pytest.mark.parametrize(
    "contract", [test_grouped_linear.TestGroupedLinear, test_grouped_linear.TestGroupedLinearDgrad]
)
def test_grouped_product(tiles, contract, case):
    getattr(contract(), case[0])(tiles, *case[1:])


@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_a_running_sum_has_at_most_512_steps_of_a_tile(tiles, op):
    """Beside 2^25 a step's sum of 1 is lost; it cancels with what comes in the second half, whose sums begin anew."""
    D = 2 * 512 * 32
    qweight = cases.quantized_from(torch.ones((3, D) if op == "linear" else (D, 3)), Layout(scale_codebook=None))
    x = torch.full((17, D), 1 / 32).bfloat16()
    x[:, 0], x[:, -1] = 2.0**25, -(2.0**25)
    y = tiles.run(op, x, *qweight.op_args()).float()
    assert ((y - 512).abs() <= 8).all(), y
