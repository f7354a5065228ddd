"""grouped_linear and its gradient: the bits of linear on each expert's rows, whatever rows the others have."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch._dynamo.testing
from support import cases
from support.cases import DTYPES, Layout, dtype_id, shape_id
from support.experts import offsets_of, rows_of
from support.numerics import assert_product_within_bound, assert_same_bits

from nf4kernels import QuantizedExperts, dequantize, grouped_linear, linear, quantize, quantize_experts

ops = torch.ops.nf4kernels
# Rows of each expert: none at either end and between, fewer and more than linear takes row by row, one expert with all.
COUNTS = ((0, 3, 1, 0, 17, 4, 0), (5, 2, 64), (0, 0, 40), (33, 0, 0), (9,), (0,), (0, 0, 0), (1,) * 12)
LAYOUTS = (
    Layout(),
    Layout(scale_codebook=None),
    Layout(32, "fp4", "dynamic8"),
    Layout(128, "custom", None),
    Layout(256, "int4"),
)
SHAPES = ((48, 256), (37, 512), (300, 256))  # the last: 5 superblocks an expert at blocks of 64, the last one short


def forward(x, counts, qweights):
    return ops.grouped_linear(x, offsets_of(counts), *qweights.op_args())


def backward(dy, counts, qweights):
    return ops.grouped_linear_dgrad(dy, offsets_of(counts), *qweights.op_args())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("shape", "layout"), cases.paired(SHAPES, LAYOUTS), ids=str)
def test_the_bits_of_linear_on_each_experts_rows(isa, shape, layout, counts, dtype):
    N, K = shape
    qweights = cases.quantized_experts(len(counts), N, K, layout)
    x, dy = cases.activations(sum(counts), K, dtype), cases.activations(sum(counts), N, dtype, seed=1)
    y, dx = forward(x, counts, qweights), backward(dy, counts, qweights)
    assert y.shape == (sum(counts), N)
    assert dx.shape == (sum(counts), K)
    for e, rows in rows_of(counts):
        weight = qweights[e].op_args()
        assert_same_bits(y[rows], ops.linear(x[rows], *weight, None), f"{isa} y of expert {e}")
        assert_same_bits(dx[rows], ops.linear_dgrad(dy[rows], *weight), f"{isa} dx of expert {e}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_within_the_bound_of_a_product(isa, dtype):
    """Against fp64 and the experts' own weights: the comparison above could not see both sides take a wrong expert."""
    counts = (3, 0, 20, 70)
    qweights = cases.quantized_experts(4, 96, 320)
    for mean in (0.0, 1.0):
        x, dy = cases.activations(93, 320, dtype, mean), cases.activations(93, 96, dtype, mean, seed=1)
        y, dx = forward(x, counts, qweights), backward(dy, counts, qweights)
        for e, rows in rows_of(counts):
            w = cases.dense(qweights[e])
            assert_product_within_bound(y[rows], x[rows], w.T, f"{isa} y of expert {e}")
            assert_product_within_bound(dx[rows], dy[rows], w, f"{isa} dx of expert {e}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_no_expert_become_zeros(isa, dtype):
    counts, T = (2, 0, 5), 12
    qweights = cases.quantized_experts(3, 48, 128)
    for filling in (1.0, torch.nan):
        x, dy = torch.full((T, 128), filling, dtype=dtype), torch.full((T, 48), filling, dtype=dtype)
        for result in (forward(x, counts, qweights), backward(dy, counts, qweights)):
            assert torch.equal(result[7:], torch.zeros_like(result[7:]))
            assert not (result[:7] == 0).all(1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", [forward, backward])
def test_a_row_does_not_see_the_others(isa, op, dtype):
    counts = (4, 1, 0, 18)
    qweights = cases.quantized_experts(4, 64, 128)
    x = cases.activations(23, 128 if op is forward else 64, dtype)
    alone = op(x, counts, qweights)
    for row in (0, 3, 4, 5, 22):
        for value in (torch.nan, torch.inf, 0.0, 1e4):
            others = torch.full_like(x, value)
            others[row] = x[row]
            assert_same_bits(op(others, counts, qweights)[row], alone[row], f"{isa} row {row} among {value}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_nan_block_stays_with_its_expert(isa, dtype):
    counts = (3, 3, 3)
    qweights = cases.quantized_experts(3, 40, 128, Layout(scale_codebook=None))
    qweights.absmax[1, 7, 1] = torch.nan
    y = forward(cases.activations(9, 128, dtype), counts, qweights)
    dx = backward(cases.activations(9, 40, dtype), counts, qweights)
    assert y[3:6, 7].isnan().all()
    assert dx[3:6, 64:].isnan().all()
    assert y.isnan().sum() == 3
    assert dx.isnan().sum() == 3 * 64


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strided_rows(isa, dtype):
    counts = (2, 0, 7)
    qweights = cases.quantized_experts(3, 48, 128)
    base = cases.activations(300, 301, dtype)
    for op, width in ((forward, 128), (backward, 48)):
        for name, x in {
            "columns": base[:9, 1 : width + 1],
            "every-other-column": base[:9, 1 : 2 * width + 1 : 2],
            "column-major": base[:width, :9].T,
            "expanded-row": base[:1, 3 : width + 3].expand(9, width),
            "expanded-scalar": base[0, 0].expand(9, width),
        }.items():
            assert_same_bits(op(x, counts, qweights), op(x.contiguous(), counts, qweights), f"{op.__name__} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_threads_and_repetition_do_not_change_bits(isa, dtype):
    if isa == "reference":
        pytest.skip("the reference multiplies by torch, whose bits depend on the number of threads")
    counts = (1, 40, 0, 7)
    qweights = cases.quantized_experts(4, 256, 256)
    x = cases.activations(48, 256, dtype)
    torch.set_num_threads(1)
    one = forward(x, counts, qweights), backward(x, counts, qweights)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        for again, expected in zip((forward(x, counts, qweights), backward(x, counts, qweights)), one):
            assert_same_bits(again, expected, f"{isa} with {threads} threads")


@pytest.mark.parametrize("shape", [(0, 48, 128), (3, 0, 128), (3, 48, 0)], ids=shape_id)
def test_zero_sizes(isa, shape):
    E, N, K = shape
    qweights = quantize_experts(torch.randn(shape))
    assert [q.shape for q in qweights] == [(N, K)] * E
    offsets = torch.arange(1, E + 1, dtype=torch.int32)
    for T in (E, E + 2):
        x = torch.ones(T, K, requires_grad=True)
        y = grouped_linear(x, offsets, qweights)
        y.sum().backward()
        assert torch.equal(y, torch.zeros(T, N))
        assert torch.equal(x.grad, torch.zeros(T, K))


def test_the_reference_keeps_the_bound():
    counts = (0, 3, 1, 40)
    qweights = cases.quantized_experts(4, 48, 256)
    x, dy = cases.activations(46, 256, torch.float32), cases.activations(46, 48, torch.float32)
    arguments = offsets_of(counts), *qweights.op_args()
    y, dx = cases.reference.grouped_linear(x, *arguments), cases.reference.grouped_linear_dgrad(dy, *arguments)
    assert torch.equal(y[44:], torch.zeros(2, 48))
    assert torch.equal(dx[44:], torch.zeros(2, 256))
    for e, rows in rows_of(counts):
        w = cases.dense(qweights[e])
        assert_product_within_bound(y[rows], x[rows], w.T, f"reference, y of expert {e}")
        assert_product_within_bound(dx[rows], dy[rows], w, f"reference, dx of expert {e}")
    for bad in ((4, 3, 44, 44), (-1, 3, 44, 44), (4, 4, 44, 47)):
        with pytest.raises(ValueError, match="expert_offsets must not fall and not exceed T=46"):
            cases.reference.grouped_linear(x, torch.tensor(bad), *qweights.op_args())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_quantize_experts_is_quantize_of_each(isa, layout, dtype):
    """300 x 256 at blocks of 64 are 1200 scales: a superblock over two experts would change the second one's bytes."""
    weight = cases.expert_weights(3, 300, 256, dtype)
    qweights = quantize_experts(weight, **layout.options)
    assert len(qweights) == 3
    for expert, qweight in zip(weight, qweights):
        expected = quantize(expert, **layout.options)
        for a, b in zip(qweight.op_args()[:6], expected.op_args()[:6]):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        assert (qweight.shape, qweight.dtype, qweight.codebook) == ((300, 256), dtype, layout.codebook)
        assert_same_bits(dequantize(qweight), dequantize(expected), f"{isa} {layout}")


def test_quantize_experts_of_strided_weights():
    weight = cases.expert_weights(3, 64, 128)
    expected = quantize_experts(weight)
    for strided in (weight.permute(1, 2, 0).contiguous().permute(2, 0, 1), weight.mT.contiguous().mT):
        assert not strided.is_contiguous()
        for a, b in zip(quantize_experts(strided).op_args()[:6], expected.op_args()[:6]):
            assert torch.equal(a, b)
    assert quantize_experts(weight.requires_grad_()).absmax.requires_grad is False


def test_experts_as_a_value():
    qweights = quantize_experts(cases.expert_weights(3, 300, 256))
    assert (qweights.shape, qweights.double_quant, qweights.block_size) == ((3, 300, 256), True, 64)
    assert qweights.scale_absmax.shape == (3, 5)
    assert qweights.scale_offset.shape == (3,)
    assert qweights.nbytes == sum(q.nbytes for q in qweights) - 2 * (16 + 256) * 4
    assert torch.equal(dequantize(qweights[-1]), dequantize(qweights[2]))
    qweights[1].packed.zero_()
    assert (qweights.packed[1] == 0).all(), "a view, not a copy"
    with pytest.raises(IndexError, match="expert must be one of 3, got 3"):
        qweights[3]
    for other in (copy.deepcopy(qweights), pickle.loads(pickle.dumps(qweights)), qweights.to("cpu")):
        assert type(other) is QuantizedExperts
        assert torch.equal(other.packed, qweights.packed)
    meta = quantize_experts(torch.empty(3, 300, 256, device="meta"))
    assert meta.device.type == "meta"
    for a, b in zip(meta.op_args()[:6], qweights.op_args()[:6]):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_nan_is_named_with_its_expert():
    weight = cases.expert_weights(3, 40, 128)
    weight[2, 5, 77] = torch.inf
    with pytest.raises(ValueError, match=r"quantize_experts: expert 2: .* got inf at row 5, column 77"):
        quantize_experts(weight)
    propagated = quantize_experts(weight, double_quant=False, nonfinite="propagate")
    assert propagated.absmax.isnan().sum() == 1


W = torch.randn(3, 16, 64)
Q = quantize_experts(W)
X, OFFSETS = torch.randn(5, 64), torch.tensor([2, 2, 5], dtype=torch.int32)
BAD = {
    "weight-list": (quantize_experts, ([[[1.0]]],), TypeError, "weight must be a tensor, got list"),
    "weight-2d": (quantize_experts, (W[0],), ValueError, r"weight must be 3-D \[E, N, K\], got shape \[16, 64\]"),
    "weight-K": (quantize_experts, (W[..., :32],), ValueError, "K must be a multiple of 64 at block_size=64, got K=32"),
    "block_size-K": (quantize_experts, (W, "nf4", 128), ValueError, "K must be a multiple of 128 .*, got K=64"),
    "block_size": (quantize_experts, (W, "nf4", 48), ValueError, "block_size must be one of .* got 48"),
    "qweights": (grouped_linear, (X, OFFSETS, Q[0]), TypeError, "qweights must be a QuantizedExperts, got Quantized"),
    "x-list": (grouped_linear, ([1.0], OFFSETS, Q), TypeError, "x must be a tensor, got list"),
    "x-double": (grouped_linear, (X.double(), OFFSETS, Q), TypeError, "x must be float32.*, got torch.float64"),
    "x-columns": (grouped_linear, (X[:, 1:], OFFSETS, Q), ValueError, r"x must have K=64 columns, got shape \[5, 63\]"),
    "x-1d": (grouped_linear, (X[0], OFFSETS, Q), ValueError, r"x must be 2-D \[T, K\], got shape \[64\]"),
    "x-3d": (grouped_linear, (X[None], OFFSETS, Q), ValueError, r"x must be 2-D \[T, K\], got shape \[1, 5, 64\]"),
    "x-device": (grouped_linear, (X.to("meta"), OFFSETS, Q), ValueError, "x must be on cpu as the weight is, got meta"),
    "offsets-list": (grouped_linear, (X, [2, 2, 5], Q), TypeError, "expert_offsets must be an int32 tensor, got list"),
    "offsets-long": (grouped_linear, (X, OFFSETS.long(), Q), TypeError, "expert_offsets must be .* got torch.int64"),
    "offsets-E": (grouped_linear, (X, OFFSETS[1:], Q), ValueError, r"expert_offsets must have shape \[3\], got \[2\]"),
    "offsets-device": (grouped_linear, (X, OFFSETS.to("meta"), Q), ValueError, "expert_offsets must be on cpu .* meta"),
}


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(function, arguments, error, message):
    with pytest.raises(error, match=f"^nf4kernels.{function.__name__}: {message}"):
        function(*arguments)


@pytest.mark.parametrize("ends", [(3, 2, 5), (-1, 2, 5), (2, 2, 6), (2, 2, 2**31 - 1)], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_refuses_offsets_that_fall_or_exceed_the_rows(isa, ends, needs_grad):
    x = X.clone().requires_grad_(needs_grad)
    with pytest.raises((RuntimeError, ValueError), match="expert_offsets must not fall and not exceed T=5, got"):
        grouped_linear(x, torch.tensor(ends, dtype=torch.int32), Q)
    with pytest.raises(TypeError, match="qweight must be a QuantizedWeight, got QuantizedExperts"):
        linear(X, Q)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (3, 16)}, ValueError, r"shape must be \(E, N, K\), got \(3, 16\)"),
        ({"scale_offset": torch.zeros(())}, ValueError, r"scale_offset must have shape \[3\], got \[\]"),
        ({"packed": Q.packed.float()}, TypeError, "packed must be torch.uint8, got torch.float32"),
        ({"absmax": Q.absmax.repeat(1, 1, 2)[..., ::2]}, ValueError, "absmax must be contiguous, got strides"),
        ({"block_size": 128}, ValueError, "absmax must have shape"),
    ],
    ids=["shape", "scale_offset", "packed", "absmax", "block_size"],
)
def test_experts_check_their_tensors(changes, error, message):
    with pytest.raises(error, match=f"nf4kernels.QuantizedExperts: {message}"):
        dataclasses.replace(Q, **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_is_that_of_the_dense_product(isa, dtype):
    """Each rounding of dx is of at most half an eps of its terms' magnitude: Ŵ's and its scale's, and the result's."""
    counts, T = (3, 0, 9), 14
    qweights = cases.quantized_experts(3, 48, 128)
    x = cases.activations(T, 128, dtype).requires_grad_()
    dy = cases.activations(T, 48, dtype, seed=3)
    y = grouped_linear(x, offsets_of(counts), qweights)
    y.backward(dy)
    assert torch.equal(y.detach(), forward(x.detach(), counts, qweights))
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad[12:], torch.zeros(2, 128, dtype=dtype))
    for e, rows in rows_of(counts):
        w = cases.dense(qweights[e]).double()
        exact = dy[rows].double() @ w
        allowed = 2 * torch.finfo(dtype).eps * (dy[rows].double().abs() @ w.abs())
        assert ((x.grad[rows].double() - exact).abs() <= allowed).all()


def test_gradcheck_by_finite_differences():
    """fp32 and linear in x: the quotient's only error is rounding, of each y by a sum of 64 terms."""
    counts = (2, 0, 3)
    qweights = cases.quantized_experts(3, 16, 64)
    x, dy = cases.activations(5, 64, torch.float32).requires_grad_(), torch.randn(5, 16)
    (grouped_linear(x, offsets_of(counts), qweights) * dy).sum().backward()
    direction = torch.randn(5, 64)
    with torch.no_grad():
        plus, minus = (grouped_linear(x + s * direction, offsets_of(counts), qweights) for s in (1, -1))
    quotient = ((plus.double() - minus.double()) / 2 * dy).sum()
    slope = (x.grad.double() * direction).sum()
    magnitude = ((plus.double().abs() + minus.double().abs()) * dy.abs()).sum()
    assert (quotient - slope).abs() <= 64 * 2.0**-24 * magnitude


def test_double_backward_is_refused():
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(grouped_linear(x, OFFSETS, Q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_torch_func_is_refused(transform):
    calls = {
        "jvp": lambda: torch.func.jvp(lambda z: grouped_linear(z, OFFSETS, Q), (X,), (X,)),
        "vmap": lambda: torch.vmap(lambda z: grouped_linear(z, OFFSETS, Q))(X.expand(2, 5, 64)),
        "grad": lambda: torch.func.grad(lambda z: grouped_linear(z, OFFSETS, Q).sum())(X),
    }
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        calls[transform]()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_autocast(needs_grad):
    x = X.clone().requires_grad_(needs_grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, OFFSETS, Q)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_linear(X.bfloat16(), OFFSETS, Q))
    if needs_grad:
        y.sum().backward()
        assert x.grad.dtype == torch.float32


def test_only_the_weight_is_saved_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_linear(X.clone().requires_grad_(), OFFSETS, Q)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (OFFSETS, *Q.op_args()[:6])}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_for_any_rows(fresh_dynamo, backend, dtype):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x, o: grouped_linear(x, o, Q), fullgraph=True, backend=counter)
    for T in (5, 9, 33):
        leaves = [cases.activations(T, 64, dtype).requires_grad_() for _ in range(2)]
        offsets = torch.tensor([2, T - 3, T - 1], dtype=torch.int32)
        torch._dynamo.mark_dynamic(leaves[1], 0)
        eager, traced = grouped_linear(leaves[0], offsets, Q), compiled(leaves[1], offsets)
        assert torch.equal(eager, traced)
        eager.square().sum().backward()
        traced.square().sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 1
