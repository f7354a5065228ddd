"""quantize and quantize_absmax in CUDA, bit for bit the reference, on the host executor and a GPU."""

import ctypes

import pytest
import torch
from executor import build
from support import cases
from support.cases import DEFAULT, DTYPES, LAYOUTS, SHAPES, Layout, dtype_id, shape_id
from support.guarded import guarded, untouched
from support.numerics import assert_same_bits
from support.paths import ROOT
from support.special import FINITE_BLOCKS, scale_ties, special_weight, ties
from test_quantize import LEVELS

from nf4kernels import reference
from nf4kernels.codebook import SCALE_CODEBOOKS


def assert_quantize_equals_reference(cuda_ops, w, code, block_size, what):
    packed, absmax = cuda_ops.ops.quantize(w.to(cuda_ops.device), code.to(cuda_ops.device), block_size)
    expected_packed, expected_absmax = reference.quantize(w, code, block_size)
    assert_same_bits(absmax.cpu(), expected_absmax, f"quantize absmax, {what}")
    assert_same_bits(packed.cpu(), expected_packed, f"quantize packed, {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(cuda_ops, shape, dtype):
    for block_size in (32, 64, 256, 4096):
        w = cases.weight(*shape, dtype)
        assert_quantize_equals_reference(cuda_ops, w, DEFAULT.code, block_size, f"{shape} {dtype} {block_size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(cuda_ops, layout, dtype):
    for shape in ((37, 100), (3, 8191)):
        w = cases.weight(*shape, dtype)
        assert_quantize_equals_reference(cuda_ops, w, layout.code, layout.block_size, f"{shape} {layout} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_schedule(executor_ops, dtype):
    w, a = cases.weight(3, 8191, dtype), torch.rand(5000)
    for setting in executor_ops.settings():
        for layout in (DEFAULT, Layout(4096, "fp4")):
            assert_quantize_equals_reference(executor_ops, w, layout.code, layout.block_size, f"{setting} {layout}")
        for name, table in SCALE_CODEBOOKS.items():
            assert_quantize_absmax_equals_reference(executor_ops, a, table, name == "e4m3", f"{setting} {name}")


def kernels(executor_ops):
    names = {name for launch in executor_ops.launches() for name in KERNELS if name in launch.kernel}
    executor_ops.executor.reset()
    return names


KERNELS = ("quantize_units_kernel", "quantize_blocks_kernel")


def test_whole_tiles_and_the_rest_have_kernels_of_their_own(executor_ops):
    flat = cases.weight(1, 4097, torch.bfloat16)[0]
    for numel, begin, block_size, expected in (
        (4096, 0, 64, {KERNELS[0]}),
        (4096, 0, 4096, {KERNELS[0]}),
        (4097, 0, 64, set(KERNELS)),
        (1023, 0, 64, {KERNELS[1]}),
        (4096, 1, 64, {KERNELS[1]}),
    ):
        w = flat[begin : begin + numel].view(1, -1)
        assert w.data_ptr() % 16 == 2 * begin
        assert_quantize_equals_reference(executor_ops, w, DEFAULT.code, block_size, f"{numel} from {begin}")
        assert kernels(executor_ops) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (2, 1024), (3, 1000), (1, 8192)], ids=shape_id)
def test_reads_nothing_outside_of_the_weight(executor_ops, shape, dtype):
    for at_end in (True, False):
        w, code = guarded(cases.weight(*shape, dtype), at_end), guarded(DEFAULT.code, at_end)
        for block_size in (32, 4096):
            assert_quantize_equals_reference(executor_ops, w, code, block_size, f"{shape} {dtype} {block_size}")


@pytest.mark.parametrize("columns", [64, 96, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_special_blocks(cuda_ops, dtype, columns):
    names = [n for n, block in FINITE_BLOCKS.items() if block.to(dtype).isfinite().all()]
    w = special_weight(columns, names).to(dtype)
    for block_size in (32, 64, 128):
        assert_quantize_equals_reference(cuda_ops, w, DEFAULT.code, block_size, f"{dtype} {columns} {block_size}")


def test_zero_block_is_code_of_zero(cuda_ops):
    for value in (0.0, -0.0):
        for shape in ((2, 64), (16, 64)):
            w, code = torch.full(shape, value, device=cuda_ops.device), DEFAULT.code.to(cuda_ops.device)
            packed, absmax = cuda_ops.ops.quantize(w, code, 64)
            assert (packed == 0x77).all()
            assert (absmax == 0).all()
            assert not torch.signbit(absmax).any()


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_ties_take_the_lower_code(cuda_ops, codebook, block_size):
    code = Layout(codebook=codebook).code
    w = ties(code, block_size).repeat(16, 1)
    assert_quantize_equals_reference(cuda_ops, w, code, block_size, f"{codebook} ties")


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "af4", "custom", *LEVELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_every_16_bit_value_and_any_levels(cuda_ops, codebook, dtype):
    """Every bf16 number within its block's absmax, and as many fp32 ones about the midpoints."""
    code = LEVELS[codebook] if codebook in LEVELS else Layout(codebook=codebook).code
    if dtype == torch.float32:
        values = ties(code, 32)[0].repeat(40) * (1 + torch.arange(-20, 20).repeat_interleave(64) * 2.0**-23)
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.abs() <= 1]
    w = torch.cat([torch.ones(len(values) // 31, 1, dtype=dtype), values[: len(values) // 31 * 31].view(-1, 31)], 1)
    for scale in (1.0, -0.37):  # a reciprocal that is exact, and one that is not
        assert_quantize_equals_reference(cuda_ops, w * scale, code, 32, f"{codebook} {dtype} times {scale}")


def test_midpoint_of_two_negative_zeros(cuda_ops):
    code = Layout(codebook="int4").code.clone()
    code[code == 0] = -0.0
    w = torch.tensor([1.0, 0.0, -0.0, 0.05]).repeat(16, 64)
    assert_quantize_equals_reference(cuda_ops, w, code, 64, "midpoint -0")


@pytest.mark.parametrize(("codebook", "nibble"), [("nf4", 7), ("int4", 7), ("fp4", 0), ("af4", 7)])
def test_odd_tail_nibble_is_the_code_of_zero(cuda_ops, codebook, nibble):
    for shape in ((3, 5), (33, 65), (1, 1)):
        w, code = cuda_ops.move((cases.weight(*shape), Layout(codebook=codebook).code))
        assert cuda_ops.ops.quantize(w, code, 64)[0][-1] & 15 == nibble


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_nonfinite_block_is_nan_and_the_code_of_zero(cuda_ops, codebook, dtype):
    for bad in (torch.nan, torch.inf, -torch.inf):
        for position in ((0, 0), (3, 31), (6, 299)):
            w = cases.weight(7, 300, dtype)
            w[position] = bad
            for block_size in (32, 64, 1024):
                code = Layout(codebook=codebook).code
                assert_quantize_equals_reference(cuda_ops, w, code, block_size, f"{bad} {position} {block_size}")


def assert_quantize_absmax_equals_reference(cuda_ops, absmax, table, is_e4m3, what):
    got = cuda_ops.ops.quantize_absmax(*cuda_ops.move((absmax, table)), is_e4m3)
    expected = reference.quantize_absmax(absmax, table, is_e4m3)
    for field, a, b in zip(("absmax", "scale_absmax", "scale_offset"), got, expected):
        assert_same_bits(a.cpu(), b, f"quantize_absmax {field}, {what}")


@pytest.mark.parametrize("scale_codebook", list(SCALE_CODEBOOKS))
@pytest.mark.parametrize("blocks", [0, 1, 31, 255, 256, 257, 513, 5000, 70001])
def test_quantize_absmax(cuda_ops, scale_codebook, blocks):
    uniform = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks))
    for name, absmax in {
        "uniform": uniform,
        "equal": torch.full((blocks,), 0.37),
        "heavy": uniform**20,
        "tiny": uniform * 1e-38,
        "denormal": uniform * 1e-41,
        "huge": uniform * 3e38,
        "one-large": torch.cat([uniform[1:] * 1e-6, torch.ones(min(blocks, 1))]),
    }.items():
        table = SCALE_CODEBOOKS[scale_codebook]
        what = f"{scale_codebook} {name} {blocks} blocks"
        assert_quantize_absmax_equals_reference(cuda_ops, absmax, table, scale_codebook == "e4m3", what)


@pytest.mark.parametrize(("scale_codebook", "peak"), [("e4m3", 448.0), ("dynamic8", 1.0)])
def test_quantize_absmax_ties(cuda_ops, scale_codebook, peak):
    table = SCALE_CODEBOOKS[scale_codebook]
    absmax = scale_ties(table, peak)
    assert_quantize_absmax_equals_reference(cuda_ops, absmax, table, scale_codebook == "e4m3", "ties")


@pytest.mark.parametrize(
    ("places", "mean"),
    [((10, 270, 280), 0.0), ((10, 290, 280), 1.0), ((0, 1, 2), 0.0), ((0, 2, 1), 1.0)],
)
def test_superblocks_are_summed_in_order(cuda_ops, places, mean):
    """2^100, 1 and -2^100 in three superblocks: 1 is lost unless it comes last."""
    absmax = torch.zeros(512, 256)
    for place, value in zip(places, (2.0**100, 1.0, -(2.0**100))):
        absmax[place, 5] = value
    _, _, offset = cuda_ops.ops.quantize_absmax(*cuda_ops.move((absmax, SCALE_CODEBOOKS["e4m3"])), True)
    assert offset.item() == mean / absmax.numel()
    assert_quantize_absmax_equals_reference(cuda_ops, absmax, SCALE_CODEBOOKS["e4m3"], True, f"{places}")


def test_quantize_absmax_reads_nothing_outside(executor_ops):
    for blocks in (1, 257, 5000):
        for at_end in (True, False):
            for name, table in SCALE_CODEBOOKS.items():
                absmax = guarded(torch.rand(blocks), at_end)
                what = f"{blocks} {name}"
                assert_quantize_absmax_equals_reference(
                    executor_ops, absmax, guarded(table, at_end), name == "e4m3", what
                )


# The launchers with grids of at most two blocks, so that small arrays are more than one turn of the loops over a grid.
SMALL_GRIDS = """
#include "cuda/kernels.h"
using namespace nf4;
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED int small_grid_quantize(const void* weight, int64_t numel, const float* code, uint8_t* packed, float* absmax) {
  return cuda::quantize({weight, Dtype::kBFloat16, numel, code, 6, packed, absmax}, nullptr);
}
EXPORTED int small_grid_quantize_absmax(const float* absmax, int64_t blocks, const float* scale_code, double* sums,
                                        uint8_t* quantized, float* scale_absmax, float* offset) {
  return cuda::quantize_absmax({absmax, blocks, scale_code, true, sums, quantized, scale_absmax, offset}, nullptr);
}
EXPORTED int small_grid_dequantize(const uint8_t* packed, const float* absmax, const float* code, int64_t N, int64_t K,
                                   int64_t columns, void* out) {
  const Weight w{packed, absmax, nullptr, nullptr, nullptr, nullptr, code, N, K, 6};
  return cuda::dequantize({w, 0, N, 0, columns, Dtype::kBFloat16, out, columns}, nullptr);
}
"""


def test_blocks_go_on_to_further_tiles(executor_ops, tmp_path):
    sources = [tmp_path / "small_grids.cpp"]
    sources[0].write_text(SMALL_GRIDS)
    for name in ("quantize", "quantize_absmax", "dequantize"):
        text = (ROOT / f"csrc/cuda/{name}.cu").read_text()
        assert "kMaxGrid = 8192" in text
        sources.append(tmp_path / f"{name}.cu")
        sources[-1].write_text(text.replace("kMaxGrid = 8192", "kMaxGrid = 2").replace('"../', '"'))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    small = ctypes.CDLL(str(build.build(tmp_path.name, sources, includes)))
    int64, code = ctypes.c_int64, DEFAULT.code.clone()

    for begin in (0, 1):  # whole tiles, and element by element
        w = cases.weight(1, 80 * 1024 + 8, torch.bfloat16)[:, begin : begin + 80 * 1024]
        packed, absmax = torch.zeros(1, 40 * 1024, dtype=torch.uint8), torch.zeros(1, 1280)
        source, *rest = pointers(w, code, packed, absmax)
        assert small.small_grid_quantize(source, int64(w.numel()), *rest) == 0
        expected = reference.quantize(w, code, 64)
        assert_same_bits(packed, expected[0], "small grid, packed")
        assert_same_bits(absmax, expected[1], "small grid, absmax")

    scales, sums, offset = torch.rand(50 * 256), torch.zeros(50, dtype=torch.float64), torch.zeros(())
    table = SCALE_CODEBOOKS["e4m3"].clone()
    quantized, scale_absmax = torch.zeros(50 * 256, dtype=torch.uint8), torch.zeros(50)
    source, *rest = pointers(scales, table, sums, quantized, scale_absmax, offset)
    assert small.small_grid_quantize_absmax(source, int64(scales.numel()), *rest) == 0
    expected = reference.quantize_absmax(scales, table, True)
    for got, e in zip((quantized, scale_absmax, offset), expected):
        assert_same_bits(got, e, "small grid, quantize_absmax")

    for N, K, columns in ((40, 1024, 1024), (1200, 64, 56), (6, 20480, 20472), (6, 4096, 4093)):
        qweight = cases.quantized(N, K, Layout(scale_codebook=None))
        out = torch.zeros(N, columns, dtype=torch.bfloat16)
        p, a, c, o = pointers(qweight.packed, qweight.absmax, qweight.code, out)
        assert small.small_grid_dequantize(p, a, c, int64(N), int64(K), int64(columns), o) == 0
        assert_same_bits(out, cases.dense(qweight, torch.bfloat16)[:, :columns], f"small grid, {N} x {columns} of {K}")


# One unit, block or superblock of an array too long to go through, most of which is never touched.
FAR = """
#include "cuda/quantize.cu"
namespace nf4::cuda {
__global__ void far_kernel(QuantizeArgs args, int64_t unit, int64_t block) {
  Levels& levels = *shared_memory<Levels>();
  prepare_levels(args.code, levels);
  sync_block();
  quantize_unit<BFloat16, true>(args, levels, unit);
  quantize_block<BFloat16>(args, levels, block);
}
}
extern "C" __attribute__((visibility("default"))) int far_quantize(
    const void* weight, int64_t numel, const float* code, uint8_t* packed, float* absmax, int64_t unit, int64_t block) {
  using namespace nf4::cuda;
  const QuantizeArgs args{weight, nf4::Dtype::kBFloat16, numel, code, 6, packed, absmax};
  return launch(far_kernel, dim3(1), 32, sizeof(Levels), nullptr, args, unit, block);
}
"""
FAR_ABSMAX = """
#include "cuda/quantize_absmax.cu"
namespace nf4::cuda {
__global__ void far_sums_kernel(QuantizeAbsmaxArgs args, int64_t first) {
  sum_superblocks(args, first, shared_memory<float>());
}
__global__ void far_codes_kernel(QuantizeAbsmaxArgs args, int64_t superblock) {
  quantize_superblock(args, superblock, nullptr);
}
}
extern "C" __attribute__((visibility("default"))) int far_quantize_absmax(
    const float* absmax, int64_t blocks, double* sums, uint8_t* quantized, float* scale_absmax, float* offset,
    int64_t superblock) {
  using namespace nf4::cuda;
  const QuantizeAbsmaxArgs args{absmax, blocks, nullptr, true, sums, quantized, scale_absmax, offset};
  const size_t bytes = kWarps * kPitch * sizeof(float);
  const auto error = launch(far_sums_kernel, dim3(1), kThreads, bytes, nullptr, args, superblock);
  return error ? error : launch(far_codes_kernel, dim3(1), 32, 0, nullptr, args, superblock);
}
"""


def far_function(tmp_path, source):
    path = tmp_path / "far.cpp"
    path.write_text(source)
    return ctypes.CDLL(str(build.build(path.parent.name, [path], [f"-I{ROOT / 'csrc'}"])))


def pointers(*tensors):
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def test_indices_past_2_to_the_32(executor_ops, tmp_path):
    numel = 2**33 + 1000  # a whole unit ends at 2^33; the last block is short
    weight, packed = untouched(numel, torch.bfloat16), untouched(numel // 2, torch.uint8)
    absmax = untouched(-(-numel // 64), torch.float32)
    unit = slice(2**33 - 1024, 2**33)
    block = slice(numel // 64 * 64, numel)
    for part in (unit, block):
        weight[part] = cases.weight(1, part.stop - part.start, torch.bfloat16)[0]
    code = DEFAULT.code.clone()
    far = far_function(tmp_path, FAR)
    w, c, p, a = pointers(weight, code, packed, absmax)
    int64 = ctypes.c_int64
    assert far.far_quantize(w, int64(numel), c, p, a, int64(2**23 - 1), int64(numel // 64)) == 0
    for part in (unit, block):
        expected_packed, expected_absmax = reference.quantize(weight[part].view(1, -1), code, 64)
        assert_same_bits(packed[part.start // 2 : part.stop // 2], expected_packed.view(-1), "far packed")
        assert_same_bits(absmax[part.start // 64 : -(-part.stop // 64)], expected_absmax.view(-1), "far absmax")


def test_superblocks_past_2_to_the_31_blocks(executor_ops, tmp_path):
    blocks = 2**32 + 100
    superblocks = -(-blocks // 256)
    absmax, quantized = untouched(blocks, torch.float32), untouched(blocks, torch.uint8)
    sums, scale_absmax = untouched(superblocks, torch.float64), untouched(superblocks, torch.float32)
    absmax[2**32 :] = torch.rand(100)
    offset = torch.tensor(0.25)
    far = far_function(tmp_path, FAR_ABSMAX)
    a, s, q, m, o = pointers(absmax, sums, quantized, scale_absmax, offset)
    assert far.far_quantize_absmax(a, ctypes.c_int64(blocks), s, q, m, o, ctypes.c_int64(superblocks - 1)) == 0
    last = absmax[2**32 :]
    assert sums[-1] == sum(last.double().tolist())
    centred = last - offset
    assert scale_absmax[-1] == centred.abs().max()
    expected = (centred * (448 / scale_absmax[-1])).to(torch.float8_e4m3fn).view(torch.uint8)
    assert_same_bits(quantized[2**32 :], expected, "far codes")
