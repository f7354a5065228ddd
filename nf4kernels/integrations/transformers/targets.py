"""Which tensors of a model become 4-bit weights while it is loaded, and how such a weight takes its place."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import quantize, quantize_experts
from ...model.heads import SKIP
from ...model.plan import check_skip, is_conv1d, plan_layers, replace_module, unmatched
from ...model.report import SkippedLayer
from ...model.walk import get_submodule, named_modules
from ...nn.experts_layout import weight_names
from ...nn.quant_experts import QuantExperts
from ...nn.quant_linear import COLUMN_ORDER, QuantLinear
from ...nn.quant_module import SCALE_TENSORS
from ...quantized_weight import WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight, stack_experts
from .config import Nf4Config


@dataclass(frozen=True)
class Target:
    """A dense tensor of the model, on the meta device, in whose place a 4-bit weight comes.

    Attributes:
        names: of its module, which may be registered under several.
        leaf: its name in the module: "weight", or one of the experts' two.
        shape: as the module has it.
        dtype: what it would be in a dense model.
        transposed: whether that is [in, out], as in GPT-2's Conv1D and gpt-oss's experts.
    """

    names: tuple[str, ...]
    leaf: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def keys(self) -> list[str]:
        """Its names in the model's state."""
        return [f"{name}.{self.leaf}" for name in self.names]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[out, in], or [experts, out, in]."""
        *experts, first, second = self.shape
        return (*experts, second, first) if self.transposed else self.shape


def targets_of(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """One for each weight of the module that is registered under all these names."""
    names = tuple(names)
    module = get_submodule(model, names[0])
    is_linear = isinstance(module, nn.Linear) or is_conv1d(module)
    leaves = ("weight",) if is_linear else weight_names(module)
    transposed = is_conv1d(module) or (not is_linear and bool(getattr(module, "is_transposed", False)))
    weights = [(leaf, module._parameters[leaf]) for leaf in leaves]
    return [
        Target(names, leaf, tuple(weight.shape), weight.dtype, transposed)
        for leaf, weight in weights
        if weight is not None
    ]


def plan(model: Any, config: Nf4Config) -> tuple[dict[str, Target], list[SkippedLayer]]:
    """(name of a tensor -> its target, what stays dense) of a dense model, by the rules of `quantize_model`."""
    check_skip(model, config.skip, "nf4kernels.Nf4Config")
    dense = [name for name, options in config.plan.items() if options is None]
    layers, skipped = plan_layers(model, (*SKIP, *config.skip, *dense), config.block_size, conv1d=True)
    known = {name for names in layers for name in names} | {name for name in dense if not unmatched(model, [name])}
    for name in (name for name in config.plan if name not in known):
        raise ValueError(f"nf4kernels.Nf4Config: plan must name layers that can be quantized, got {name!r}")
    tied = model.all_tied_weights_keys  # not yet the same tensor: that comes after loading
    tied = {**tied, **{source: name for name, source in tied.items()}}
    targets: dict[str, Target] = {}
    for names in layers:
        of_layer = targets_of(model, names)
        others = [tied[key] for target in of_layer for key in target.keys if key in tied]
        if others:
            skipped += [_skipped(target, f"tied to {others[0]}") for target in of_layer]
        else:
            targets.update({key: target for target in of_layer for key in target.keys})
    return targets, skipped


def _skipped(target: Target, reason: str) -> SkippedLayer:
    name = target.names[0] if target.leaf == "weight" else target.keys[0]
    return SkippedLayer(name, target.shape, math.prod(target.shape) * target.dtype.itemsize, reason)


def dense_experts(model: nn.Module, skipped: Iterable[SkippedLayer]) -> list[SkippedLayer]:
    """Those of what stays dense that are experts which nobody asked to skip: most of such a model's bytes."""
    modules = dict(named_modules(model))
    found = []
    for entry in skipped:
        owner = modules.get(entry.name) or modules.get(entry.name.rpartition(".")[0])
        is_torchs = type(owner).__module__.startswith("torch.")  # a convolution has 3-D weights, too
        if len(entry.shape) == 3 and not is_torchs and not entry.reason.startswith("skip="):
            found.append(entry)
    return found


def quantized(target: Target, tensor: Tensor, config: Nf4Config) -> QuantizedWeight | QuantizedExperts:
    """The tensor that a checkpoint has for the target, in 4 bits; TypeError or ValueError as `nf4kernels.quantize`."""
    if tuple(tensor.shape) != target.shape:
        raise ValueError(f"the checkpoint must have it in shape {list(target.shape)}, got {list(tensor.shape)}")
    weight = tensor.mT if target.transposed else tensor
    return (quantize if tensor.dim() == 2 else quantize_experts)(weight, **config.options_of(target.names))


def quantized_experts(target: Target, experts: Iterable[Tensor], config: Nf4Config) -> QuantizedExperts:
    """The same of one dense expert after the other, each with a dimension of 1 in front."""
    E, *shape = target.shape
    options = config.options_of(target.names)
    parts = []
    for index, dense in enumerate(experts):
        if dense.shape != (1, *shape) or index >= E:
            raise ValueError(f"the checkpoint must have {E} experts of shape {shape}, got {list(dense.shape[1:])}")
        try:
            parts.append(quantize_experts(dense.mT if target.transposed else dense, **options)[0])
        except ValueError as error:
            raise ValueError(f"expert {index}: {error}") from None
    if len(parts) != E:
        raise ValueError(f"the checkpoint must have {E} experts, got {len(parts)}")
    return stack_experts(parts)


def place_weight(
    model: nn.Module, target: Target, qweight: QuantizedWeight, compute_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Make a QuantLinear with the scales of `qweight` of the target's layer; its parameters in bytes by their names.

    These are left out, so that whoever loads the model puts them where they belong: on a device, or on disk.
    """
    dense: Any = get_submodule(model, target.names[0])
    layer = QuantLinear.from_quantized(qweight.to("meta"), dense.bias, compute_dtype).train(dense.training)
    for leaf in (*SCALE_TENSORS, COLUMN_ORDER):
        if leaf not in layer._parameters:
            setattr(layer, leaf, getattr(qweight, leaf))
    layer.record_bytes()
    layer.source_dtype = torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8, device=qweight.device)
    layer.cast_to = None if target.dtype == qweight.dtype else target.dtype
    needs_no_init(layer)
    replace_module(model, target.names, dense, layer)
    placed = {"weight": qweight.packed, "absmax": qweight.absmax}
    return {f"{target.names[0]}.{leaf}": bytes_ for leaf, bytes_ in placed.items() if leaf in layer._parameters}


def place_experts(
    model: nn.Module, target: Target, qweights: Mapping[str, QuantizedExperts], compute_dtype: torch.dtype | None
) -> QuantExperts:
    """Make QuantExperts of the target's module, of both its weights."""
    dense = get_submodule(model, target.names[0])
    gate_up, down = (qweights[leaf] for leaf in weight_names(dense))
    experts = QuantExperts.from_quantized(dense, gate_up, down, compute_dtype)
    needs_no_init(experts)
    replace_module(model, target.names, dense, experts)
    return experts


def needs_no_init(module: nn.Module) -> None:
    """transformers draws what a checkpoint lacks; this mark says that nothing is lacking."""
    for part in module.modules():
        vars(part)["_is_hf_initialized"] = True
