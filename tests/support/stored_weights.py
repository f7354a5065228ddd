"""A weight to store, and whether what was read back is the same."""

import torch

import nf4kernels as nf4


def quantized(weight, codebook="nf4", scale="e4m3", block_size=64):
    options = {"double_quant": False} if scale is None else {"scale_codebook": scale}
    return nf4.quantize(weight, codebook, block_size, **options)


def assert_same_weight(got, expected):
    for name in ("packed", "absmax", "scale_absmax", "scale_offset", "code", "scale_code"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name  # NaN in e8m0
    for name in ("shape", "dtype", "block_size", "codebook", "scale_codebook"):
        assert getattr(got, name) == getattr(expected, name), name
