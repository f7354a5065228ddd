"""torch's own 4-bit product on a CPU, `_weight_int4pack_mm_for_cpu`: the kernel below torchao's Int4WeightOnly layers.

Its weights are integers with a scale and a zero for each 64, in the dtype of x: w = (q - 8) * scale + zero.
"""

import torch
from torch import Tensor, nn

GROUP = 64


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q - 8 as fp32[N, K / GROUP, GROUP], scale, zero): 16 levels from each group's smallest weight to its largest."""
    groups = weight.detach().float().view(weight.shape[0], -1, GROUP)
    least, most = groups.amin(-1), groups.amax(-1)
    scale = ((most - least) / 15).clamp(min=torch.finfo(torch.float16).tiny).to(weight.dtype)
    zero = (least + 8 * scale.float()).to(weight.dtype)
    levels = groups.sub(zero.float()[..., None]).div_(scale.float()[..., None]).round_().clamp_(-8, 7)
    return levels, scale, zero


class Int4Linear(nn.Module):
    """y[M,N] = x[M,K] @ W[N,K].T; K a multiple of GROUP, x in the dtype of `weight`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        levels, scale, zero = quantize(weight)
        codes = levels.add_(8).int().view(weight.shape)
        # the layout depends on the instruction set that torch runs on
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scale_and_zero", torch.stack([scale, zero], -1).transpose(0, 1).contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, GROUP, self.scale_and_zero)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias


def decoded(weight: Tensor) -> Tensor:
    """W as Int4Linear(weight) has it, in fp32."""
    levels, scale, zero = quantize(weight)
    return (levels * scale.float()[..., None] + zero.float()[..., None]).view(weight.shape)


def replace_linears(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """`model`, changed in place: Int4Linear for each nn.Linear whose K GROUP divides, but those in `skip`."""
    for name, layer in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(layer, nn.Linear) and leaf not in skip and layer.in_features % GROUP == 0:
            setattr(model.get_submodule(parent), leaf, Int4Linear(layer.weight, layer.bias))
    return model
