"""load_checkpoint where tensors are read one at a time, of each the part that this rank holds; quantizing on load."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..codebook import CODEBOOKS
from ..model.sharded import Ranks, by_rows, own_part
from ..model.walk import named_modules, state_dict
from ..nn import checksum as checksums
from ..nn.adapted_module import AdaptedModule
from ..nn.casts import cast
from ..nn.dtensors import from_local, is_dtensor, local_of
from ..nn.lora import FROM_WEIGHT, init_adapter
from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import COLUMN_ORDER, QuantLinear
from ..nn.quant_module import SCALES, QuantModule
from ..quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from .bitsandbytes_format import stored_weights, weight_from_tensors
from .checkpoint_adapters import StoredAdapter, check_active, missing_adapters, stored_adapters
from .checkpoint_fit import check_dense, rename
from .experts_format import name_experts, stored_experts
from .file_parts import Source, Stored, views
from .key_conversion import group_tensors
from .model_state import adapted_experts, dense_state, float_dtype, join, quant_layers, shared
from .names import left_behind, listed, never_stored
from .published.opening import open_published
from .quantize_rows import quantized_parts
from .tensor_files import checkpoint_files

ORDER = "quantize the model, on the meta device too, then shard it, then load"


@dataclass
class _Plan:
    """What fills the model."""

    sources: dict[str, Source] = field(default_factory=dict)  # by names of the model's state
    in_4_bits: dict[str, list[Stored]] = field(default_factory=dict)  # layer -> its tensors in the files
    keys: dict[str, str] = field(default_factory=dict)  # layer -> the weight's name in the files
    dense: dict[str, Source] = field(default_factory=dict)  # layer, or experts' weight -> what is quantized for it
    starts_adapters: bool = False
    left: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


def load_in_parts(model: nn.Module, path: Path, quantize: bool, who: str) -> None:
    """Fill a model in 4 bits, whose tensors may be DTensors; see `load_checkpoint`."""
    ranks = Ranks(model, who)
    with ranks.together():
        plan = _planned(model, path, quantize, who)
        seed = int(torch.randint(1 << 62, ()))
    _fill(model, plan, ranks, ranks.of_first(seed))
    if plan.left:
        warnings.warn(
            f"{who}: the file is of a part of the model, left as they were: {listed(plan.left)}", stacklevel=3
        )
    if plan.outside:
        names = listed(plan.outside)
        warnings.warn(f"{who}: the model is a part of the file's, not loaded: {names}", stacklevel=3)


def _headers(path: Path, who: str) -> tuple[dict[str, Stored], dict[str, Tensor], dict[str, list[StoredAdapter]]]:
    """(where each tensor is, its shape and dtype, the adapters stored beside them) by the files' names."""
    stored, metas, adapters = {}, {}, {}
    for file in checkpoint_files(path, who):
        if not file.is_file():
            raise FileNotFoundError(f"{who}: path must be a safetensors file or a directory, got {file}")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    metas[name] = torch.empty_like(opened.get_tensor(name), device="meta")
                    stored[name] = Stored(file, name)
                adapters.update(stored_adapters(opened.metadata() or {}, file, who))
        except SafetensorError as error:
            raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None
    return stored, metas, adapters


def _planned(model: nn.Module, path: Path, quantize: bool, who: str) -> _Plan:
    """Every check; nothing is changed, and of the files' tensors small ones alone are looked at."""
    with open_published(path, model, who) as published:
        if published is not None:
            raise ValueError(
                f"{who}: path must be a checkpoint of ours, of bitsandbytes' or dense where tensors are read in parts,"
                f" got a published 4-bit format in {path}"
            )
    stored, metas, adapters = _headers(path, who)
    located = {id(meta): stored[name] for name, meta in metas.items()}
    keys = stored_weights(metas)
    weights: dict[str, Any] = {key.removesuffix("weight").removesuffix("."): key for key in keys}
    in_4_bits = {name for names in keys.values() for name in names}
    tensors = {name: meta for name, meta in metas.items() if name not in in_4_bits}
    for name in never_stored(model, tensors):
        del tensors[name]
    plan = _Plan()
    fit, plan.outside = rename(model, tensors, weights, adapters)
    name_experts(model, tensors)
    sources = _sources(model, tensors, weights, located, who)
    for name in left_behind(model, sources):
        del sources[name]
    layers = quant_layers(model)
    for name, key in weights.items():
        if name not in layers:
            raise ValueError(f"{who}: model must have a QuantLinear as {name} ({ORDER}), got none")
        plan.keys[name], plan.in_4_bits[name] = key, [stored[each] for each in keys[key]]
        _check_weight(model, layers[name], plan, name, who)
    _take_dense(model, layers, sources, plan, quantize, who)
    _check_rest(model, layers, sources, plan, adapters, fit, who)
    return plan


