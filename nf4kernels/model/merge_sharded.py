"""merge_model of a sharded model: each rank merges its own rows of the base; adapters alone are gathered."""

import copy
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import dequantize
from ..modes import without_autocast
from ..nn.casts import cast, check_cast
from ..nn.dtensors import from_local, is_dtensor, local_of, whole
from ..nn.experts_layout import bias_name
from ..nn.grouped_quant_linear import ExpertsFactor, GroupedQuantLinear
from ..nn.lora import over_original_weight
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import SCALES
from ..quantized_weight import SUPERBLOCK, QuantizedExperts, QuantizedWeight, shared_codebooks
from .sharded import Ranks, by_rows, fsdp_modules, gathered_qweight, own_part, placed_like
from .walk import named_modules


def merged_in_parts(layer: Any, dtype: torch.dtype | None, base: Sequence[Tensor] | None, ranks: Ranks) -> nn.Module:
    """What `to_linear` or `to_experts` makes, its parameters cut as the layer's are; every rank must call."""
    if isinstance(layer, QuantExperts):
        return _merged_experts(layer, dtype, base, ranks)
    return _merged_linear(layer, dtype, None if base is None else base[0], ranks)


def _merged_linear(layer: QuantLinear, dtype: torch.dtype | None, base: Tensor | None, ranks: Ranks) -> nn.Linear:
    N, K = layer.weight_shape
    packed: Any = layer.weight
    is_by_rows = by_rows(packed) and K % layer.block_size == 0 and layer.column_order is None
    own = own_part(packed)[0] if is_by_rows else slice(0, N)
    if dtype is None:
        dtype = layer.dense_dtype if layer.bias is None else layer.bias.dtype
    if base is not None:
        qweight, weight = None, whole(base)
    else:
        qweight, weight = None if is_by_rows else gathered_qweight(layer), None
    delta = _delta(layer, base is not None)
    who = f"{layer.WHO}.to_linear"
    with ranks.together():
        if weight is not None:
            weight = weight[own].to(local_of(packed).device, torch.float32, copy=True)
        else:
            weight = dequantize(_own_rows(layer, own) if qweight is None else qweight, torch.float32)
        if delta is not None:
            weight += delta[own]
        merged = cast(weight, dtype, f"{who}: weight")
        if layer.bias is not None:
            check_cast(local_of(layer.bias), dtype, f"{who}: bias")
    dense = nn.Linear(K, N, layer.bias is not None, device="meta")
    is_cut = is_by_rows and is_dtensor(packed)
    dense.weight = nn.Parameter(from_local(merged, packed, (N, K)) if is_cut else placed_like(merged, packed))
    if layer.bias is not None:
        bias = local_of(layer.bias).to(dtype, copy=True)
        dense.bias = nn.Parameter(from_local(bias, layer.bias) if is_dtensor(layer.bias) else bias)
    return dense.train(layer.training)


def _delta(layer: QuantLinear, over_original: bool) -> Tensor | None:
    """The whole product, of which a rank takes its rows: a product of those rows alone may sum in another order."""
    if layer.lora is None:
        return None
    config, A, B = layer.lora, whole(layer.lora_A.weight), whole(layer.lora_B.weight)
    if over_original:
        config, A, B = over_original_weight(config, *(_gathered_factor(f) for f in (layer.lora_A, layer.lora_B)))
    with without_autocast(A.device):
        return config.scaling * (B.float() @ A.float())


def _gathered_factor(factor: nn.Module) -> Any:
    start: Any = factor._buffers.get("start")
    start = None if start is None else whole(start)
    return SimpleNamespace(weight=whole(factor.weight), get_buffer=lambda _: start)  # type: ignore[arg-type]


def _own_rows(layer: QuantLinear, own: slice) -> QuantizedWeight:
    """A weight of this rank's rows alone, whose scales are the numbers that the whole weight decodes with."""
    absmax = local_of(layer.absmax) if is_dtensor(layer.absmax) else layer.absmax[own]
    scale = absmax if layer.scale_code is None else layer.scale_code[absmax.long()]
    if layer.scale_absmax is not None and layer.scale_offset is not None:
        first = own.start * absmax.shape[1]
        superblock = torch.arange(first, first + absmax.numel(), device=absmax.device).view(absmax.shape) // SUPERBLOCK
        scale = scale * layer.scale_absmax[superblock] + layer.scale_offset
    return QuantizedWeight(
        local_of(layer.weight), scale, None, None, layer.code, None, (absmax.shape[0], layer.in_features),
        layer.original_dtype, layer.block_size, layer.codebook, None,
    )  # fmt: skip


