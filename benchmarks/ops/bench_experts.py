"""A layer of experts, bf16, without gradients: ours beside itself with torch's sorts, and transformers' dense experts.

Rows `experts` are the whole layer, rows `experts' routing` what surrounds its products alone: tokens sorted by expert
and gathered, and their rows combined with the router's weights. A line after the two says which part of the layer that
is, with our ops and with torch's. All experts of a layer together are larger than any cache, but 8 of them.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import nf4kernels as nf4
from nf4kernels.routing import combine_experts, sort_by_expert

from ..checks import assert_close_to_dense
from ..harness import OURS, Plan, Row
from ..shapes import ExpertsShape

TOKENS = (1, 16, 512, 4096)
FEW_TOKENS = (1, 16)  # of a run that measures everything
TORCH = "torch's sorts"
DENSE = "transformers grouped_mm"
EAGER = "transformers eager"
# Qwen3-30B-A3B's, and fewer experts of its size: N and K are of gate_up_proj.
SHAPES = (ExpertsShape(8, 2, 1536, 2048), ExpertsShape(32, 4, 1536, 2048), ExpertsShape(128, 8, 1536, 2048))


def torch_sort(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    in_order, order = index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(experts), right=True, out_int32=True)
    return x[order // index.shape[1]], offsets, order.argsort()


def torch_combine(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    return (rows[place].view(*weights.shape, -1) * weights[..., None]).sum(1).to(rows.dtype)


def by_torch(experts: nf4.QuantExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    rows, offsets, place = torch_sort(x, index, experts.num_experts)
    gate, up = experts.gate_up_proj(rows, offsets).chunk(2, -1)
    return torch_combine(experts.down_proj(silu(gate) * up, offsets), place, weights)


def dense_experts(shape: ExpertsShape) -> MixtralExperts:
    config = MixtralConfig(hidden_size=shape.K, intermediate_size=shape.N // 2, num_local_experts=shape.experts)
    config._experts_implementation = "grouped_mm"
    module = MixtralExperts(config).bfloat16()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module.requires_grad_(False)


def with_implementation(module: MixtralExperts, name: str) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        module.config._experts_implementation = name
        return module(*arguments)

    return run


@torch.no_grad()
def rows(shape: ExpertsShape, plan: Plan) -> Iterator[Row]:
    E, k = shape.experts, shape.top_k
    dense = dense_experts(shape)
    experts = nf4.QuantExperts.from_experts(dense)
    for tokens in plan.rows:
        weights, index = torch.rand(tokens, E).softmax(-1).topk(k)
        given = torch.randn(tokens, shape.K, dtype=torch.bfloat16), index, weights
        layers = {
            OURS: experts, TORCH: partial(by_torch, experts),
            DENSE: with_implementation(dense, "grouped_mm"), EAGER: with_implementation(dense, "eager"),
        }  # fmt: skip
        outputs = {side: layer(*given) for side, layer in layers.items()}
        assert_close_to_dense(outputs, EAGER, f"{E} experts, {tokens} tokens", factor=2)
        whole = {side: partial(layer, *given) for side, layer in layers.items()}
        routing = {OURS: partial(route, *given, E), TORCH: partial(route_by_torch, *given, E)}
        for _, cache in plan.settings():
            layer = plan.measure("experts", (E, shape.N, shape.K), tokens, cache, whole, None)
            own = plan.measure("experts' routing", (E, shape.N, shape.K), tokens, cache, routing, None)
            yield layer
            yield own
            shares = (f"{own.ms[side] / layer.ms[side]:.1%} {side}" for side in (OURS, TORCH))
            print(f"  routing is of the layer: {', '.join(shares)}")


def route(x: Tensor, index: Tensor, weights: Tensor, experts: int) -> Tensor:
    sorted_rows, _, positions = sort_by_expert(x, index, experts)
    return combine_experts(sorted_rows, positions, weights)


def route_by_torch(x: Tensor, index: Tensor, weights: Tensor, experts: int) -> Tensor:
    sorted_rows, _, place = torch_sort(x, index, experts)
    return torch_combine(sorted_rows, place, weights)