def _sources(
    model: nn.Module, tensors: dict[str, Tensor], weights: dict[str, Any], located: dict[int, Stored], who: str
) -> dict[str, Source]:
    """By the model's names; nothing is read, the conversions run on meta."""
    state = state_dict(model)
    packed = {join(name, "weight"): name for name in weights}
    sources = {}
    for group in group_tensors(model, [*tensors, *packed], {*state, *stored_experts(state)}):
        in_4_bits = [name for name in group.sources if name in packed]
        if in_4_bits and group.converter is not None:
            raise ValueError(f"{who}: {in_4_bits[0]} must be dense as a part of {group.target}, got a 4-bit weight")
        if in_4_bits:
            weights[group.target.removesuffix("weight").removesuffix(".")] = weights.pop(packed[in_4_bits[0]])
            continue
        metas = [tensors[name] for name in group.sources]
        try:
            made = group.convert(model, metas)
        except Exception as error:  # what transformers' operations raise has no common type
            raise ValueError(f"{who}: {list(group.sources)} must make {group.target}, got {error}") from None
        for target, meta in made.items():
            sources[target] = Source(group, target, [located[id(each)] for each in metas], meta)
    return sources


def _check_weight(model: nn.Module, layer: QuantLinear, plan: _Plan, name: str, who: str) -> None:
    """ValueError unless the file's 4-bit weight is damaged in no way and what the layer has room for."""
    with _weight_of(plan, name, who) as qweight:
        for what, ours, theirs in (
            ("shape", layer.weight_shape, qweight.shape),
            ("codebook", layer.codebook, qweight.codebook),
            ("block_size", layer.block_size, qweight.block_size),
            ("scales", layer.scales, qweight.scales),
            ("scale_codebook", layer.scale_codebook, qweight.scale_codebook),
            (COLUMN_ORDER, layer.column_order is not None, qweight.column_order is not None),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{who}: {join(name, 'weight')} must have {what} {ours} as the model's layer, got {theirs}"
                )


class _weight_of:  # noqa: N801
    """The file's 4-bit weight of a layer, its tensors mapped into memory."""

    def __init__(self, plan: _Plan, name: str, who: str) -> None:
        self.stored, self.key, self.who = plan.in_4_bits[name], plan.keys[name], who
        self.views = views(self.stored, who)

    def __enter__(self) -> QuantizedWeight:
        tensors = dict(zip((each.name for each in self.stored), self.views.__enter__()))
        try:
            return weight_from_tensors(tensors, self.key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.who}: {self.stored[0].file}: {error}") from None

    def __exit__(self, *exception: Any) -> None:
        self.views.__exit__(*exception)


def _take_dense(
    model: nn.Module, layers: dict[str, QuantLinear], sources: dict[str, Source], plan: _Plan, quantize: bool, who: str
) -> None:
    """Move what is to be quantized from `sources` into the plan."""
    aliases: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        aliases.setdefault(layer, []).append(name)
    parts = adapted_experts(model)
    aliases.update({part: [name] for name, part in parts.items()})
    for quantized, names in aliases.items():
        given = [name for name in names if name in plan.in_4_bits]
        if given or (names[0] in parts and f"{names[0]}.weight" in sources):
            continue
        keys = [name if name in parts else join(name, "weight") for name in names]
        found = [key for key in keys if key in sources]
        if not found:
            raise ValueError(f"{who}: the checkpoint must have a 4-bit weight {join(names[0], 'weight')}, got none")
        if not quantize:
            raise ValueError(f"{who}: {found[0]} must be in 4 bits, got a dense tensor (which quantize=True quantizes)")
        source = sources.pop(found[0])
        _check_dense_weight(model, quantized, names[0], source, who)
        plan.dense[names[0]] = source
        for key in found[1:]:
            del sources[key]


