"""Public functions and raw ops against bad arguments: function and argument are named, and nothing is changed."""

import re

import pytest
import torch
from support import cases
from support.op_calls import WRONG, fake_tensors, replaced, samples, wrong_id

import nf4kernels
from nf4kernels import QuantizedWeight, QuantLinear, dequantize, linear, lora_linear, quantize
from nf4kernels.ops import OPS

ops = torch.ops.nf4kernels

W = torch.randn(16, 64)
Q = cases.quantized(16, 64)
X = torch.randn(3, 64)
A, B = torch.randn(4, 64), torch.randn(16, 4)
META = "meta"
DESCENDING = torch.linspace(1, -1, 16)

# function, arguments, exception, argument named, what else the message holds
BAD = {
    "quantize-list": (quantize, ([[1.0]],), TypeError, "weight", "list"),
    "quantize-none": (quantize, (None,), TypeError, "weight", "NoneType"),
    "quantize-double": (quantize, (W.double(),), TypeError, "weight", "float64"),
    "quantize-int": (quantize, (W.int(),), TypeError, "weight", "int32"),
    "quantize-complex": (quantize, (W.cfloat(),), TypeError, "weight", "complex64"),
    "quantize-fp8": (quantize, (W.to(torch.float8_e4m3fn),), TypeError, "weight", "float8"),
    "quantize-1d": (quantize, (W[0],), ValueError, "weight", r"\[64\]"),
    "quantize-3d": (quantize, (W[None],), ValueError, "weight", r"\[1, 16, 64\]"),
    "quantize-0d": (quantize, (torch.ones(()),), ValueError, "weight", r"\[\]"),
    "quantize-nan": (quantize, (W * torch.nan,), ValueError, "weight", "nan at row 0, column 0"),
    "quantize-block_size-48": (quantize, (W, "nf4", 48), ValueError, "block_size", "48"),
    "quantize-block_size-8": (quantize, (W, "nf4", 8), ValueError, "block_size", "got 8"),
    "quantize-block_size-0": (quantize, (W, "nf4", 0), ValueError, "block_size", "got 0"),
    "quantize-block_size-negative": (quantize, (W, "nf4", -64), ValueError, "block_size", "-64"),
    "quantize-block_size-8192": (quantize, (W, "nf4", 8192), ValueError, "block_size", "8192"),
    "quantize-block_size-float": (quantize, (W, "nf4", 64.5), ValueError, "block_size", "64.5"),
    "quantize-codebook-name": (quantize, (W, "nf5"), ValueError, "codebook", "nf5"),
    "quantize-codebook-unsorted": (quantize, (W, DESCENDING), ValueError, "codebook", "ascending"),
    "quantize-codebook-15": (quantize, (W, torch.linspace(-1, 1, 15)), ValueError, "codebook", r"\[15\]"),
    "quantize-codebook-large": (quantize, (W, 2 * torch.linspace(-1, 1, 16)), ValueError, "codebook", r"\[-1, 1\]"),
    "quantize-codebook-nan": (quantize, (W, torch.full((16,), torch.nan)), ValueError, "codebook", "nan"),
    "quantize-codebook-int": (quantize, (W, torch.arange(16)), TypeError, "codebook", "int64"),
    "quantize-codebook-none": (quantize, (W, None), TypeError, "codebook", "NoneType"),
    "quantize-scale_codebook": (quantize, (W, "nf4", 64, True, "e5m2"), ValueError, "scale_codebook", "e5m2"),
    "quantize-nonfinite": (quantize, (W, "nf4", 64, False, "e4m3", "ignore"), ValueError, "nonfinite", "ignore"),
    "quantize-propagate-double": (quantize, (W, "nf4", 64, True, "e4m3", "propagate"), ValueError, "nonfinite", "True"),
    "dequantize-dtype-double": (dequantize, (Q, torch.float64), TypeError, "dtype", "float64"),
    "dequantize-dtype-int": (dequantize, (Q, torch.uint8), TypeError, "dtype", "uint8"),
    "dequantize-out-dtype": (dequantize, (Q, None, torch.empty(16, 64).double()), TypeError, "out", "float64"),
    "dequantize-out-shape": (dequantize, (Q, None, torch.empty(16, 63)), ValueError, "out", r"\[16, 63\]"),
    "dequantize-out-transposed": (dequantize, (Q, None, torch.empty(64, 16).T), ValueError, "out", "strides"),
    "dequantize-out-expanded": (dequantize, (Q, None, torch.empty(64).expand(16, 64)), ValueError, "out", "overlap"),
    "dequantize-out-windows": (
        dequantize,
        (Q, None, torch.empty(200).as_strided((16, 64), (8, 1))),
        ValueError,
        "out",
        "overlap",
    ),
    "dequantize-out-device": (dequantize, (Q, None, torch.empty(16, 64, device=META)), ValueError, "out", "meta"),
    "dequantize-rows": (dequantize, (Q, torch.float32, None, (0, 17)), ValueError, "rows", r"\(0, 17\)"),
    "dequantize-rows-negative": (dequantize, (Q, torch.float32, None, (-1, 3)), ValueError, "rows", "-1"),
    "dequantize-rows-backwards": (dequantize, (Q, torch.float32, None, (5, 3)), ValueError, "rows", r"\(5, 3\)"),
    "dequantize-cols": (dequantize, (Q, torch.float32, None, None, (60, 65)), ValueError, "cols", r"\(60, 65\)"),
    "linear-int": (linear, (X.int(), Q), TypeError, "x", "int32"),
    "linear-double": (linear, (X.double(), Q), TypeError, "x", "got torch.float64"),
    "linear-columns": (linear, (X[:, :63], Q), ValueError, "x", r"K=64 columns, got shape \[3, 63\]"),
    "linear-0d": (linear, (torch.ones(()), Q), ValueError, "x", r"\[\]"),
    "linear-device": (linear, (X.to(META), Q), ValueError, "x", "meta"),
    "linear-bias-shape": (linear, (X, Q, torch.ones(15)), ValueError, "bias", r"\[15\]"),
    "linear-bias-2d": (linear, (X, Q, torch.ones(1, 16)), ValueError, "bias", r"\[1, 16\]"),
    "linear-bias-device": (linear, (X, Q, torch.ones(16, device=META)), ValueError, "bias", "meta"),
    "lora-x-double": (lora_linear, (X.double(), Q, A, B, 1.0), TypeError, "x", "float64"),
    "lora-x-columns": (lora_linear, (X[:, 1:], Q, A, B, 1.0), ValueError, "x", "K=64"),
    "lora-A-columns": (lora_linear, (X, Q, A[:, 1:], B, 1.0), ValueError, "lora_A", r"\[4, 63\]"),
    "lora-A-1d": (lora_linear, (X, Q, A[0], B, 1.0), ValueError, "lora_A", r"\[64\]"),
    "lora-B-rank": (lora_linear, (X, Q, A, B[:, 1:], 1.0), ValueError, "lora_B", r"\[16, 3\]"),
    "lora-B-rows": (lora_linear, (X, Q, A, B[1:], 1.0), ValueError, "lora_B", r"\[15, 4\]"),
    "lora-A-device": (lora_linear, (X, Q, A.to(META), B, 1.0), ValueError, "lora_A", "meta"),
    "lora-B-device": (lora_linear, (X, Q, A, B.to(META), 1.0), ValueError, "lora_B", "meta"),
    "lora-bias": (lora_linear, (X, Q, A, B, 1.0, torch.ones(15)), ValueError, "bias", r"\[15\]"),
    "lora-dropout-one": (lora_linear, (X, Q, A, B, 1.0, None, 1.0), ValueError, "dropout_p", "1.0"),
    "lora-dropout-negative": (lora_linear, (X, Q, A, B, 1.0, None, -0.1), ValueError, "dropout_p", "-0.1"),
    "lora-dropout-nan": (lora_linear, (X, Q, A, B, 1.0, None, float("nan")), ValueError, "dropout_p", "nan"),
}


