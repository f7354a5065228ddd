"""Fused experts in 4 bits on disk, as the state of QuantExperts: bitsandbytes has no format for them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..codebook import CODEBOOKS, FORMATS, name_of
from ..model.walk import named_modules, state_dict
from ..nn.checksum import checksum
from ..nn.experts_layout import WEIGHTS, dense_weights, layout_problem, weight_names
from ..nn.grouped_quant_linear import GroupedQuantLinear
from ..nn.quant_experts import QuantExperts
from ..nn.quant_module import OTHER_BUFFERS, SCALE_TENSORS, SCALES
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts, scales_of
from .bitsandbytes_format import name_of_scale_code
from .key_conversion import group_tensors


def experts_to_tensors(qweights: QuantizedExperts, key: str) -> dict[str, Tensor]:
    """The tensors that stand for the experts' weight `key`, as `save_checkpoint` writes them; shares memory."""
    return GroupedQuantLinear(qweights).state_dict(prefix=f"{key}.")


def stored_experts(names: Iterable[str]) -> list[str]:
    """The keys of such weights among the names of a file's tensors."""
    names = set(names)
    ends = tuple(f".{leaf}.weight" for leaf in WEIGHTS)
    keys = (name.removesuffix(".weight") for name in names if name.endswith(ends))
    return sorted(key for key in keys if {f"{key}.absmax", f"{key}.code", f"{key}.source_dtype"} <= names)


def experts_from_tensors(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> QuantizedExperts:
    """The experts' weight that was stored as `key`; ValueError or TypeError where it does not fit `shape`.

    Its tensors are copies, not views of the file. Where the packed bytes are on meta, all of them are, and `code` and
    `source_dtype` alone must have values.
    """
    absmax, source = tensors[f"{key}.absmax"], int(tensors[f"{key}.source_dtype"])
    blocks = absmax.shape[-1] if absmax.dim() == 3 else 0
    if source >= len(WEIGHT_DTYPES) or not blocks or shape[2] % blocks:
        raise ValueError(f"{key} must be experts of shape {list(shape)}, got absmax {list(absmax.shape)}")
    own = {
        name.removeprefix(f"{key}."): tensor.clone() for name, tensor in tensors.items() if name.startswith(f"{key}.")
    }
    names = _names(own, shape[2] // blocks)
    if own["weight"].is_meta:
        own = {name: tensor.to("meta") for name, tensor in own.items()}
    scales: dict[str, Any] = {name: own.get(name) for name in SCALES}
    return QuantizedExperts(
        own["weight"], own["absmax"], **scales, shape=shape, dtype=WEIGHT_DTYPES[source],
        block_size=shape[2] // blocks, **names,
    )  # fmt: skip


def _names(own: dict[str, Tensor], block_size: int) -> dict[str, Any]:
    """The codebooks' names, which such files do not say: by their levels, and of two formats with the same by the
    kind of scales and the block size."""
    scale_code = own.get("scale_code")
    kind = scales_of(own["absmax"], own.get("scale_absmax"), scale_code)
    codebook = format_of(own["code"], kind, block_size)
    if scale_code is None:
        return {"codebook": codebook, "scale_codebook": None}
    row = scale_code[0] if scale_code.dim() == 2 else scale_code
    return {"codebook": codebook, "scale_codebook": name_of_scale_code(row, codebook)}


def format_of(code: Tensor, scales: str, block_size: int) -> str:
    """The name of stored levels; of the formats that share them, the one that has such scales and blocks."""
    levels = name_of(code, CODEBOOKS)
    fitting = [
        name for name, its in FORMATS.items()
        if levels != "custom" and torch.equal(CODEBOOKS[name], CODEBOOKS[levels])
        and scales in its.scales and its.block_size in (None, block_size)
    ]  # fmt: skip
    return fitting[0] if fitting else levels


def name_experts(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the tensors of experts the model's names, in place, where transformers' rules for that model rename them."""
    state = state_dict(model)
    for group in group_tensors(model, stored_experts(tensors), {*state, *stored_experts(state)}):
        (source,) = group.sources
        if source != group.target:
            for name in [name for name in tensors if name.startswith(f"{source}.")]:
                tensors[group.target + name.removeprefix(source)] = tensors.pop(name)


def _check_bytes(tensors: dict[str, Tensor], key: str) -> None:
    """ValueError where a stored checksum is of other bytes."""
    found = [tensors.get(f"{key}.{leaf}") for leaf in ("weight", "absmax", "checksum")]
    packed, absmax, recorded = found
    if packed is None or absmax is None or recorded is None or packed.is_meta or not recorded.any():
        return
    if not torch.equal(checksum(packed, absmax).to(recorded.device), recorded):
        raise ValueError(f"{key}.weight must hold the bytes that its checksum is of, got others")


def take_experts(model: nn.Module, tensors: dict[str, Tensor], who: str) -> dict[nn.Module, QuantExperts]:
    """dense module -> the QuantExperts that a file has for it; their tensors leave `tensors`.

    QuantExperts that are in the model already are filled as every other module is. ValueError, and nothing changed,
    where the model has no such experts.
    """
    taken: dict[nn.Module, QuantExperts] = {}
    modules: dict[str, Any] = dict(named_modules(model))
    stored = stored_experts(tensors)
    for path in dict.fromkeys(key.rpartition(".")[0] for key in stored):
        module: Any = modules.get(path)
        if isinstance(module, QuantExperts):
            continue
        problem = "no such module" if module is None else layout_problem(module)
        keys = [] if module is None else [f"{path}.{leaf}" for leaf in weight_names(module)]
        if problem is None and not set(keys) <= set(stored):
            problem = "one of their two weights alone"
        if problem is not None:
            raise ValueError(f"{who}: model must have experts that QuantExperts can stand for as {path}, got {problem}")
        dense = dense_weights(module).values()
        first = next(iter(dense))
        device = "cpu" if first.is_meta else first.device
        try:
            for key in keys:
                _check_bytes(tensors, key)
            parts = [experts_from_tensors(tensors, key, tuple(each.shape)).to(device) for key, each in zip(keys, dense)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{who}: {path}: {error}") from None
        # A row of symmetric integers may be a block, and the rows of the two have two lengths.
        sizes = {0 if part.codebook in FORMATS else part.block_size for part in parts}
        if len(sizes) > 1 or len({(part.codebook, part.scale_codebook) for part in parts}) > 1:
            raise ValueError(f"{who}: {path} must have one block size and codebook, got two")
        taken[module] = QuantExperts.from_quantized(module, parts[0], parts[1])
    for key in stored:
        for leaf in ("weight", *SCALE_TENSORS, *OTHER_BUFFERS) if modules[key.rpartition(".")[0]] in taken else ():
            tensors.pop(f"{key}.{leaf}", None)  # and adapters stay
    return taken
