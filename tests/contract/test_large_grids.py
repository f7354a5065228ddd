"""The CUDA launchers of quantize and dequantize where a grid is too small for one turn, and past 2^32 elements."""

import ctypes

import torch
from executor import build
from support import cases
from support.cases import DEFAULT, Layout
from support.guarded import untouched
from support.numerics import assert_same_bits
from support.paths import ROOT

from nf4kernels import reference
from nf4kernels.codebook import SCALE_CODEBOOKS


def pointers(*tensors):
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def test_quantize_and_dequantize_go_on_to_further_tiles(executor_ops):
    """With grids of at most two blocks small arrays are more than one turn of the loops over a grid."""
    executor_ops.executor.limit_grid(2)
    for begin in (0, 1):  # whole tiles, and element by element
        w = cases.weight(1, 80 * 1024 + 8, torch.bfloat16)[:, begin : begin + 80 * 1024]
        for got, expected in zip(
            executor_ops.ops.quantize(w, DEFAULT.code, 64), reference.quantize(w, DEFAULT.code, 64)
        ):
            assert_same_bits(got, expected, "small grid, quantize")

    scales, table = torch.rand(50 * 256), SCALE_CODEBOOKS["e4m3"].clone()
    found = executor_ops.ops.quantize_absmax(scales, table, True)
    for got, expected in zip(found, reference.quantize_absmax(scales, table, True)):
        assert_same_bits(got, expected, "small grid, quantize_absmax")

    for N, K, columns in ((40, 1024, 1024), (1200, 64, 56), (6, 20480, 20472), (6, 4096, 4093)):
        qweight = cases.quantized(N, K, Layout(scale_codebook=None))
        out = executor_ops.ops.dequantize(*qweight.op_args(), 0, N, 0, columns, torch.bfloat16)
        assert_same_bits(out, cases.dense(qweight, torch.bfloat16)[:, :columns], f"small grid, {N} x {columns} of {K}")
    most = max(launch.grid[0] * launch.grid[1] for launch in executor_ops.launches())
    assert most > 4, "the grids that were asked for are larger"


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
    path.write_text(source, encoding="utf-8")
    return ctypes.CDLL(str(build.build(path.parent.name, [path], [f"-I{ROOT / 'csrc'}"])))


def test_quantize_past_2_to_the_32(executor_ops, tmp_path):
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


def test_quantize_absmax_past_2_to_the_31_blocks(executor_ops, tmp_path):
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
    expected = (centred * (torch.tensor(448.0) / scale_absmax[-1])).to(torch.float8_e4m3fn).view(torch.uint8)
    assert_same_bits(quantized[2**32 :], expected, "far codes")
