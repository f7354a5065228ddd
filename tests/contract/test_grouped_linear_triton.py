"""grouped_linear and its gradient in Triton: every configuration forced in turn, under the interpreter and on a GPU."""

import contextlib
import importlib
import itertools

import pytest
import torch
from support import cases
from support.cases import DTYPES, Layout, dtype_id
from support.experts import DGRAD, LAYOUTS, LINEAR, activations, assert_right, call, rows_of
from support.guarded import untouched
from support.numerics import assert_product_within_bound, assert_same_bits
from support.triton_backend import LaunchRecorder

from nf4kernels import quantize_experts

OPS = (LINEAR, DGRAD)
# Rows of each expert: none first, in the middle and last; all in one; one expert; full tiles, one row more, one less.
COUNTS = ((0, 3, 0, 17, 8, 0), (0, 40, 0), (9,), (16, 33, 15), (130, 0, 5), (0, 0))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_configuration(triton_ops, op, counts):
    qweights = cases.quantized_experts(len(counts), 72, 128)
    x = activations(op, sum(counts) + 5, qweights, torch.bfloat16, 1.0)
    for _, config in triton_ops.buckets(op.removeprefix("grouped_")):
        with triton_ops.running("fused", config):
            assert_right(call(triton_ops, op, x, counts, qweights), op, x, counts, qweights, str(config))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_every_layout(triton_ops, op, dtype):
    """As chosen; two superblocks an expert, the last one short."""
    counts = (3, 0, 7)
    for layout in (*LAYOUTS, Layout()):
        qweights = cases.quantized_experts(len(counts), *((37, 512) if layout.block_size <= 64 else (70, 256)), layout)
        x = activations(op, 12, qweights, dtype)
        assert_right(call(triton_ops, op, x, counts, qweights), op, x, counts, qweights, str(layout))


