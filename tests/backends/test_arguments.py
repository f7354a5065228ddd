"""The reference, called as an op, checks its arguments as the compiled kernels do."""

import inspect

import pytest
import torch
from support import cases

from nf4kernels import reference
from nf4kernels.backends import select
from nf4kernels.backends.arguments import CHECKS
from nf4kernels.ops import OPS, SCHEMAS


@pytest.fixture
def ops(request):
    """The ops by the reference alone, in a namespace of this test's own, registered as for a device without kernels."""
    name = "nf4kernels_reference"
    with torch.library._scoped_library(name, "DEF") as library:
        for schema in SCHEMAS:
            library.define(schema)
        for op in OPS:
            library.impl(op, select.stand_in(name, op, select.REFERENCE[op], {}), "CompositeExplicitAutograd")
        yield getattr(torch.ops, name)


def test_every_op_has_a_check_with_its_arguments():
    assert list(CHECKS) == list(OPS)
    for op, check in CHECKS.items():
        expected = inspect.signature(getattr(reference, op)).parameters.values()
        found = inspect.signature(check).parameters.values()
        assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected], op


def test_bad_arguments_are_named(ops):
    weight, x, dy = cases.quantized(37, 100).op_args(), torch.randn(3, 100), torch.randn(3, 37)
    short = torch.zeros(5, dtype=torch.uint8)
    experts = cases.quantized_experts(3, 37, 128, cases.DEFAULT).op_args()
    for call, message in (
        (lambda: ops.quantize(torch.randn(4, 64).double(), cases.DEFAULT.code, 64), "quantize: weight must be float32"),
        (lambda: ops.quantize(torch.randn(4, 64), cases.DEFAULT.code, 48), "quantize: block_size must be a power of"),
        (lambda: ops.quantize_absmax(torch.zeros(5), torch.zeros(255), True), "quantize_absmax: scale_code must have"),
        (lambda: ops.dequantize(*weight, 0, 38, 0, 100, torch.float32), r"dequantize: rows must be a range within 0.."),
        (lambda: ops.dequantize(short, *weight[1:], 0, 1, 0, 1, torch.float32), "dequantize: packed must have 1850"),
        (lambda: ops.dequantize_out(*weight, 0, 37, 0, 100, torch.empty(100, 37).T), "dequantize: out must be contig"),
        (lambda: ops.linear(x.double(), *weight, None), "linear: x must be float32, bfloat16 or float16"),
        (lambda: ops.linear(x, *weight, None, torch.randn(3, 4)), "linear: lora_P and lora_B must be given together"),
        (lambda: ops.linear_dgrad(x, *weight), r"linear_dgrad: dy must have N=37 columns, got shape \[3, 100\]"),
        (lambda: ops.grouped_linear(x, short, *experts), r"grouped_linear: x must have shape \[T, K=128\]"),
        (lambda: ops.grouped_linear_dgrad(dy, short, *experts), "grouped_linear_dgrad: expert_offsets must be torch.i"),
        (lambda: ops.lora_grad(x[:2], dy, 1.0, torch.float32), "lora_grad: small must have 300 elements"),
    ):
        with pytest.raises(RuntimeError, match=rf"nf4kernels\.{message}"):
            call()


def test_the_check_changes_nothing_else(ops):
    weight, x = cases.quantized(37, 100).op_args(), torch.randn(3, 100)
    assert torch.equal(ops.linear(x, *weight, None), reference.linear(x, *weight, None))
    assert ops.linear(x[:0], *weight, bias=None).shape == (0, 37)
