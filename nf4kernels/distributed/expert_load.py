"""ExpertLoad: how evenly a router deals tokens to experts, counted while a model trains."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn.experts_layout import layout_problem
from ..nn.quant_experts import QuantExperts

BUSIEST, IDLE = "expert_load_max", "experts_idle"


class ExpertLoad:
    """Counts the tokens of each expert of every QuantExperts, or of transformers' fused experts, in training mode.

    By a hook before each forward: nothing waits for a device. A forward that checkpointing repeats counts twice, for
    each expert alike. `remove()` takes the hooks off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: list[Tensor] = []  # of each layer, [E + 1]: the last is no expert
        self.hooks = []
        for module in model.modules():
            if isinstance(module, QuantExperts) or layout_problem(module) is None:
                experts: Any = module
                device = next(iter(module.parameters())).device
                device = torch.device("cpu") if device.type == "meta" else device
                self.counts.append(torch.zeros(experts.num_experts + 1, dtype=torch.int64, device=device))
                hook = partial(self._count, len(self.counts) - 1)
                self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _count(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        index: Any = args[1] if len(args) > 1 else kwargs.get("top_k_index", kwargs.get("router_indices"))
        index = index.to_local() if isinstance(index, DTensor) else index
        index = index.detach().flatten().long()
        counts = self.counts[layer] = self.counts[layer].to(index.device)
        counts.scatter_add_(0, index.clamp(max=len(counts) - 1), torch.ones_like(index))

    def take(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """What was counted since the last call, of all ranks, which call it together; empty where nothing was.

        Returns:
            "expert_load_max": the tokens of the busiest expert over the mean of its layer, in the worst layer; 1 is
            even, E is one expert for all. "experts_idle": the share of experts, of all layers, that had no token.
        """
        if not self.counts:
            return {}
        counted = torch.cat([each.to(self.counts[0].device) for each in self.counts])
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(counted, group=group)
        layers = [each[:-1].double() for each in counted.cpu().split([len(each) for each in self.counts])]
        for each in self.counts:
            each.zero_()
        layers = [each for each in layers if each.sum() > 0]
        if not layers:
            return {}
        idle = sum(int((each == 0).sum()) for each in layers) / sum(len(each) for each in layers)
        return {BUSIEST: max((each.max() / each.mean()).item() for each in layers), IDLE: idle}

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
