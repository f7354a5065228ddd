"""CUDA's tensor-core kernels where they scale levels, for blocks of 16 and 32 and for scales that are neither fp32 nor
double-quantized: every tile, with steps enough to use each stage of its pipeline again."""

import pytest
import torch
from support import cases
from support.cases import Layout
from support.experts import offsets_of, rows_of
from support.numerics import assert_product_within_bound

from nf4kernels import QuantizedWeight

# op, kernel, M of each tile, (N, K): a tile and a part along the width; all stages along the depth, and two more.
TILES = {
    "small-8": ("linear", "small", 5, (40, 3 * 1024 + 64)),
    "small-16": ("linear", "small", 16, (40, 3 * 1024 + 64)),
    "tiled-32": ("linear", "tiled", 19, (136, 6 * 64)),
    "tiled-64": ("linear", "tiled", 40, (136, 6 * 64)),
    "tiled-128": ("linear", "tiled", 70, (136, 5 * 64)),
    "dgrad-16": ("linear_dgrad", "tiled", 9, (6 * 128 + 8, 192)),
    "dgrad-32": ("linear_dgrad", "tiled", 20, (6 * 64 + 8, 192)),
    "dgrad-64": ("linear_dgrad", "tiled", 40, (6 * 64 + 8, 192)),
    "dgrad-128": ("linear_dgrad", "tiled", 70, (6 * 32 + 8, 320)),
}
LAUNCHES = {"small": "linear_small_kernel", "tiled": "_tiled_kernel"}


def weight(N: int, K: int, block_size: int, scales: str) -> QuantizedWeight:
    """Random codes of NF4 under scales from 0.5 to 1.5, so that one from another block shows."""
    generator = torch.Generator().manual_seed(N + K)
    qweight = cases.random_bytes(N, K, Layout(block_size, scale_codebook="e4m3" if scales == "double" else None))
    if scales == "double":
        return qweight
    absmax = torch.rand(qweight.absmax.shape, generator=generator) + 0.5
    if scales != "codes":
        return cases.with_tensors(qweight, absmax=absmax.to(getattr(torch, scales)))
    codes = torch.randint(0, 256, absmax.shape, generator=generator, dtype=torch.uint8)
    return cases.with_tensors(
        qweight, absmax=codes, scale_code=torch.rand(256, generator=generator) + 0.5, scale_codebook="custom"
    )


@pytest.mark.parametrize(
    ("block_size", "scales", "dtype"),
    [(16, "codes", torch.bfloat16), (32, "double", torch.float16), (128, "float16", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile(executor_ops, tile, block_size, scales, dtype):
    op, kernel, M, (N, K) = TILES[tile]
    executor_ops.pretend(90, 1)  # no splits: one block of threads takes all steps
    executor_ops.executor.set("random", "late", shared_limit=99 << 10)
    K = K if block_size <= 64 else K // 128 * 128
    qweight = weight(N, K, block_size, scales)
    is_dgrad = op == "linear_dgrad"
    matrix = cases.dense(qweight) if is_dgrad else cases.dense(qweight).T
    a = cases.activations(M, len(matrix), dtype)
    with executor_ops.running(kernel):
        y = executor_ops.run(op, a, *qweight.op_args(), *(() if is_dgrad else (None,)))
    assert_product_within_bound(y, a, matrix, f"{tile} {block_size} {scales} {dtype}")
    (launch,) = executor_ops.launches()
    assert LAUNCHES[kernel] in launch.kernel
    assert "ScaledLevels" in launch.kernel


def test_splits_keep_the_bias_once(executor_ops):
    """The first part of the depth holds it."""
    qweight, bias = weight(40, 2048, 16, "codes"), torch.full((40,), 100.0, dtype=torch.bfloat16)
    a = cases.activations(12, 2048, torch.bfloat16)
    with executor_ops.running("tiled"):
        y = executor_ops.run("linear", a, *qweight.op_args(), bias)
    assert any(launch.kernel.startswith("reduce_splits") or launch.grid[2] > 1 for launch in executor_ops.launches())
    assert_product_within_bound(y, a, cases.dense(qweight).T, "tiled", bias)


def test_splits_of_experts_keep_each_bias_once(executor_ops):
    """More than 512 steps of an mma: K in two parts, and the partial sums of a row hold its own expert's bias."""
    counts, K = (70, 67), 8192 + 64
    qweights = cases.stacked([weight(24, K, 16, "float32") for _ in counts])
    bias = torch.tensor([[100.0], [-300.0]]).expand(2, 24).bfloat16().contiguous()
    a = cases.activations(sum(counts) + 1, K, torch.bfloat16)
    with executor_ops.running("tiled"):
        y = executor_ops.run("grouped_linear", a, offsets_of(counts), *qweights.op_args(), bias)
    assert any(launch.kernel.startswith("reduce_splits") for launch in executor_ops.launches())
    for expert, rows in rows_of(counts):
        matrix = cases.dense(qweights[expert]).T
        assert_product_within_bound(y[rows], a[rows], matrix, f"expert {expert}", bias[expert])
    assert (y[sum(counts) :] == 0).all()


@pytest.mark.parametrize(("scales", "form"), [("double", "ScaledSums"), ("bfloat16", "ScaledLevels")])
def test_sums_are_scaled_where_64_weights_share_a_scale(executor_ops, scales, form):
    qweight = weight(40, 128, 64, scales)
    a = cases.activations(3, 128, torch.bfloat16)
    y = executor_ops.run("linear", a, *qweight.op_args(), None)
    assert_product_within_bound(y, a, cases.dense(qweight).T, scales)
    (launch,) = executor_ops.launches()
    assert launch.kernel.startswith(f"linear_small_kernel<BFloat16, 1, {form},")


def test_an_expert_of_more_rows_than_a_run_of_mmas(executor_ops):
    """65536 rows are 512 steps for each of 8 warps; the next run is added. An expert without rows is zeros."""
    rows, counts = 65536 + 40, (0, 65536 + 30, 7)
    small, wide = cases.activations(rows, 2, torch.bfloat16), cases.activations(rows, 8, torch.bfloat16, mean=1.0)
    grads = executor_ops.run("grouped_lora_grad", small, wide, offsets_of(counts), 0.5, torch.float32, False)
    assert (grads[0] == 0).all()
    for expert, begin in ((1, 0), (2, counts[1])):
        part = slice(begin, begin + counts[expert])
        expected = 0.5 * small[part].double().T @ wide[part].double()
        error = 2.0**-20 * 0.5 * small[part].double().abs().T @ wide[part].double().abs()
        assert ((grads[expert].double() - expected).abs() <= error).all()
    assert [launch.kernel for launch in executor_ops.launches()] == ["grouped_lora_grad_kernel<BFloat16, 2>"]
