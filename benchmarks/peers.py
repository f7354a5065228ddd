"""One dense weight as everybody's layer: ours, bitsandbytes' and PEFT's on their best paths, and nn.Linear."""

import copy
import functools
import logging
from collections.abc import Callable

import torch
from torch import nn

import nf4kernels as nf4

from . import forced, peer_ggml, peer_int4

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about an optional package at every import
import bitsandbytes as bnb  # noqa: E402

from .harness import BNB, BNB_DQ, DTYPES, GGML, INT4, OURS, dense_side, rotate  # noqa: E402
from .limits import cache_bytes  # noqa: E402

if forced.lacks_bf16():  # bitsandbytes asks the processor, which has what is not to be used
    bnb.nn.modules.has_avx512bf16 = lambda: False

RANK, ALPHA = 16, 32


def bitsandbytes_linear(dense: nn.Linear, double_quant: bool) -> nn.Module:
    """bitsandbytes' layer, computing in the dtype of `dense`; its weight is quantized here, by the move to the CPU."""
    N, K = dense.weight.shape
    layer = bnb.nn.LinearNF4(
        K, N, bias=dense.bias is not None, compute_dtype=dense.weight.dtype, compress_statistics=double_quant
    )
    layer.weight = bnb.nn.Params4bit(
        dense.weight.detach().clone(),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=layer,
    )
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    return layer.to("cpu")


def add_peft_lora(model: nn.Module, targets: list[str] | str) -> None:
    """PEFT's adapters on the named layers of `model`, in bf16: in fp32, its default, PEFT computes them in fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    # as transformers marks a model that it loads in 4 bits; without it PEFT takes its layer for nn.Linear
    model.is_loaded_in_4bit = any(isinstance(layer, bnb.nn.Linear4bit) for layer in model.modules())
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


def randomize_second_factor(model: nn.Module) -> None:
    """Random lora_B, which starts as zeros."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def evaluated_peers(weight: torch.Tensor) -> dict[str, nn.Module]:
    """The layers of those that have no backward, as far as they take the shape and are installed."""
    (N, K), found = weight.shape, {}
    if K % peer_int4.GROUP == 0:
        found[INT4] = peer_int4.Int4Linear(weight)
    ggml = None if forced.in_force() else peer_ggml.load()
    if ggml and N % peer_ggml.ROWS == 0 and K % peer_ggml.BLOCK == 0:
        found |= {side: peer_ggml.GgmlLinear.from_weight(ggml, kind, weight) for side, kind in GGML.items()}
    return found


class Layers:
    """The sides' layers of one random weight; what `rotating` returns is made of copies."""

    def __init__(self, N: int, K: int, dtype: str = "bf16") -> None:
        self.shape, self.dtype, self.dense_side = (N, K), DTYPES[dtype], dense_side(dtype)
        dense = nn.Linear(K, N, bias=False, dtype=self.dtype).requires_grad_(False)
        dense.weight.normal_(std=0.02)
        self.sides = {
            OURS: nf4.QuantLinear.from_linear(dense),
            BNB: bitsandbytes_linear(dense, double_quant=False),
            BNB_DQ: bitsandbytes_linear(dense, double_quant=True),
            self.dense_side: dense,
        }
        if forced.lacks_bf16():  # a backward takes seconds there, and this one decodes its scales as well
            del self.sides[BNB_DQ]
        self.qweight = self.sides[OURS].qweight
        self.nbytes = self.sides[OURS].weight.nbytes + self.sides[OURS].absmax.nbytes

    @functools.cached_property
    def evaluated(self) -> dict[str, nn.Module]:
        return evaluated_peers(self.dense_weight)

    @property
    def dense_weight(self) -> torch.Tensor:
        return self.sides[self.dense_side].weight

    def copies(self, cache: str, nbytes: int) -> int:
        """How many weights of `nbytes` no cache holds together; one where it is to stay in the cache."""
        return 1 if cache == "in" else max(2, -(-cache_bytes() // nbytes))

    def replicas(self, caches: tuple[str, ...], training: bool, lora: bool = False) -> dict[str, list[nn.Module]]:
        """side -> copies of its layer: as many as `in_turn` needs for these cache states."""
        replicas = {}
        sides = self.sides if training else self.sides | self.evaluated
        for side, layer in sides.items():
            first = _with_lora(side, layer) if lora else copy.deepcopy(layer)
            first.train(training)
            nbytes = self.dense_weight.nbytes if side == self.dense_side else self.nbytes
            count = max(self.copies(cache, nbytes) for cache in caches)
            replicas[side] = used_copies(first, count, torch.zeros(1, self.shape[1], dtype=self.dtype))
        return replicas


def used_copies(layer: nn.Module, count: int, x: torch.Tensor) -> list[nn.Module]:
    """The layer and copies of it, `count` together, each after a first forward, whose work a model does once.

    In it bitsandbytes repacks a weight for evaluation, and ours compares a copy's bytes with their checksum: 0.1 ms of
    192x576, where a step takes as long, and 0.3 of 4096x4096.
    """
    copies = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
    with torch.no_grad():
        for each in copies:
            each(x)
    return copies


def in_turn(replicas: list, cache: str) -> Callable:
    """A function that returns the replicas in turn, or the first one again and again."""
    return rotate(replicas if cache == "out" else replicas[:1])


def _with_lora(side: str, layer: nn.Module) -> nn.Module:
    """A copy of the layer with an adapter, whose lora_B is not zero."""
    if side == OURS:
        layer = copy.deepcopy(layer)
        layer.add_lora(nf4.LoraConfig(r=RANK, alpha=ALPHA), dtype=torch.bfloat16)
    else:
        holder = nn.ModuleDict({"layer": copy.deepcopy(layer)})
        add_peft_lora(holder, ["layer"])
        layer = holder["layer"]
    randomize_second_factor(layer)
    return layer
