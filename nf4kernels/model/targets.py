"""What quantize_model is to make of each layer, and who makes it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..nn.lora import LoraConfig
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from .walk import get_submodule

PlannedOptions = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A layer to quantize: all its names, the adapter and `quantize`'s options with compute_dtype."""

    names: list[str]
    lora: LoraConfig | None
    options: PlannedOptions

    @property
    def name(self) -> str:
        return self.names[0]

    def dense(self, model: nn.Module) -> Any:
        return get_submodule(model, self.name)

    def rounded(self, dense: nn.Module) -> QuantLinear | QuantExperts:
        """The layer in 4 bits, each weight rounded to its nearest level."""
        if isinstance(dense, nn.Linear):
            return QuantLinear.from_linear(dense, self.lora, **self.options)
        return QuantExperts.from_experts(dense, lora=self.lora, **self.options)


class Rounding(Protocol):
    """Another way than to the nearest level; those of `nf4kernels.recover` are such."""

    def layers(
        self, model: nn.Module, targets: Sequence[Target], progress: bool
    ) -> Iterator[tuple[Target, QuantLinear | QuantExperts]]:
        """Each target once, in their order, with the layer to put in its place.

        That happens before the next one is asked for, so that a method may run the model as far as it is rounded.
        """
        ...


def merged(usual: PlannedOptions, own: PlannedOptions) -> dict[str, Any]:
    """A layer's options over those of all; a codebook of its own brings the block size that is its own, unless said."""
    return {**usual, **({"block_size": None} if "codebook" in own else {}), **own}


def planned(
    targets: list[list[str]],
    lora: LoraConfig | None,
    options: PlannedOptions,
    plan: Mapping[str, PlannedOptions | None],
    who: str,
) -> tuple[list[Target], list[list[str]]]:
    """(the layers to quantize, the layers that the plan leaves dense).

    Raises:
        ValueError: the plan names what is no layer to quantize.
    """
    known = {name for names in targets for name in names}
    for name in plan:
        if name not in known:
            raise ValueError(f"{who}: plan must name layers that can be quantized, got {name!r}")
    made, dense = [], []
    for names in targets:
        own = [plan[name] for name in names if name in plan]
        if any(each is None for each in own):
            dense.append(names)
            continue
        chosen: dict[str, Any] = {"lora": lora, **options}
        for each in own:
            chosen = merged(chosen, each or {})
        made.append(Target(names, chosen.pop("lora"), chosen))
    return made, dense
