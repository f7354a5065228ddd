"""grouped_linear and its gradient on CUDA: every kernel forced in turn, on the host executor and on a GPU."""

import pytest
import torch
from support import cases
from support.cases import DTYPES, Layout, dtype_id
from support.experts import DGRAD, LAYOUTS, LINEAR, activations, assert_right, call, offsets_of, rows_of
from support.guarded import guarded
from support.numerics import assert_same_bits

from nf4kernels import quantize_experts

FUSED = ((LINEAR, "small"), (LINEAR, "tiled"), (LINEAR, "any"), (DGRAD, "tiled"), (DGRAD, "any"))
KERNELS = (*FUSED, (LINEAR, "dequantize_gemm"), (DGRAD, "dequantize_gemm"))  # dequantize_gemm is for bf16 alone
WITH_DTYPES = [(*kernel, dtype) for kernel in FUSED for dtype in (torch.bfloat16, torch.float16)]
WITH_DTYPES += [(*kernel, torch.bfloat16) for kernel in KERNELS[len(FUSED) :]]
# Rows of each expert: none first, in the middle and last; all in one; one expert; a full tile, one row more, one less.
COUNTS = ((0, 3, 0, 17, 8, 0), (0, 0, 40), (9,), (16, 33, 15), (130, 0, 70), (0, 0))


def assert_ran(cuda_ops, op, kernel):
    """The kernel that was forced is the one that ran; a GPU keeps no list, and an obstacle is an error there too."""
    launches = cuda_ops.launches()
    expected = {"sound_offsets_kernel", "dequantize_experts_kernel", "zero_rows_of_none_kernel"}
    expected = expected if kernel == "dequantize_gemm" else {f"{op}_{kernel}_kernel"}
    assert launches is None or {run.kernel.partition("<")[0] for run in launches} == expected


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("op", "kernel", "dtype"), WITH_DTYPES)
def test_every_kernel(cuda_ops, op, kernel, dtype, counts):
    qweights = cases.quantized_experts(len(counts), 136, 192)
    for unused in (0, 5):
        x = activations(op, sum(counts) + unused, qweights, dtype, 1.0)
        with cuda_ops.running(kernel):
            assert_right(call(cuda_ops, op, x, counts, qweights), op, x, counts, qweights, kernel)
    assert_ran(cuda_ops, op, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "layout"), cases.paired(((37, 256), (96, 512), (65, 256)), LAYOUTS), ids=str)
@pytest.mark.parametrize("op", [LINEAR, DGRAD])
def test_every_layout(cuda_ops, op, shape, layout, dtype):
    """By the kernel that is chosen, fp32 and small blocks too."""
    counts = (3, 0, 20)
    qweights = cases.quantized_experts(len(counts), *shape, layout)
    x = activations(op, 25, qweights, dtype)
    assert_right(call(cuda_ops, op, x, counts, qweights), op, x, counts, qweights, str(layout))