def _merged_experts(
    experts: QuantExperts, dtype: torch.dtype | None, base: Sequence[Tensor] | None, ranks: Ranks
) -> nn.Module:
    """By the module's own `to_experts`, of a module that holds this rank's experts, or all where rows are cut."""
    parts: list[Any] = [experts._modules[name] for name in experts.weights]
    is_by_rows = all(by_rows(part.weight) for part in parts)
    some = copy.copy(experts)
    some._modules, some._parameters = dict(experts._modules), dict(experts._parameters)
    bases: list[Tensor] | None = None if base is None else []
    for index, (name, part) in enumerate(zip(experts.weights, parts)):
        own = own_part(part.weight)[0] if is_by_rows else slice(0, experts.num_experts)
        alone = GroupedQuantLinear(_own_experts(part, own) if is_by_rows else gathered_qweight(part))
        alone.cast_to, alone.lora = part.cast_to, part.lora
        if part.lora is not None:
            alone.lora_A, alone.lora_B = (_experts_factor(factor, own) for factor in (part.lora_A, part.lora_B))
        some._modules[name] = alone
        bias: Any = experts._parameters.get(bias_name(name))
        if bias is not None:
            some._parameters[bias_name(name)] = nn.Parameter(whole(bias)[own], bias.requires_grad)
        if bases is not None and base is not None:
            bases.append(whole(base[index])[own])
    with ranks.together():
        dense = some.to_experts(dtype, bases)
    for name, part in zip(experts.weights, parts):
        for leaf in (name, bias_name(name)):
            held = dense._parameters.get(leaf)
            like: Any = part.weight if leaf == name else experts._parameters.get(leaf)
            if held is None or not is_dtensor(like):
                continue
            shape = (experts.num_experts, *held.shape[1:])
            cut = is_by_rows and by_rows(like)
            value = from_local(held.data, like, shape) if cut else placed_like(held.data, like)
            dense._parameters[leaf] = nn.Parameter(value, held.requires_grad)
    return dense


def _own_experts(part: Any, own: slice) -> QuantizedExperts:
    packed = local_of(part.weight)
    absmax = local_of(part.absmax) if is_dtensor(part.absmax) else part.absmax[own]
    shared = shared_codebooks(part.scales)
    scales = [(name, getattr(part, name)) for name in SCALES]
    of_own = (value if value is None or name in shared else value[own] for name, value in scales)
    scale_absmax, scale_offset, code, scale_code = of_own
    return QuantizedExperts(
        packed, absmax, scale_absmax, scale_offset, code, scale_code, (packed.shape[0], *part.weight_shape[1:]),
        part.original_dtype, part.block_size, part.codebook, part.scale_codebook,
    )  # fmt: skip


def _experts_factor(factor: Any, own: slice) -> ExpertsFactor:
    made = ExpertsFactor(whole(factor.weight)[own])
    if "start" in factor._buffers:
        made.register_buffer("start", whole(factor.start)[own])
    return made


def shard_again(model: nn.Module, merged: dict[str, tuple[nn.Module, nn.Module]]) -> None:
    """Let FSDP2 gather the merged modules, name -> (old, new), each by itself, and forget the old ones' parameters.

    A group of FSDP2 takes no new parameters, so that each module becomes one of its own, of the parts as they are.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    around = {name: module for name, module in named_modules(model) if module in set(fsdp_modules(model))}
    if fsdp is None or not around:
        return
    _forget({inner for old, _ in merged.values() for inner in old.modules()} - set(model.modules()), around.values())
    for name, (_, new) in merged.items():
        outer = [each for path, each in around.items() if not path or name.startswith(f"{path}.")]
        cut: dict[str, Any] = {leaf: p for leaf, p in new._parameters.items() if is_dtensor(p)}
        if not outer or not cut or not all(map(_is_of_fsdp_alone, cut.values())):
            continue
        state = fsdp.fully_shard.state(outer[-1])
        options = {"mp_policy": state._mp_policy} if hasattr(state, "_mp_policy") else {}
        for group in _groups(outer[-1]):
            options["offload_policy"] = group.offload_policy
        for leaf, parameter in cut.items():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            new._parameters[leaf] = nn.Parameter(empty, parameter.requires_grad)
        mesh = next(iter(cut.values())).device_mesh
        fsdp.fully_shard(new, mesh=mesh, reshard_after_forward=True, **options)
        for leaf, parameter in cut.items():
            new._parameters[leaf] = parameter


def _is_of_fsdp_alone(parameter: Any) -> bool:
    """Whether FSDP2 cut it, on its ranks or on the inner ones of replicas, and no tensor-parallel plan before."""
    *replicas, last = parameter.placements
    return by_rows(parameter) and last.is_shard() and all(p.is_replicate() for p in replicas) and len(replicas) < 2


def _groups(module: nn.Module) -> list[Any]:
    """What FSDP2 gathers together of a module, which has no public name; without one nothing is left out."""
    found: list[Any] = getattr(
        sys.modules["torch.distributed.fsdp"].fully_shard.state(module), "_fsdp_param_groups", []
    )
    return found


def _forget(gone: set[nn.Module], around: Iterable[nn.Module]) -> None:
    """Let FSDP2's groups gather nothing for these modules, nor keep them."""
    for module in around:
        for group in _groups(module):
            group.fsdp_params = [each for each in group.fsdp_params if each._module_info.module not in gone]
            for hooks in ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"):
                for each in gone.intersection(getattr(group, hooks, ())):
                    del getattr(group, hooks)[each]
