"""Linear4bit and what stands around it on our kernels: products, gradients, storage dtypes, compiling, embeddings."""

import contextlib

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.autograd import _functions
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from support.numerics import assert_product_within_bound, assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import nf4kernels as nf4
from nf4kernels.integrations.bitsandbytes import from_bnb, patch, to_bnb, unpatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 128), (50, 96), (5, 34), (3, 65), (7, 4304))  # N, K
HAS_GEMM = hasattr(torch.ops.bitsandbytes, "gemm_4bit")  # from 0.50 on; before, the forward dequantizes
held_matmul = _functions.matmul_4bit  # as a program has it that imported it before patch()


@pytest.fixture(autouse=True)
def patched():
    patch()
    yield
    unpatch()


class Calls(TorchDispatchMode):
    """The names of our ops that are called, and of bitsandbytes'."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("nf4kernels", "bitsandbytes"):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def layer(N=64, K=128, bias=True, dtype=torch.bfloat16, **options):
    options = {"compute_dtype": dtype, "quant_type": "nf4"} | options
    return bnb.nn.Linear4bit(K, N, bias=bias, **options).to("cpu")


def values_of(linear):
    return nf4.dequantize(from_bnb(linear.weight), torch.float32)


def matrix_of(x):
    return x.flatten(0, -2)


def check(linear, x):
    """y, dx and dbias of a call, against fp64."""
    matrix = values_of(linear)
    x = x.detach().requires_grad_()
    y = linear(x)
    bias = None if linear.bias is None else linear.bias.detach().to(x.dtype)
    rows = matrix_of(x.detach())
    assert y.shape == (*x.shape[:-1], linear.out_features)
    assert_product_within_bound(matrix_of(y.detach()), rows, matrix.T, "y", bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_product_within_bound(matrix_of(x.grad), matrix_of(dy), matrix, "dx")
    if linear.bias is not None:
        assert linear.bias.grad.dtype == linear.bias.dtype
        torch.testing.assert_close(linear.bias.grad, matrix_of(dy).sum(0).to(linear.bias.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_gradients(dtype, shape):
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            linear = layer(*shape, dtype=dtype, quant_type=quant_type, compress_statistics=nested)
            before = linear.bias.dtype
            for rows in ((1,), (5,), (2, 3), (1, 2, 1, 3), (0,)):
                linear.zero_grad()
                check(linear.train(rows != (1,)), torch.randn(*rows, shape[1], dtype=dtype))
            with torch.no_grad():
                assert linear.eval()(torch.randn(shape[1], dtype=dtype)).shape == shape[:1]
            assert linear.bias.dtype == before == torch.float32


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_block_sizes(blocksize):
    linear = layer(64, 96)
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 96), blocksize=blocksize, quant_type="nf4", module=linear)
    linear = linear.to("cpu")
    assert linear.weight.quant_state.blocksize == blocksize
    check(linear, torch.randn(3, 96).bfloat16())


def test_storage_dtypes_hold_the_same_bytes():
    weight = torch.randn(64, 96)
    expected, _ = functional.quantize_4bit(weight, quant_type="nf4")
    for storage in DTYPES:
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
        assert packed.dtype == storage
        assert torch.equal(packed.view(torch.uint8).view(-1, 1), expected)
        assert torch.equal(functional.dequantize_4bit(packed, state), functional.dequantize_4bit(expected, state))
        check(layer(50, 96, quant_storage=storage), torch.randn(3, 96).bfloat16())
    with pytest.raises(ValueError, match=r"quant_storage must divide the packed bytes, got torch.float32 for 5 bytes"):
        functional.quantize_4bit(torch.randn(10), quant_storage=torch.float32)


def test_inputs_that_are_not_contiguous():
    base = torch.randn(96, 64)
    packed, state = functional.quantize_4bit(base.T, quant_type="nf4", compress_statistics=True)
    expected, _ = functional.quantize_4bit(base.T.contiguous(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, expected)
    cube = torch.randn(4, 6, 64).transpose(0, 1)
    assert torch.equal(functional.quantize_4bit(cube)[0], functional.quantize_4bit(cube.contiguous())[0])
    check(layer(64, 96), torch.randn(96, 5).bfloat16().T)
    out = torch.empty(96, 64).T
    assert functional.dequantize_4bit(packed, state, out=out) is out
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


def test_a_product_is_one_op_and_its_backward_another():
    for linear in (layer(), layer(compress_statistics=False)):
        x = torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
        with Calls() as calls:
            linear(x).sum().backward()
        assert calls.names == ["linear", "linear_dgrad"]


def test_a_function_that_was_held_before_comes_to_us():
    linear = layer(bias=False)
    state, matrix = linear.weight.quant_state, values_of(linear)
    for shape in ((4, 128), (2, 3, 128), (0, 128)):
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
        with Calls() as calls:
            y = held_matmul(x, linear.weight.t(), state, bias=bias)
            dy = torch.randn_like(y)
            y.backward(dy)
        assert calls.names.count("dequantize") == (x.numel() > 0 and not HAS_GEMM)
        assert ("linear_dgrad" in calls.names) == (x.numel() > 0)
        assert_product_within_bound(matrix_of(y.detach()), matrix_of(x.detach()), matrix.T, "y", bias.detach())
        assert_product_within_bound(matrix_of(x.grad), matrix_of(dy), matrix, "dx")
        torch.testing.assert_close(bias.grad, matrix_of(dy).sum(0))


def test_a_weight_quantized_the_other_way_round():
    weight = torch.randn(96, 64)  # [K, N]
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    x = torch.randn(3, 96, requires_grad=True)
    warns = pytest.warns(DeprecationWarning, match=r"\[K, N\]") if HAS_GEMM else contextlib.nullcontext()
    with warns:
        y = bnb.matmul_4bit(x, packed, state)
    y.sum().backward()
    matrix = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(y, x @ matrix)
    torch.testing.assert_close(x.grad, torch.ones(3, 64) @ matrix.T)


def test_ops_called_directly():
    linear = layer(bias=False, compress_statistics=False)
    state, packed, matrix = linear.weight.quant_state, linear.weight.data, values_of(linear)
    ops = torch.ops.bitsandbytes
    x = torch.randn(2, 128).bfloat16()
    weight = (packed, [64, 128], state.absmax)
    if HAS_GEMM:
        assert_product_within_bound(ops.gemm_4bit(x, *weight, 64, "nf4"), x, matrix.T, "gemm")
    assert_product_within_bound(ops.gemv_4bit(x, *weight, state.code, 64), x, matrix.T, "gemv")
    out = torch.empty(2, 64).bfloat16()
    ops.gemv_4bit.out(x, *weight, state.code, 64, out=out)
    assert_product_within_bound(out, x, matrix.T, "gemv.out")
    decode = (packed, state.absmax, 64, "nf4", [64, 128], torch.float16)
    assert_same_bits(ops.dequantize_4bit(*decode), matrix.half(), "dequantize")
    out = torch.empty(64, 128).half()
    ops.dequantize_4bit.out(*decode, out=out)
    assert_same_bits(out, matrix.half(), "dequantize.out")
    with pytest.raises(ValueError, match=r"out must be torch.float16 \[64, 128\], got torch.float32 \[64, 128\]"):
        ops.dequantize_4bit.out(*decode, out=torch.empty(64, 128))
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got 'int4'"):
        ops.quantize_4bit(torch.randn(64), 64, "int4", torch.uint8)


def test_nested_scales_are_the_nearest():
    scales = torch.rand(3000)
    index, state = functional.quantize_blockwise(scales, blocksize=256)
    blocks = torch.nn.functional.pad(scales, (0, 72)).view(-1, 256)
    scaled = (blocks / blocks.amax(1, keepdim=True)).view(-1)[:3000]
    distance = (scaled[:, None] - state.code).abs()
    assert (distance.gather(1, index.long()[:, None])[:, 0] <= distance.amin(1) + 1e-7).all()
    # Other uses are bitsandbytes' own.
    assert functional.quantize_blockwise(scales.bfloat16(), blocksize=256)[0].shape == (3000,)
    unpatch()
    own = functional.quantize_blockwise(scales, blocksize=64)[0]
    patch()
    assert torch.equal(functional.quantize_blockwise(scales, blocksize=64)[0], own)


def test_what_is_not_finite():
    weight = torch.randn(4, 64)
    weight[2, 5] = torch.inf
    with pytest.raises(ValueError, match=r"A must be finite, got inf at \[2, 5\]"):
        functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    values = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    assert values[2].isnan().all()
    assert values[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("nested", [False, True])
def test_compiled_without_a_break(nested):
    torch._dynamo.reset()
    linear = layer(50, 96, compress_statistics=nested)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 96, dtype=torch.bfloat16, requires_grad=True)
    y, expected = compiled(x), linear(x)
    assert torch.equal(y, expected)
    (found,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(found, wanted)
    decode = torch.compile(functional.dequantize_4bit, fullgraph=True, backend="aot_eager")
    state = linear.weight.quant_state
    assert torch.equal(decode(linear.weight.data, state), functional.dequantize_4bit(linear.weight.data, state))
    torch._dynamo.reset()


def test_bitsandbytes_own_dtype_wins_under_autocast():
    linear = layer(dtype=torch.float32)
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("scale_codebook", ["e4m3", "dynamic8"])
def test_a_layer_of_ours_has_the_same_bits_there(scale_codebook):
    ours = nf4.QuantLinear(96, 50, scale_codebook=scale_codebook)
    theirs = to_bnb(ours)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    assert torch.equal(theirs(x), ours(x))
    values = functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(values, ours.dequantize())
    again = bnb.nn.Linear4bit(96, 50)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again.bfloat16()(x), ours(x))


def test_a_layer_quantized_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        packed, state = functional.quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    x = torch.randn(3, 128, requires_grad=True)
    bnb.matmul_4bit(x, packed.t(), state).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 64) @ functional.dequantize_4bit(packed, state))


def test_embeddings_and_parametrized_parameters():
    ids = torch.tensor([[0, 3], [9, 3]])
    for dim in (64, 96, 33):
        embedding = bnb.nn.EmbeddingNF4(10, dim)
        dense = embedding.weight.data.clone()
        embedding = embedding.to("cpu")
        expected = nf4.dequantize(nf4.quantize(dense, double_quant=False), torch.float32)
        assert torch.equal(embedding(ids), expected[ids])
    module = torch.nn.Module()
    module.experts = torch.nn.Parameter(torch.randn(3, 5, 65))
    dense = module.experts.data
    replace_parameter_4bit(module, "experts", compress_statistics=True)
    qweight = nf4.quantize(dense.view(15, 65), scale_codebook="dynamic8")
    assert torch.equal(module.experts, nf4.dequantize(qweight, torch.float32).view(3, 5, 65))


def repacked(**options):
    """A layer that an eval forward has repacked, without patch(), and its state dict from before."""
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes repacks nothing here")
    unpatch()
    linear = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", **options)
    linear = linear.bfloat16().to("cpu").eval()
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    with torch.no_grad():
        linear(torch.randn(1, 128, dtype=torch.bfloat16))
    assert linear.weight.quant_state.packing_format_for_cpu
    patch()
    return linear, state


def forward(linear):
    linear(torch.randn(1, 128, dtype=torch.bfloat16))


USES = {
    "forward": forward,
    "state_dict": lambda linear: linear.state_dict(),
    "dequantize": lambda linear: functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state),
    "matmul": lambda linear: bnb.matmul_4bit(torch.randn(1, 128), linear.weight, linear.weight.quant_state),
    "convert": from_bnb,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_repacked_weight_is_put_back_where_that_is_exact(storage, use):
    linear, state = repacked(compress_statistics=False, quant_storage=storage)  # bf16 scales, since the weight was bf16
    USES[use](linear)
    after = linear.state_dict()
    assert after.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    check(linear, torch.randn(3, 128).bfloat16())


@pytest.mark.parametrize("use", USES)
def test_a_repacked_weight_is_refused_where_its_scales_are_lost(use):
    linear, _ = repacked(compress_statistics=True)
    with pytest.raises(RuntimeError, match=r"repacked for this CPU before patch\(\), which rounded its nested scales"):
        USES[use](linear)


def test_gpus_are_patched_when_cuda_is_initialised(monkeypatch):
    """What runs then, on a machine without one: the kernels are registered, unless plain PyTorch would run there."""
    from nf4kernels.integrations.bitsandbytes import patching, replacements

    def has_kernels():
        return torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CUDA")

    if torch.cuda.is_available():
        assert has_kernels()
        return
    assert not has_kernels()
    for backend, expected in (("reference", False), ("native", True)):
        monkeypatch.setattr(patching, "decide", lambda device, b=backend: nf4.backends.select.Decision(b, b, ""))
        patching._active._add_cuda()
        assert has_kernels() is expected
        assert ("cuda" in replacements.DEVICES) is expected
    with contextlib.ExitStack() as stack:
        stack.callback(patch)
        unpatch()
        assert not has_kernels()
        assert "cuda" not in replacements.DEVICES


def test_the_raw_product_follows_autocast_as_theirs():
    packed, state = functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    x, found = torch.randn(3, 64), []
    for change in (unpatch, patch):
        change()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(bnb.matmul_4bit(x, packed.t(), state))
    theirs, ours = found
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - theirs).norm() < 0.01 * theirs.norm()