@pytest.mark.parametrize("E", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("op", OPS)
def test_many_experts(triton_ops, op, E):
    """Around powers of two; the last has rows and so has every ninth."""
    counts = [1 + e % 4 if e % 9 == 0 or e == E - 1 else 0 for e in range(E)]
    qweights = cases.quantized_experts(E, 24, 64)
    x = activations(op, sum(counts) + 2, qweights, torch.bfloat16)
    assert_right(call(triton_ops, op, x, counts, qweights), op, x, counts, qweights, f"of {E}")


@pytest.mark.parametrize("op", OPS)
def test_the_bits_of_the_product_of_each_expert(triton_ops, op):
    """Where the same configuration runs for both and the contraction has one part."""
    counts = (20, 0, 1, 40)
    plain, rest = getattr(triton_ops.ops, op.removeprefix("grouped_")), (None,) if op == LINEAR else ()
    configs = [config for _, config in triton_ops.buckets(op.removeprefix("grouped_"))]
    for dtype, config in [(torch.bfloat16, c) for c in configs] + [(torch.float16, None), (torch.float32, None)]:
        qweights = cases.quantized_experts(len(counts), 72, 576 if config is None and op == LINEAR else 128)
        x = activations(op, sum(counts), qweights, dtype)
        with triton_ops.running("fused", config):
            y = call(triton_ops, op, x, counts, qweights)
            for expert, rows in rows_of(counts):
                alone = plain(*triton_ops.move((x[rows], *qweights[expert].op_args())), *rest)
                assert_same_bits(y[rows], alone.cpu(), f"{op} {dtype} {config} expert {expert}")


@pytest.mark.parametrize("offsets", [(4, 2, 9), (4, 30, 9), (-3, 5, 5), (2**31 - 1, 3, 2**31 - 1), (0, -1, -(2**31))])
@pytest.mark.parametrize("op", OPS)
def test_offsets_that_fall_or_exceed_the_rows(triton_ops, op, offsets):
    """They count as min(offset, T), or as the one before where that is larger."""
    T = 12
    qweights = cases.quantized_experts(3, 40, 64)
    x = activations(op, T, qweights, torch.bfloat16)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    sound = offsets.clamp(0, T).cummax(0).values
    counts = sound.diff(prepend=sound.new_zeros(1)).tolist()
    y = call(triton_ops, op, x, offsets, qweights)
    assert_same_bits(y, call(triton_ops, op, x, sound, qweights), f"{offsets.tolist()}")
    assert_right(y, op, x, counts, qweights, f"{offsets.tolist()}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_a_row_depends_on_no_other(triton_ops, op, dtype):
    """Neither on NaN in another expert's row, its own expert's or one of no expert, nor on another expert's scales."""
    counts = (5, 0, 9)
    qweights = cases.quantized_experts(3, 40, 128, Layout(scale_codebook=None))
    x = activations(op, 16, qweights, dtype)
    keep = torch.arange(16) % 5 != 4
    clean = call(triton_ops, op, x, counts, qweights)
    x[~keep] = torch.nan
    y = call(triton_ops, op, x, counts, qweights)
    assert_same_bits(y[keep], clean[keep], "other rows")
    assert y[[4, 9]].isnan().all()
    assert not y[14].any()
    x[~keep] = 0
    qweights.absmax[:2] = torch.nan
    y = call(triton_ops, op, x, counts, qweights)
    assert y[:5].isnan().all()
    assert_same_bits(y[5:][keep[5:]], clean[5:][keep[5:]], "rows of the third expert")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_a_long_contraction_has_runs(triton_ops, op, dtype):
    """Of 512 terms in fp32, of 512 steps of 16 in 16 bits, the last one short; x with a mean."""
    long = 1024 + 64 if dtype == torch.float32 else 8192 + 64
    N, K = (40, long) if op == LINEAR else (long, 64)
    qweights = cases.quantized_experts(2, N, K)
    x = activations(op, 5, qweights, dtype, 1.0)
    assert_right(call(triton_ops, op, x, (2, 3), qweights), op, x, (2, 3), qweights, "long")


@pytest.mark.parametrize("op", OPS)
def test_every_element_is_written_by_one_program(interpreter, op):
    """The interpreter runs programs in order, so that a later one hides what an earlier one wrote into its rows."""
    from support.triton_interpreter import only_program

    counts, T = (3, 0, 17, 8), 33
    qweights = cases.quantized_experts(4, 72, 128)
    x = activations(op, T, qweights, torch.bfloat16)
    programs = 2 * ((T + 5 * 15) // 16)  # two tiles of columns; of rows as many as five groups can have
    with interpreter.running("fused", interpreter.buckets(op.removeprefix("grouped_"))[0][1]):
        expected, written = call(interpreter, op, x, counts, qweights), 0
        for program in range(programs):
            with only_program(program):
                y = call(interpreter, op, x, counts, qweights)
            here = ~y.isnan()  # the rest is conftest.py's poison
            assert torch.equal(y[here], expected[here])
            written = written + here.int()
    assert (written == 1).all()


def recorded(interpreter, monkeypatch, op, x, E, qweights):
    """(programs, keyword arguments) of a launch that does not run. A meta tensor has no value for the host to read."""
    kernel, choose = LaunchRecorder(), interpreter.backend.choose
    function = getattr(interpreter.ops, op)
    monkeypatch.setitem(function.__globals__, f"{op}_kernel", kernel)
    monkeypatch.setitem(function.__globals__, "on_device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(choose, "architecture_of", lambda device: choose.INTERPRETED)
    offsets = torch.empty(E, dtype=torch.int32, device="meta")
    function(x.to("meta"), offsets, *qweights.to("meta").op_args())
    (((programs,), options),) = kernel.launches
    return programs, options


@pytest.mark.parametrize("op", OPS)
def test_no_run_of_a_sum_is_longer_than_512_terms_and_the_host_reads_nothing(interpreter, monkeypatch, op):
    """Terms of fp32, or steps of 16 terms of a tensor core (DESIGN section 7)."""
    for length in (8192, 8256, 20032):
        N, K = (8, length) if op == LINEAR else (length, 64)
        qweights = cases.stacked([cases.random_bytes(N, K)] * 2)
        for rows, dtype in itertools.product((1, 16, 64), DTYPES):
            x = torch.zeros(2 * rows, length, dtype=dtype)
            _, options = recorded(interpreter, monkeypatch, op, x, 2, qweights)
            assert options["RUN"] == (512 if dtype == torch.float32 else 0 if length == 8192 else 8192)


@pytest.mark.parametrize("op", OPS)
def test_the_configuration_is_that_of_the_mean_rows(interpreter, monkeypatch, op):
    """And the grid is one of as many tiles of rows as there can be, whatever the offsets."""
    qweights = cases.quantized_experts(6, 64, 64)
    buckets = interpreter.buckets(op.removeprefix("grouped_"))
    for (first, config), (after, _) in zip(buckets, [*buckets[1:], (200, None)]):
        for T in (6 * first, 6 * (after - 1)):
            x = activations(op, T, qweights, torch.bfloat16)
            programs, options = recorded(interpreter, monkeypatch, op, x, 6, qweights)
            assert (options["BLOCK_M"], options["num_warps"]) == (config.BLOCK_M, config.warps)
            assert programs == (T + 7 * (config.BLOCK_M - 1)) // config.BLOCK_M


def test_as_many_tiles_as_there_can_be(interpreter):
    most_tiles = importlib.import_module("nf4kernels.backends.triton.grouped_linear").most_tiles
    for T, E, rows in itertools.product(range(1, 8), range(4), (1, 2, 4)):
        splits = (ends for ends in itertools.product(range(T + 1), repeat=E) if sorted(ends) == list(ends))
        counts = ([b - a for a, b in itertools.pairwise((0, *ends, T))] for ends in splits)
        assert most_tiles(T, E, rows) == max(sum(-(-count // rows) for count in each) for each in counts)


@pytest.mark.parametrize("op", OPS)
def test_x_of_any_strides(triton_ops, op):
    counts = (2, 0, 4)
    qweights = cases.quantized_experts(3, 48, 128)
    x = activations(op, 7, qweights, torch.bfloat16)
    expected = call(triton_ops, op, x, counts, qweights)
    assert_same_bits(call(triton_ops, op, x, counts, qweights), expected, "again")
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype)
    for other in (x.T.contiguous().T, x.repeat(1, 2)[:, : x.shape[1]], buffer[1:].view(x.shape).copy_(x)):
        assert_same_bits(call(triton_ops, op, other, counts, qweights), expected, "strides")


@pytest.mark.parametrize("op", OPS)
def test_empty(triton_ops, op):
    for E, N, K in ((0, 8, 64), (2, 0, 64), (2, 8, 0), (2, 8, 64)):
        qweights = quantize_experts(torch.randn(E, N, K))
        for T in (0, 3):
            for end in {0, T}:
                x = activations(op, T, qweights, torch.bfloat16)
                y = call(triton_ops, op, x, torch.full((E,), end, dtype=torch.int32), qweights)
                assert y.shape == (T, N if op == LINEAR else K)
                assert E * N * K * end > 0 or not y.any()


@pytest.mark.parametrize("op", OPS)
def test_experts_have_no_dequantize_gemm(triton_ops, op):
    qweights = cases.quantized_experts(2, 8, 64)
    x = activations(op, 3, qweights, torch.bfloat16)
    with (
        triton_ops.running("dequantize_gemm"),
        pytest.raises(RuntimeError, match=f"nf4kernels.{op}: .* have no dequantize_gemm"),
    ):
        call(triton_ops, op, x, (1, 2), qweights)


@pytest.mark.parametrize("op", OPS)
def test_indices_past_2_to_the_32(interpreter, op):
    """The first tile of the last of two experts, most of whose weights are never touched."""
    from support.triton_interpreter import only_program

    torch.use_deterministic_algorithms(False)  # its poison would touch all of the output
    N, K = (2**20, 4096) if op == LINEAR else (48, 2**27)
    near = cases.quantized(*((64, K) if op == LINEAR else (N, 64)), Layout(scale_codebook=None))
    packed, absmax = untouched(N * K, torch.uint8), untouched(2 * N * K // 64, torch.float32)
    rows, columns = near.shape
    packed.view(2, N, K // 2)[1, :rows, : columns // 2] = near.packed
    absmax.view(2, N, K // 64)[1, :rows, : columns // 64] = near.absmax
    x = cases.activations(2, K if op == LINEAR else N, torch.bfloat16)
    with only_program(0):
        offsets = torch.tensor([0, 2], dtype=torch.int32)
        y = getattr(interpreter.ops, op)(x, offsets, packed, absmax, None, None, near.code, None, N, K, 64)
    w = cases.dense(near)
    assert_product_within_bound(y[:, :64], x, w.T if op == LINEAR else w, f"{op} of a far expert")