def _check_dense_weight(model: nn.Module, layer: Any, name: str, source: Source, who: str) -> None:
    shape, meta = layer.weight_shape, source.on_meta
    expected = (shape[0], shape[2], shape[1]) if _is_transposed(model, name) else shape
    if tuple(meta.shape) != tuple(expected) or meta.dtype not in WEIGHT_DTYPES:
        came = f"{meta.dtype} {list(meta.shape)}"
        raise ValueError(f"{who}: {source.target} must be floating point {list(expected)}, got {came}")
    if layer.codebook not in CODEBOOKS:
        raise ValueError(f"{who}: {name} must have a named codebook to quantize on load, got {layer.codebook!r}")


def _is_transposed(model: nn.Module, name: str) -> bool:
    experts = dict(named_modules(model)).get(name.rpartition(".")[0])
    return isinstance(experts, QuantExperts) and experts.is_transposed


def _check_rest(model, layers, sources, plan: _Plan, adapters, fit, who: str) -> None:
    adapted: dict[str, AdaptedModule] = {**layers, **adapted_experts(model)}
    check_active(adapted, adapters, who)
    for name in missing_adapters(adapted, adapters):
        raise ValueError(f"{who}: {name} must have the file's adapter when it is sharded ({ORDER}), got none")
    expected = dense_state(model, layers)
    for name in plan.dense:
        if name not in layers:
            for key in [key for key in expected if key.startswith(f"{name}.")]:
                if key.removeprefix(f"{name}.") in ("weight", "absmax", *SCALES, "source_dtype"):
                    del expected[key]
    of_adapters = [key for key in expected if ".lora_" in f".{key}"]
    if of_adapters and not any(key in sources for key in of_adapters):
        plan.starts_adapters = True
        for key in of_adapters:
            del expected[key]
        for name, layer in adapted.items():
            for each in layer.adapter_names:
                config: Any = layer.get_adapter(each)
                if config[0].init in FROM_WEIGHT:
                    raise ValueError(
                        f"{who}: the file must have the adapter of {name}, which started from its weight, got none"
                    )
    modules = dict(named_modules(model))
    for key in stored_experts(sources):
        if not isinstance(modules.get(key.rpartition(".")[0]), QuantExperts):
            raise ValueError(f"{who}: model must have QuantExperts with a weight {key} ({ORDER}), got none")
    filled = {name: each for name, each in named_modules(model) if isinstance(each, QuantModule) and name not in layers}
    for name in filled:
        sources.pop(join(name, "checksum"), None)  # computed anew
    metas = {name: source.on_meta for name, source in sources.items()}
    plan.left = check_dense(expected, metas, adapted, {}, fit, who)
    for name, module in filled.items():
        for message in module.state_errors(metas, f"{name}."):
            raise ValueError(f"{who}: {message}")
    _check_tied(model, expected, sources, who)
    plan.sources = sources


def _check_tied(model: nn.Module, expected: dict[str, Tensor], sources: dict[str, Source], who: str) -> None:
    """ValueError where the model ties two names for which the files hold different tensors."""
    for group in shared(expected):
        first, *others = [name for name in group if name in sources] or [""]
        for name in others:
            one, other = (sources.pop(name), sources[first])
            part = own_part(expected[first])
            if not torch.equal(one.read(model, part, who), other.read(model, part, who)):
                raise ValueError(f"{who}: {first} and {name} are tied in the model, which is read in parts, so the file"
                                 " must hold the same for both, got two different tensors")  # fmt: skip


