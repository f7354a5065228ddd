"""bitsandbytes' layers, each on the path it is best at, and ours beside them, all from one dense weight."""

import copy
import logging

import torch
from torch import nn

import nf4kernels as nf4

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about an optional package at every import
import bitsandbytes as bnb  # noqa: E402

from .harness import copies, rotate  # noqa: E402

BNB = "bitsandbytes"  # no double quantization: its faster layer
BNB_DQ = "bitsandbytes double-quantized"
DENSE = "dense bf16"


def bitsandbytes_linear(weight: torch.Tensor, double_quant: bool) -> nn.Module:
    N, K = weight.shape
    layer = bnb.nn.LinearNF4(K, N, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double_quant)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=layer
    )
    return layer.to("cpu")


def layers(weight: torch.Tensor, training: bool) -> dict:
    """side -> a function that returns its layers in turn, so many that no cache holds them all.

    bitsandbytes repacks its weight in place at the first evaluation forward; that is done here, before any timing.
    """
    N, K = weight.shape
    dense = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    dense.weight = nn.Parameter(weight.clone(), requires_grad=False)
    ours = nf4.QuantLinear.from_linear(dense)
    sides = {
        "nf4kernels": ours,
        BNB: bitsandbytes_linear(weight, double_quant=False),
        BNB_DQ: bitsandbytes_linear(weight, double_quant=True),
        DENSE: dense,
    }
    rotating = {}
    for name, layer in sides.items():
        layer.train(training)
        nbytes = weight.nbytes if name == DENSE else ours.qweight.nbytes
        replicas = [copy.deepcopy(layer) for _ in range(copies(nbytes))]
        if not training:
            with torch.no_grad():
                for replica in replicas:
                    replica(torch.randn(1, K, dtype=torch.bfloat16))
        rotating[name] = rotate(replicas)
    return rotating
