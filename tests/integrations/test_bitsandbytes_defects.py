"""bitsandbytes' defects on the CPU, through its own classes: each is there without patch(), and gone with it."""

import os
import signal
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from support.numerics import assert_product_within_bound, assert_same_bits

import nf4kernels as nf4
from nf4kernels.integrations.bitsandbytes import from_bnb, patch, unpatch

BF16 = torch.bfloat16
KNOWN = "0.50.2"  # the newest release that is known to have them


def layer(K=128, N=64, bias=False, dtype=BF16, **options):
    options = {"compute_dtype": dtype, "quant_type": "nf4"} | options
    return bnb.nn.Linear4bit(K, N, bias=bias, **options).to("cpu")


def values_of(linear):
    """fp32 Ŵ [N, K] by our own decode."""
    return nf4.dequantize(from_bnb(linear.weight), torch.float32)


def evaluate(linear, rows=4):
    linear.eval()
    with torch.no_grad():
        return linear(torch.randn(rows, linear.in_features, dtype=linear.compute_dtype))


def is_right_after_eval(linear):
    """Its output and, for one that requires a gradient, the gradient of x."""
    matrix = values_of(linear)
    evaluate(linear)
    linear.train()
    x = torch.randn(8, linear.in_features, dtype=BF16, requires_grad=True)
    y = linear(x)
    assert_product_within_bound(y.detach(), x.detach(), matrix.T, "y", linear.bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None, "no gradient"
    assert_product_within_bound(x.grad, dy, matrix, "dx")


def wrong_scales():
    weight = torch.randn(16, 4304)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    expected = nf4.dequantize(from_bnb((packed, state)), torch.float32)
    assert_same_bits(functional.dequantize_4bit(packed, state), expected, "dequantize_4bit")


def eval_with_odd_rows():
    linear = layer(64, 100)
    x, matrix = torch.randn(4, 64, dtype=BF16), values_of(linear)
    with torch.no_grad():
        assert_product_within_bound(linear.eval()(x), x, matrix.T, "y")


def eval_with_straddling_blocks():
    linear = layer(96, 64)
    x, matrix = torch.randn(4, 96, dtype=BF16), values_of(linear)
    with torch.no_grad():
        assert_product_within_bound(linear.eval()(x), x, matrix.T, "y")


def eval_of_an_empty_batch():
    assert evaluate(layer(), rows=0).shape == (0, 64)


def training_after_eval():
    is_right_after_eval(layer())


def training_after_eval_with_a_bias():
    is_right_after_eval(layer(bias=True))


def dequantize_after_eval():
    linear = layer()
    expected = values_of(linear).to(linear.weight.quant_state.dtype)
    evaluate(linear)
    found = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert_same_bits(found, expected, "dequantize_4bit")


def state_dict_after_eval():
    for nested in (False, True):
        linear = layer(compress_statistics=nested)
        before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
        evaluate(linear)
        after = linear.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert_same_bits(after[name], tensor, name)


def public_gemv():
    linear = layer()
    x, matrix = torch.randn(1, 128, dtype=BF16), values_of(linear)
    y = functional.gemv_4bit(x, linear.weight.data.t(), state=linear.weight.quant_state)
    assert_product_within_bound(y, x, matrix.T, "y")


def fp32_in_eval():
    linear = layer(dtype=torch.float32)
    x, matrix = torch.randn(4, 128), values_of(linear)
    with torch.no_grad():
        assert_product_within_bound(linear.eval()(x), x, matrix.T, "y")


def loading_its_own_state():
    for nested in (False, True):
        state = layer(96, 50, True, compress_statistics=nested).state_dict()
        linear = bnb.nn.Linear4bit(96, 50)
        linear.load_state_dict(state)
        for name, tensor in linear.state_dict().items():
            assert_same_bits(tensor, state[name], name)
        assert_product_within_bound(
            linear(torch.eye(96)).detach(), torch.eye(96), values_of(linear).T, "y", linear.bias
        )


def vectors_keep_their_shape():
    for shape in ((64,), (2,), (1, 2), (1, 1)):
        packed, state = functional.quantize_4bit(torch.randn(shape), quant_type="nf4")
        assert functional.dequantize_4bit(packed, state).shape == shape


NEEDS_BF16 = (  # what AVX512-BF16 alone brings about: the repacking
    eval_with_odd_rows, eval_with_straddling_blocks, eval_of_an_empty_batch, training_after_eval,
    training_after_eval_with_a_bias, dequantize_after_eval, state_dict_after_eval, public_gemv, fp32_in_eval,
)  # fmt: skip
NEEDS_AVX512 = (wrong_scales,)
DEFECTS = (*NEEDS_AVX512, *NEEDS_BF16, loading_its_own_state, vectors_keep_their_shape)
all_defects = pytest.mark.parametrize("right", DEFECTS, ids=lambda defect: defect.__name__)


@all_defects
def test_gone_with_patch(right):
    patch()
    try:
        right()
    finally:
        unpatch()


@all_defects
def test_there_without_patch(right):
    if bnb.__version__ > KNOWN:
        pytest.skip(f"bitsandbytes {bnb.__version__} may have mended it")
    if right in NEEDS_AVX512 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    if right in NEEDS_BF16 and not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    if right is eval_of_an_empty_batch:
        code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom {__name__} import *\neval_of_an_empty_batch()"
        process = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, check=False)
        assert process.returncode == -signal.SIGFPE
        return
    with pytest.raises((AssertionError, RuntimeError)):
        right()