@pytest.mark.parametrize(("function", "arguments", "error", "argument", "message"), BAD.values(), ids=BAD)
def test_refuses(function, arguments, error, argument, message):
    tensors = [a for a in arguments if isinstance(a, torch.Tensor) and not a.is_meta]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message) as raised:
        function(*arguments)
    assert type(raised.value) is error
    text = str(raised.value)
    assert text.startswith(f"nf4kernels.{function.__name__}: "), text
    assert argument in text
    assert len(text) < 500
    for tensor, clone in zip(tensors, before):
        torch.testing.assert_close(tensor, clone, rtol=0, atol=0, equal_nan=True)


LAYER = {
    "codebook": ({"codebook": "nf5"}, ValueError, "codebook"),
    "unsorted": ({"codebook": DESCENDING}, ValueError, "codebook"),
    "block_size": ({"block_size": 100}, ValueError, "block_size"),
    "scale_codebook": ({"scale_codebook": "fp8"}, ValueError, "scale_codebook"),
    "dtype": ({"dtype": torch.float64}, TypeError, "float64"),
    "compute_dtype": ({"compute_dtype": torch.float64}, TypeError, "compute_dtype"),
    "compute_dtype-int": ({"compute_dtype": torch.int8}, TypeError, "compute_dtype"),
}


