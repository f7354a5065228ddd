"""The Triton ops as ops: the reference's arguments, registered as `select.py` would; bad arguments refused by name."""

import inspect
import re

import pytest
import torch
from support import cases
from support.cases import DTYPES
from support.triton_backend import LaunchRecorder
from test_ops import WRONG, replaced, samples, wrong_id
from torch.library import opcheck

from nf4kernels import ops, reference
from nf4kernels.ops import OPS

NAMESPACE = "nf4kernels_triton"


@pytest.fixture(scope="module")
def library():
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in ops.SCHEMAS:
        library.define(schema)
    yield library
    library._destroy()


def test_every_op_has_the_reference_s_arguments(triton_ops):
    assert set(triton_ops.backend.OPS) == set(OPS)
    for name, function in triton_ops.backend.OPS.items():
        expected = inspect.signature(getattr(reference, name))
        assert inspect.signature(function) == expected, name


def test_registered_as_ops(interpreter, library):
    for name, function in interpreter.backend.OPS.items():
        library.impl(name, function, "CPU")
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        arguments = samples(name, dtype=torch.float32)
        expected = getattr(torch.ops.nf4kernels, name)(*(a.clone() if torch.is_tensor(a) else a for a in arguments))
        actual = op(*arguments)
        if name != "dequantize_out":
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        opcheck(op, arguments, test_utils="test_schema")


@pytest.mark.parametrize("case", [case for case in WRONG if "must not fall" not in case[2]], ids=wrong_id)
def test_refuses(triton_ops, case):
    """All but the offsets that the host does not read, see test_grouped_linear_triton.py."""
    op, changes, names, _ = case
    arguments = triton_ops.move(replaced(op, **changes))
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        getattr(triton_ops.ops, op)(*arguments)
    assert f"nf4kernels.{op.removesuffix('_out')}: " in str(raised.value)
    assert re.split(" must be (?:BFloat16|Int),", names)[0] in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_refuses_tensors_of_two_devices(triton_ops, op):
    """Each tensor in turn is on another device."""
    arguments = triton_ops.move(samples(op))
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            mixed = list(arguments)
            mixed[i] = torch.empty_like(argument, device="meta")
            with pytest.raises(RuntimeError, match=rf"nf4kernels\.{op.removesuffix('_out')}: \w+ must be on"):
                getattr(triton_ops.ops, op)(*mixed)


def test_refuses_an_out_of_overlapping_rows(triton_ops):
    out = torch.empty(1000, device=triton_ops.device)
    for strides in ((8, 1), (0, 1)):
        arguments = triton_ops.move(replaced("dequantize_out"))
        arguments[-1] = out.as_strided(arguments[-1].shape, strides)
        with pytest.raises(RuntimeError, match=r"nf4kernels\.dequantize: out's rows must not overlap"):
            triton_ops.ops.dequantize_out(*arguments)


def test_refuses_a_weight_beyond_63_bits(triton_ops):
    arguments = triton_ops.move(replaced("dequantize", N=2**40, K=2**40))
    with pytest.raises(RuntimeError, match=r"nf4kernels\.dequantize: N and K must have a product within 63 bits"):
        triton_ops.ops.dequantize(*arguments)


@pytest.mark.parametrize("op", ["linear", "linear_dgrad"])
def test_no_run_of_a_sum_is_longer_than_512_terms(interpreter, monkeypatch, op):
    """Terms of fp32, or steps of 16 terms of a tensor core (DESIGN section 7): a longer contraction has parts."""
    kernel, length, function = LaunchRecorder(), 20000, getattr(interpreter.ops, op)
    monkeypatch.setitem(function.__globals__, f"{op}_kernel", kernel)
    monkeypatch.setitem(function.__globals__, "reduce_splits", lambda *arguments: None)
    qweight = cases.random_bytes(*((8, length) if op == "linear" else (length, 8)))
    for M in (1, 16, 64):
        for dtype in DTYPES:
            function(torch.zeros(M, length, dtype=dtype), *qweight.op_args(), *((None,) if op == "linear" else ()))
            (_, splits), options = kernel.launches.pop()
            if dtype == torch.float32:
                assert options["RUN"] == 512
            else:
                assert splits * 512 * 16 >= length