def _fill(model: nn.Module, plan: _Plan, ranks: Ranks, seed: int) -> None:
    state, layers = state_dict(model), quant_layers(model)
    placed: dict[int, Any] = {}
    parts = adapted_experts(model)
    runs_in = float_dtype(model)
    for name, source in plan.dense.items():
        layer: Any = layers.get(name) or parts[name]
        values = quantized_parts(model, layer, source, ranks, _is_transposed(model, name))
        for leaf, value in values.items():
            _put(getattr(layer, leaf), value, placed)
    with ranks.together():
        for name in plan.in_4_bits:
            with _weight_of(plan, name, ranks.who) as qweight:
                for leaf, value in _leaves(qweight):
                    target = getattr(layers[name], leaf)
                    _put(target, value[own_part(target)], placed)
        for name, source in plan.sources.items():
            target = state[name]
            value = source.read(model, own_part(target), ranks.who)
            _put(target, cast(value, target.dtype, f"{ranks.who}: {name}"), placed)
        if plan.starts_adapters:
            if any(local_of(t).any() for name, t in state.items() if "lora_B" in name and not local_of(t).is_meta):
                warnings.warn(f"{ranks.who}: the file has no adapters, the model's begin anew", stacklevel=4)
            _start_adapters({**layers, **parts}, seed, placed)
    for module in model.modules() if placed else ():
        for store in (module._parameters, module._buffers):
            store.update({leaf: placed[id(t)] for leaf, t in store.items() if id(t) in placed})
    for name in (*plan.dense, *plan.in_4_bits):
        layer = layers.get(name) or parts[name]
        layer.cast_to = layer.cast_to or runs_in  # as the model around it, whatever the file was
    _record_bytes(model, ranks)
    left = [name for name, buffer in model.named_buffers() if local_of(buffer).is_meta]
    if left:
        warnings.warn(f"{ranks.who}: still on the meta device, since no checkpoint holds them: {left}", stacklevel=4)


def _leaves(qweight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    yield "weight", qweight.packed
    yield "source_dtype", torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8)
    for leaf in ("absmax", *SCALES, COLUMN_ORDER):
        value = getattr(qweight, leaf)
        if value is not None:
            yield leaf, value


def _put(target: Tensor, part: Tensor, placed: dict[int, Any]) -> None:
    """Into the memory of this rank's part; a new tensor where that is on meta."""
    local = local_of(target)
    if not local.is_meta:
        local.copy_(part)
        return
    sharded: Any = target
    device = torch.device(sharded.device_mesh.device_type if is_dtensor(target) else "cpu")
    new: Any = part.to(device, target.dtype, copy=True)
    new = from_local(new, target) if is_dtensor(target) else new
    is_parameter = isinstance(target, nn.Parameter)
    placed[id(target)] = nn.Parameter(new, target.requires_grad) if is_parameter else new


def _start_adapters(layers: dict[str, Any], seed: int, placed: dict[int, Any]) -> None:
    """The same start on every rank, which keeps its part of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in dict.fromkeys(layers.values()):
            for name in layer.adapter_names:
                config, *factors = layer.get_adapter(name)
                A, B = (SimpleNamespace(weight=torch.empty(f.weight.shape, dtype=f.weight.dtype)) for f in factors)
                init_adapter(A, B, config)
                for factor, made in zip(factors, (A, B)):
                    _put(factor.weight, made.weight[own_part(factor.weight)], placed)


def _record_bytes(model: nn.Module, ranks: Ranks) -> None:
    """Each weight's checksum, of which every rank knows what its part adds."""
    modules = [module for module in model.modules() if isinstance(module, QuantModule)]
    sums: dict[tuple[int, str, int], int] = {}
    for index, module in enumerate(modules):
        for leaf in ("weight", "absmax"):
            tensor = getattr(module, leaf)
            if tensor.dtype == torch.uint8 and by_rows(tensor):
                local, whole_size = local_of(tensor), tensor.numel()
                first = own_part(tensor)[0].start * (whole_size // max(tensor.shape[0], 1))
                if local.numel():
                    sums[index, leaf, first] = int(checksums.sum_of_part(local, first, whole_size))
    every = {key: value for part in ranks.gathered(sums) for key, value in part.items()}
    for index, module in enumerate(modules):
        leaves = [leaf for leaf in ("weight", "absmax") if getattr(module, leaf).dtype == torch.uint8]
        device = local_of(module.weight).device
        if all(by_rows(getattr(module, leaf)) for leaf in leaves):
            found = [sum(value for key, value in every.items() if key[:2] == (index, leaf)) for leaf in leaves]
            totals = [torch.tensor((each + (1 << 63)) % (1 << 64) - (1 << 63)) for each in found]
            module._buffers["checksum"] = checksums.of_sums(*totals).to(device)
        else:
            module._buffers["checksum"] = torch.zeros(checksums.LENGTH, dtype=torch.uint8, device=device)
        module._see_bytes()