@pytest.mark.parametrize(("options", "error", "argument"), LAYER.values(), ids=LAYER)
def test_quant_linear_refuses(options, error, argument):
    with pytest.raises(error, match=argument) as raised:
        QuantLinear(64, 16, **options)
    assert "nf4kernels." in str(raised.value)
    linear_options = {k: v for k, v in options.items() if k != "dtype"}
    dense = torch.nn.Linear(64, 16, dtype=options.get("dtype"))
    before = dense.weight.clone()
    with pytest.raises(error, match=argument):
        QuantLinear.from_linear(dense, **linear_options)
    assert torch.equal(dense.weight, before)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 64, dtype=torch.int64), TypeError, "x must be .* got torch.int64"),
        (torch.ones(2, 64, dtype=torch.float64), TypeError, "x must be .* got torch.float64"),
        (torch.ones(2, 65), ValueError, r"x must have K=64 columns, got shape \[2, 65\]"),
        (torch.ones(()), ValueError, "x must have K=64 columns"),
        (torch.ones(2, 64, device="meta"), ValueError, "x must be on cpu"),
    ],
    ids=["int", "double", "columns", "0d", "device"],
)
@pytest.mark.parametrize("lora", [None, nf4kernels.LoraConfig(r=4)], ids=["plain", "lora"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_quant_linear_forward_refuses(x, error, message, lora, compute_dtype):
    layer = QuantLinear(64, 16, lora=lora, compute_dtype=compute_dtype)
    with pytest.raises(error, match=message):
        layer(x)


WEIGHT_FUNCTIONS = {
    "dequantize": dequantize,
    "linear": lambda q: linear(X, q),
    "lora_linear": lambda q: lora_linear(X, q, A, B, 1.0),
}


@pytest.mark.parametrize("function", WEIGHT_FUNCTIONS.values(), ids=WEIGHT_FUNCTIONS)
@pytest.mark.parametrize("not_a_weight", [W, None, "weight", QuantizedWeight], ids=["tensor", "none", "str", "class"])
def test_something_else_than_a_quantized_weight(function, not_a_weight):
    with pytest.raises(TypeError, match="qweight must be a QuantizedWeight"):
        function(not_a_weight)


@pytest.mark.parametrize("not_a_tensor", [None, [1.0], 3.5], ids=["none", "list", "float"])
def test_something_else_than_a_tensor(not_a_tensor):
    with pytest.raises(TypeError, match=r"linear: x must be a tensor"):
        linear(not_a_tensor, Q)
    with pytest.raises(TypeError, match=r"lora_linear: x must be a tensor"):
        lora_linear(not_a_tensor, Q, A, B, 1.0)


def test_a_failed_call_leaves_the_weight_usable():
    before = linear(X, Q)
    for bad in (X[:, 1:], X.double(), X.to(META)):
        with pytest.raises((TypeError, ValueError)):
            linear(bad, Q)
    assert torch.equal(linear(X, Q), before)


def test_out_is_untouched_by_a_refused_call():
    out = torch.full((16, 64), 7.0)
    with pytest.raises(ValueError, match="rows"):
        dequantize(Q, out=out, rows=(0, 99))
    assert (out == 7).all()


def test_quantize_does_not_touch_its_input():
    for dtype in cases.DTYPES:
        w = cases.weight(33, 65, dtype)
        before = w.clone()
        quantize(w)
        assert torch.equal(w, before)


# The raw ops: op and argument named, nothing launched, and the next call works.

# The ways whose ops check their arguments. The host does not read a device's offsets: those that no host would take
# are test_grouped_linear.py's.
CHECKED = ("reference", "cpu", "executor", "cuda", "interpreter", "triton")
READ_VALUES = ("must not fall", "must be in 0..")
ON_THE_HOST = [case for case in WRONG if any(words in case[2] for words in READ_VALUES)]
ANYWHERE = [case for case in WRONG if not any(words in case[2] for words in READ_VALUES)]


def assert_refused(way, case):
    op, changes, names, _ = case
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        getattr(way.ops, op)(*way.move(replaced(op, **changes)))
    text = str(raised.value)
    assert f"nf4kernels.{op.removesuffix('_out')}: " in text
    # torch's own name of a dtype is torch.int32, where C++ says Int.
    in_python = way.is_reference or hasattr(way, "backend")
    assert (re.split(" must be (?:BFloat16|Int|Long),", names)[0] if in_python else names) in text
    assert not way.kernel_names()


@pytest.mark.ways(*CHECKED)
@pytest.mark.parametrize("case", ANYWHERE, ids=wrong_id)
def test_ops_refuse(way, case):
    """By the same sentences."""
    assert_refused(way, case)


@pytest.mark.ways("cpu")
@pytest.mark.parametrize("case", ON_THE_HOST, ids=wrong_id)
def test_ops_refuse_values_that_the_host_reads(way, case):
    assert_refused(way, case)


@pytest.mark.parametrize("case", [case for case in WRONG if case[3]], ids=wrong_id)
def test_a_fake_refuses_what_would_give_its_result_a_wrong_shape(case):
    op, changes, *_ = case
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        getattr(ops, op)(*fake_tensors(replaced(op, **changes)))


@pytest.mark.ways("cpu", "cuda", "interpreter", "triton")
@pytest.mark.parametrize("op", OPS)
def test_ops_refuse_tensors_of_two_devices(way, op):
    """Each tensor in turn is on another device.

    One meta tensor among CPU tensors brings the call to the fake, which must not return uninitialised memory.
    """
    arguments = way.move(samples(op))
    other = "cpu" if way.name == "cuda" else "meta"
    message = {
        "cuda": rf"nf4kernels\.{op.removesuffix('_out')}: .*the CPU",
        "interpreter": rf"nf4kernels\.{op.removesuffix('_out')}: \w+ must be on",
        "triton": rf"nf4kernels\.{op.removesuffix('_out')}: \w+ must be on",
    }.get(way.name, r"tensors must be on one device, got .*(meta.*cpu|cpu.*meta)")
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            mixed = list(arguments)
            mixed[i] = torch.empty_like(argument, device=other)
            with pytest.raises(RuntimeError, match=message):
                getattr(way.ops, op)(*mixed)


@pytest.mark.ways(*CHECKED)
def test_dequantize_out_refuses_overlapping_rows(way):
    out = torch.empty(1000, device=way.device)
    for strides in ((8, 1), (0, 1)):
        arguments = way.move(replaced("dequantize_out"))
        arguments[-1] = out.as_strided(arguments[-1].shape, strides)
        with pytest.raises(RuntimeError, match=r"nf4kernels\.dequantize: out's rows must not overlap"):
            way.ops.dequantize_out(*arguments)
    assert not way.kernel_names()


@pytest.mark.ways(*CHECKED)
def test_dequantize_refuses_a_weight_beyond_63_bits(way):
    arguments = way.move(replaced("dequantize", N=2**40, K=2**40))
    with pytest.raises(RuntimeError, match=r"nf4kernels\.dequantize: N and K must have a product within 63 bits"):
        way.ops.dequantize(*arguments)


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("combine_experts")])
def test_a_failed_launch_is_an_error_of_its_op(executor_ops, op):
    """Of the ops whose kernels ask for shared memory, more than the executor's device has here."""
    arguments = samples(op)
    expected = getattr(executor_ops.ops, op)(*arguments)
    before = [a.clone() for a in arguments if isinstance(a, torch.Tensor)]
    executor_ops.executor.set(shared_limit=0)
    with pytest.raises(RuntimeError, match=rf"nf4kernels\.{op.removesuffix('_out')}: the launch on the CPU failed: "):
        getattr(executor_ops.ops, op)(*arguments)
    executor_ops.executor.set()
    again = getattr(executor_ops.ops, op)(*arguments)
    for a, b in zip(before, (a for a in arguments if isinstance(a, torch.Tensor))):
        assert torch.equal(a, b)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