@pytest.mark.parametrize("E", [1, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_many_experts(cuda_ops, op, kernel, E):
    """As many as a warp has lanes, and more; the last has rows and so has every third."""
    counts = [e % 4 if e % 3 == 0 or e == E - 1 else 0 for e in range(E)]
    counts[-1] += 1
    qweights = cases.quantized_experts(E, 24, 64)
    x = activations(op, sum(counts) + 2, qweights, torch.bfloat16)
    with cuda_ops.running(kernel):
        assert_right(call(cuda_ops, op, x, counts, qweights), op, x, counts, qweights, f"{kernel} of {E}")


@pytest.mark.parametrize(
    ("op", "kernel", "counts"),
    [
        (LINEAR, "small", (3, 0, 8, 16)),
        (LINEAR, "tiled", (20, 0, 32, 30)),
        (LINEAR, "tiled", (64, 0, 40)),
        (LINEAR, "tiled", (150, 0, 66, 130)),
        (LINEAR, "any", (70, 1)),
        (DGRAD, "tiled", (5, 0, 16)),
        (DGRAD, "tiled", (64, 0, 40)),
        (DGRAD, "tiled", (150, 0, 66, 130)),
        (DGRAD, "any", (70, 1)),
    ],
)
def test_the_bits_of_the_product_of_each_expert(cuda_ops, op, kernel, counts):
    """Where the same tile runs for both, and neither splits the contraction."""
    if cuda_ops.executor is not None:
        cuda_ops.pretend(90, 1)
    qweights = cases.quantized_experts(len(counts), 136, 192)
    x = activations(op, sum(counts), qweights, torch.bfloat16)
    with cuda_ops.running(kernel):
        y = call(cuda_ops, op, x, counts, qweights)
        for expert, rows in rows_of(counts):
            plain = getattr(cuda_ops.ops, op.removeprefix("grouped_"))
            rest = (None,) if op == LINEAR else ()
            alone = plain(*cuda_ops.move((x[rows], *qweights[expert].op_args())), *rest)
            assert_same_bits(y[rows], alone.cpu(), f"{op} {kernel} expert {expert}")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_any_rows(cuda_ops, op, kernel, seed):
    """Drawn: many experts without rows, a few with most of them."""
    generator = torch.Generator().manual_seed(seed)
    counts = (torch.rand(10, generator=generator).pow(6) * 60).int().tolist()
    qweights = cases.quantized_experts(10, 40, 128)
    x = activations(op, sum(counts) + seed % 3, qweights, torch.bfloat16)
    with cuda_ops.running(kernel):
        assert_right(call(cuda_ops, op, x, counts, qweights), op, x, counts, qweights, f"{kernel} {counts}")


@pytest.mark.parametrize("offsets", [(4, 2, 9), (4, 30, 9), (-3, 5, 5), (2**31 - 1, 3, 2**31 - 1), (0, -1, -(2**31))])
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_offsets_that_fall_or_exceed_the_rows(cuda_ops, op, kernel, offsets):
    """They count as min(offset, T), or as the one before where that is larger."""
    T = 12
    qweights = cases.quantized_experts(3, 40, 64)
    x = activations(op, T, qweights, torch.bfloat16)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    sound = offsets.clamp(0, T).cummax(0).values
    counts = sound.diff(prepend=sound.new_zeros(1)).tolist()
    with cuda_ops.running(kernel):
        y = call(cuda_ops, op, x, offsets, qweights)
        assert_same_bits(y, call(cuda_ops, op, x, sound, qweights), f"{kernel} {offsets.tolist()}")
    assert_right(y, op, x, counts, qweights, kernel)


@pytest.mark.parametrize(("op", "kernel", "dtype"), WITH_DTYPES)
def test_a_row_depends_on_no_other(cuda_ops, op, kernel, dtype):
    """Neither on NaN in another expert's row, its own expert's or one of no expert, nor on another expert's scales."""
    counts = (5, 0, 9)
    qweights = cases.quantized_experts(3, 40, 128, Layout(scale_codebook=None))
    x = activations(op, 16, qweights, dtype)
    keep = torch.arange(16) % 5 != 4
    with cuda_ops.running(kernel):
        clean = call(cuda_ops, op, x, counts, qweights)
        x[~keep] = torch.nan
        y = call(cuda_ops, op, x, counts, qweights)
        assert_same_bits(y[keep], clean[keep], "other rows")
        assert y[[4, 9]].isnan().all()
        assert not y[14].any()
        x[~keep] = 0
        qweights.absmax[:2] = torch.nan
        y = call(cuda_ops, op, x, counts, qweights)
    assert y[:5].isnan().all()
    assert_same_bits(y[5:][keep[5:]], clean[5:][keep[5:]], "rows of the third expert")


@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_bits_do_not_depend_on_the_order_of_threads(cuda_ops, op, kernel):
    counts = (3, 0, 40)
    qweights = cases.quantized_experts(3, 104, 320)
    x = activations(op, 44, qweights, torch.bfloat16)
    with cuda_ops.running(kernel):
        expected = call(cuda_ops, op, x, counts, qweights)
        for setting in cuda_ops.settings():
            assert_same_bits(call(cuda_ops, op, x, counts, qweights), expected, f"{kernel} {setting}")


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_nothing_outside_of_a_tensor_is_read(executor_ops, op, kernel, at_end):
    """Inputs end (or begin) at a page that may not be touched."""
    for counts in ((1, 0, 16), (0, 3), (70,)):
        qweights = cases.quantized_experts(len(counts), 40, 128)
        x = activations(op, sum(counts) + 1, qweights, torch.bfloat16)
        tensors = x, offsets_of(counts), *qweights.op_args()
        # The ends of these tensors are aligned to 16 bytes, as the tensor cores' kernels want x and packed.
        fenced = [guarded(a, at_end) if isinstance(a, torch.Tensor) else a for a in tensors]
        with executor_ops.running(kernel):
            call = getattr(executor_ops.ops, op)
            assert_same_bits(call(*fenced), call(*tensors), f"{op} {kernel} {counts}")


def test_a_long_contraction_is_split(executor_ops):
    """A sum over more than 512 products of mma is not: dgrad's N in two parts, and a few rows of them at a time."""
    N, counts = 32776, (14, 0, 9, 12)
    qweights = cases.quantized_experts(len(counts), N, 128)
    dy = activations(DGRAD, sum(counts) + 3, qweights, torch.bfloat16)
    with executor_ops.running("tiled"):
        dx = call(executor_ops, DGRAD, dy, counts, qweights)
    assert_right(dx, DGRAD, dy, counts, qweights, "split")
    products = [run for run in executor_ops.launches() if "tiled" in run.kernel]
    assert {run.grid[1] for run in products} == {2}
    assert sum(run.count for run in products) == 3, "16 rows of partial sums have room"


@pytest.mark.parametrize("codebook", ["nf4", "custom"])
@pytest.mark.parametrize("kernel", ["small", "tiled"])
def test_long_contraction_and_x_with_a_mean(cuda_ops, kernel, codebook):
    counts = (9, 7)
    qweights = cases.quantized_experts(2, 64, 4096, Layout(64, codebook))
    x = activations(LINEAR, 16, qweights, torch.bfloat16, 1.0)
    with cuda_ops.running(kernel):
        assert_right(call(cuda_ops, LINEAR, x, counts, qweights), LINEAR, x, counts, qweights, kernel)


def test_the_choice_and_what_it_is_told(executor_ops):
    """The kernel by the mean of the experts' rows; x of any strides is taken, and what no tensor core takes."""
    buffer = cases.activations(1, 9 * 128 + 8, torch.bfloat16)[0]
    for op, x, E, kernel in (
        (LINEAR, cases.activations(96, 128, torch.bfloat16), 6, "small"),
        (LINEAR, cases.activations(97, 128, torch.bfloat16), 6, "tiled"),
        (LINEAR, cases.activations(128, 9, torch.bfloat16).T, 2, "small"),
        (LINEAR, buffer[1 : 1 + 9 * 128].view(9, 128), 2, "any"),
        (LINEAR, cases.activations(9, 128, torch.float32), 2, "any"),
        (DGRAD, cases.activations(5, 48, torch.bfloat16), 2, "tiled"),
        (DGRAD, cases.activations(5, 47, torch.bfloat16), 2, "any"),
        (DGRAD, cases.activations(5, 48, torch.float32), 2, "any"),
        (LINEAR, cases.activations(832, 128, torch.bfloat16), 1, "tiled"),
        (LINEAR, cases.activations(833, 128, torch.bfloat16), 1, "dequantize_gemm"),
        (DGRAD, cases.activations(416, 48, torch.bfloat16), 1, "tiled"),
        (DGRAD, cases.activations(417, 48, torch.bfloat16), 1, "dequantize_gemm"),
    ):
        executor_ops.executor.reset()
        N, counts = 48 if op == LINEAR else x.shape[1], [x.shape[0] // E] * E
        qweights = cases.quantized_experts(E, N, 128)
        assert_right(call(executor_ops, op, x, counts, qweights), op, x.contiguous(), counts, qweights, kernel)
        assert_ran(executor_ops, op, kernel)


def test_empty(cuda_ops):
    for op in (LINEAR, DGRAD):
        for E, N, K in ((0, 8, 64), (2, 0, 64), (2, 8, 0), (2, 8, 64)):
            qweights = quantize_experts(torch.randn(E, N, K))
            for T in (0, 3, 900):
                x = activations(op, T, qweights, torch.bfloat16)
                y = call(cuda_ops, op, x, torch.zeros(E, dtype=torch.int32), qweights)
                assert torch.equal(y, torch.zeros(T, N if op == LINEAR else K, dtype=torch.bfloat16))
                if E and T and 0 in (N, K):
                    y = call(cuda_ops, op, x, torch.full((E,), T, dtype=torch.int32), qweights)
                    assert not y.any()


@pytest.mark.parametrize(
    ("op", "kernel", "N", "dtype", "reason"),
    [
        (LINEAR, "dequantize_gemm", 40, torch.float16, "dequantize_gemm of experts needs bf16"),
        (DGRAD, "dequantize_gemm", 37, torch.bfloat16, "N a multiple of 8"),
        (LINEAR, "tiled", 40, torch.float32, "true fp32"),
        (DGRAD, "small", 40, torch.bfloat16, "the small kernel is linear's"),
        (DGRAD, "tiled", 37, torch.bfloat16, "N a multiple of 8"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error(cuda_ops, op, kernel, N, dtype, reason):
    qweights = cases.quantized_experts(2, N, 64)
    x = activations(op, 3, qweights, dtype)
    with cuda_ops.running(kernel), pytest.raises(RuntimeError, match=f"forced kernel {kernel} cannot run.*{reason}"):
        call(cuda_ops, op, x, (1, 2), qweights)
