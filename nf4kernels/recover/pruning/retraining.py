"""Training that keeps zeros: adapters whose product is masked, dense training whose steps are, merges that are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...model.merge import merge_model
from ...model.walk import inside
from ...nn.lora import LoraConfig, init_adapter
from .masks import Masks, apply_masks, checked_layer


class _MaskedDelta(nn.Module):
    """W -> (W + scaling * B @ A) where the mask is True, and 0 elsewhere, in W's dtype."""

    def __init__(self, layer: nn.Linear, mask: Tensor | None, config: LoraConfig) -> None:
        super().__init__()
        options: Any = {"bias": False, "device": layer.weight.device}
        self.lora_A = nn.Linear(layer.in_features, config.r, **options)
        self.lora_B = nn.Linear(config.r, layer.out_features, **options)
        init_adapter(self.lora_A, self.lora_B, config)
        self.scaling = config.scaling
        self.mask: Tensor | None
        self.register_buffer("mask", None if mask is None else mask.to(layer.weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # what is merged later, without it
            product = self.lora_B.weight @ self.lora_A.weight
        added = weight + (self.scaling * product).to(weight.dtype)
        return added if self.mask is None else added * self.mask


class MaskedLora:
    """Adapters on dense layers, W + scaling * B @ A with the mask over the sum, so that a merge keeps every zero.

    A plain LoRA merge loses them: B @ A is dense. Here what is trained is what is merged, bit for bit. It costs a dense
    matrix a layer while a model trains, and the gradient of one at a time.

    Args:
        model: with dense layers; its other parameters are frozen until `merge` or `remove`.
        masks: layer -> bool `[N, K]`, or None for a layer that has no zeros to keep.
        config: the adapters'; dropout and starts from the weight are not offered.

    Raises:
        ValueError: a name is none of a dense nn.Linear, a mask does not fit, or `config` has what is not offered;
            nothing is changed.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor | None], config: LoraConfig) -> None:
        who = "nf4kernels.recover.MaskedLora"
        if config.dropout or config.init not in ("default", "gaussian"):
            raise ValueError(f"{who}: config must have no dropout and a start at zero, got {config}")
        model = inside(model)
        self._layers: dict[str, Any] = {}
        for name, mask in masks.items():
            layer = checked_layer(model, name, mask, who)
            if type(layer) is not nn.Linear or parametrize.is_parametrized(layer):
                raise ValueError(f"{who}: {name} must be a plain nn.Linear, got {type(layer).__name__}")
            self._layers[name] = layer
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for name, layer in self._layers.items():
            parametrize.register_parametrization(layer, "weight", _MaskedDelta(layer, masks[name], config), unsafe=True)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is to train, in fp32."""
        deltas = [layer.parametrizations.weight[0] for layer in self._layers.values()]
        return [parameter for delta in deltas for parameter in delta.parameters()]

    def merge(self) -> None:
        """Leave in the model plain layers with what was trained, zeros and all."""
        self._leave(True)

    def remove(self) -> None:
        """Leave in the model the weights from before."""
        self._leave(False)

    @torch.no_grad()
    def _leave(self, merged: bool) -> None:
        for layer in self._layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=merged)
        for parameter in self._trained:
            parameter.requires_grad_(True)


@contextmanager
def held(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A `with` in which each step of the optimizer ends with the pruned weights at zero again.

    For training of the dense weights themselves. Weights in 4 bits are frozen and need none.
    """
    hook = optimizer.register_step_post_hook(lambda *_: apply_masks(model, masks))
    try:
        yield
    finally:
        hook.remove()


def merge_pruned(model: nn.Module, masks: Masks, dtype: torch.dtype | None = None) -> list[str]:
    """`merge_model` of layers in 4 bits with adapters, then zeros again where `masks` has them.

    Without the second half a merge leaves almost no zero, for the product of an adapter is dense. With it the merged
    model is not the one that was trained: what adapters had learnt in the pruned places is gone. `MaskedLora` trains
    what it merges; or adapters stay apart, which keeps both.

    Returns:
        The names of the merged layers.

    Raises:
        TypeError, ValueError: as `merge_model` and `apply_masks`.
    """
    for name, mask in masks.items():
        checked_layer(inside(model), name, mask, "nf4kernels.recover.merge_pruned")
    names = merge_model(model, dtype=dtype)
    apply_masks(inside(model), masks)
    return names
