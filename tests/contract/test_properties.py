"""Properties of the format and the products over drawn shapes, dtypes, block sizes, codebooks and values."""

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support import cases
from support.cases import BLOCK_SIZES, DTYPES, Layout
from support.numerics import assert_product_within_bound, assert_same_bits

from nf4kernels import LoraConfig, QuantLinear, dequantize, linear, quantize, reference

# Sizes cluster where tiles, blocks and bytes end.
sizes = st.one_of(
    st.integers(0, 70), st.sampled_from([96, 127, 128, 129, 255, 256, 257, 320, 511, 513, 600]), st.integers(71, 300)
)
dtypes = st.sampled_from(DTYPES)
layouts = st.builds(
    Layout,
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(["nf4", "fp4", "int4", "af4", "custom"]),
    st.sampled_from([None, "e4m3", "dynamic8"]),
)
# Levels in [-1, 1]: also equal ones, all of one sign, denormal.
codes = st.lists(
    st.floats(-1, 1, width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16
).map(lambda levels: torch.tensor(sorted(levels)))  # fmt: skip
exponents = st.integers(-140, 120)


def drawn_weight(N, K, exponent, seed, dtype):
    """Gaussian times a power of two, some elements zero, some rows of another size; clipped to dtype's range."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator) * 2.0**exponent
    w[torch.rand(N, K, generator=generator) < 0.05] = 0
    w *= 2.0 ** torch.randint(-3, 4, (N, 1), generator=generator)
    limit = torch.finfo(dtype).max
    return w.clamp(-limit, limit).to(dtype)


@settings(max_examples=150)
@given(N=sizes, K=sizes, layout=layouts, dtype=dtypes, exponent=exponents, seed=st.integers(0, 2**16))
@example(N=1, K=1, layout=Layout(), dtype=torch.float32, exponent=-140, seed=0)
def test_quantize_and_dequantize_are_the_reference(isa, N, K, layout, dtype, exponent, seed):
    w = drawn_weight(N, K, exponent, seed, dtype)
    qweight = quantize(w, **layout.options)
    packed, absmax = reference.quantize(w, layout.code, layout.block_size)
    expected = cases.from_parts(packed, absmax, (N, K), layout, dtype)
    what = f"{isa} {N}x{K} {layout} {dtype} 2^{exponent} seed {seed}"
    for name in ("packed", "absmax", "scale_absmax", "scale_offset"):
        if getattr(expected, name) is not None:
            assert_same_bits(getattr(qweight, name), getattr(expected, name), f"{name}, {what}")
    for out_dtype in DTYPES:
        assert_same_bits(dequantize(qweight, out_dtype), cases.dense(expected, out_dtype), f"dequantize {what}")


@settings(max_examples=100)
@given(code=codes, seed=st.integers(0, 2**16), block_size=st.sampled_from(BLOCK_SIZES), dtype=dtypes)
@example(code=torch.zeros(16), seed=0, block_size=64, dtype=torch.float32)
@example(code=torch.full((16,), -1.0), seed=0, block_size=64, dtype=torch.float32)
def test_any_codebook(isa, code, seed, block_size, dtype):
    w = drawn_weight(5, 203, 0, seed, dtype)
    qweight = quantize(w, code, block_size, double_quant=False)
    packed, absmax = reference.quantize(w, code, block_size)
    assert_same_bits(qweight.packed, packed, f"packed {isa} {code.tolist()}")
    assert_same_bits(qweight.absmax, absmax, f"absmax {isa}")
    x = cases.activations(3, 203, dtype)
    assert_product_within_bound(linear(x, qweight), x, cases.dense(qweight).T, f"linear {isa} {code.tolist()}")


@settings(max_examples=100)
@given(N=sizes, K=sizes, a=st.integers(0, 300), b=st.integers(0, 300), c=st.integers(0, 600), d=st.integers(0, 600),
       layout=layouts, dtype=dtypes)  # fmt: skip
def test_any_range_is_a_slice(isa, N, K, a, b, c, d, layout, dtype):
    rows, cols = sorted((a % (N + 1), b % (N + 1))), sorted((c % (K + 1), d % (K + 1)))
    qweight = cases.random_bytes(N, K, layout)
    part = dequantize(qweight, dtype, rows=tuple(rows), cols=tuple(cols))
    expected = cases.dense(qweight, dtype)[slice(*rows), slice(*cols)]
    assert_same_bits(part, expected, f"{isa} {N}x{K} rows {rows} cols {cols} {layout}")


@settings(max_examples=120)
@given(M=st.integers(0, 70), N=sizes, K=sizes, layout=layouts, dtype=dtypes, mean=st.sampled_from([0.0, 1.0, -1.0]))
def test_products_are_within_the_bound(isa, M, N, K, layout, dtype, mean):
    qweight = cases.quantized(N, K, layout)
    w = cases.dense(qweight)
    what = f"{isa} M={M} {N}x{K} {layout} mean {mean}"
    x, dy = cases.activations(M, K, dtype, mean), cases.activations(M, N, dtype, mean)
    assert_product_within_bound(linear(x, qweight), x, w.T, f"linear {what}")
    dx = torch.ops.nf4kernels.linear_dgrad(dy, *qweight.op_args())
    assert_product_within_bound(dx, dy, w, f"linear_dgrad {what}")


@settings(max_examples=80)
@given(N=st.integers(1, 70), K=st.integers(1, 300), layout=layouts, dtype=dtypes, power=st.integers(-8, 8))
def test_a_power_of_two_scales_the_scales_only(isa, N, K, layout, dtype, power):
    """Codes do not change, nor the 8-bit scales; Ŵ is multiplied exactly."""
    w = cases.weight(N, K, dtype)
    scaled = w * 2.0**power
    assume(torch.equal(scaled * 2.0**-power, w))  # exact in fp16 too
    one, other = quantize(w, **layout.options), quantize(scaled, **layout.options)
    assert torch.equal(one.packed, other.packed)
    if layout.scale_codebook:
        assert torch.equal(one.absmax, other.absmax)
    assert torch.equal(dequantize(one, torch.float32) * 2.0**power, dequantize(other, torch.float32))


@settings(max_examples=80)
@given(N=st.integers(1, 70), K=st.integers(1, 300), block_size=st.sampled_from(BLOCK_SIZES), dtype=dtypes)
def test_quantizing_twice_changes_nothing(isa, N, K, block_size, dtype):
    """Ŵ is a fixed point (without double quantization, in fp32): each block's largest value is its scale again."""
    first = quantize(cases.weight(N, K, dtype), block_size=block_size, double_quant=False)
    w = dequantize(first, torch.float32)
    again = quantize(w, block_size=block_size, double_quant=False)
    peaks = w.new_zeros(first.absmax.numel() * block_size)
    peaks[: N * K] = w.view(-1)
    reached = peaks.view(-1, block_size).abs().amax(1) == first.absmax.view(-1)
    assert reached.all(), "the largest weight of a block must decode to the block's scale"
    assert torch.equal(dequantize(again, torch.float32), w)


@settings(max_examples=60)
@given(N=st.integers(1, 60), K=st.integers(1, 200), M=st.integers(1, 20), dtype=dtypes, seed=st.integers(0, 2**16))
def test_linear_is_linear_in_powers_of_two(isa, N, K, M, dtype, seed):
    """Scaling x by 2 is exact at every step, so the output doubles exactly."""
    qweight = cases.quantized(N, K)
    x = cases.activations(M, K, dtype, seed=seed)
    assert torch.equal(linear(2 * x, qweight), 2 * linear(x, qweight))


@settings(max_examples=60)
@given(N=st.integers(1, 60), K=st.integers(1, 200), layout=layouts, dtype=dtypes, lora=st.booleans())
def test_a_layer_survives_its_state_dict(N, K, layout, dtype, lora):
    config = LoraConfig(r=2) if lora else None
    one = QuantLinear(K, N, lora=config, dtype=dtype, **layout.options)
    two = QuantLinear(K, N, lora=config, dtype=dtype, **layout.options)
    two.load_state_dict(one.state_dict(), strict=True)
    x = cases.activations(3, K, dtype)
    assert torch.equal(one(x), two(x))
    assert torch.equal(one.dequantize(dtype), two.dequantize(dtype))
