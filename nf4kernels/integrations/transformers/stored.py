"""A 4-bit checkpoint before it is read: what its headers say, checked against the model and the configuration."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer

from ...codebook import FORMATS
from ...functional import quantize_experts
from ...model.plan import is_conv1d, names_of_modules
from ...model.walk import get_submodule, named_modules
from ...nn.experts_layout import dense_weights, layout_problem
from ...nn.grouped_quant_linear import GroupedQuantLinear
from ...nn.quant_module import OTHER_BUFFERS
from ...quantized_weight import WEIGHT_DTYPES
from ...storage.bitsandbytes_format import StoredWeight, check_no_lone_part, stored_weight, stored_weights
from ...storage.experts_format import experts_from_tensors, stored_experts
from ...storage.key_conversion import group_tensors
from ...storage.published.files import PublishedFiles
from ...storage.tensor_files import TensorFiles
from .config import Nf4Config
from .operations import converts
from .targets import Target, place_experts, targets_of

WHO = "nf4kernels.Nf4Config"
AnyFiles = TensorFiles | PublishedFiles


@dataclass(frozen=True)
class Expected:
    """What a 4-bit checkpoint brings.

    Attributes:
        targets: name of a tensor of the dense model -> what it becomes.
        checksums: name of a part of experts -> the checksum that is stored with it.
    """

    targets: dict[str, Target]
    checksums: dict[str, Tensor]


def expect_stored(model: Any, files: AnyFiles, config: Nf4Config) -> Expected:
    """What the headers announce, checked; the model on the meta device is made ready for it.

    A weight that is stored in 4 bits takes the stored shape and dtype, so that the loader casts nothing, and experts
    become QuantExperts, whose tensors the loader finds by their names.

    Raises:
        ValueError: the checkpoint and the configuration contradict each other, or the model has no place for a weight.
    """
    if not files.names:
        raise ValueError(f"{WHO}: a 4-bit checkpoint must be in safetensors files, got none")
    stored = _stored_weights(files)
    experts = stored_experts(files.names)
    if not stored and not experts:
        raise ValueError(f"{WHO}: the checkpoint must have weights in 4 bits, as the configuration says, got none")
    if isinstance(files, PublishedFiles):  # for config.json, when the model is saved
        (config.codebook, config.block_size), config.double_quant = files.format, False
    if stored and config.block_size is None and config.codebook_name not in FORMATS:  # bitsandbytes' does not say
        config.block_size = next(iter(stored.values())).block_size
    for key, weight in stored.items():
        _check_options(key, weight, files, config)
    aliases = {name: names for names in names_of_modules(model).values() for name in names}
    targets = _expect_weights(model, files, stored, aliases)
    return Expected(targets, _expect_experts(model, files, config, experts, aliases))


def _stored_weights(files: AnyFiles) -> dict[str, StoredWeight]:
    """key -> what is stored there; ValueError where a part of it is missing or of another size."""
    names = dict.fromkeys(files.names)
    parts_of = stored_weights(names)
    check_no_lone_part(names, parts_of, WHO)
    stored = {key: stored_weight(parts, files.read, key, WHO) for key, parts in parts_of.items()}
    for key, weight in stored.items():
        for name, size in weight.sizes(key).items():
            if name not in names:
                raise ValueError(f"{WHO}: the checkpoint must have {name}, got none")
            came = files.on_meta(name)
            count = came.nbytes if name == key else came.numel()
            if count != size:
                raise ValueError(f"{WHO}: {name} must have {size} elements, got {count}")
    return stored


def _check_options(key: str, weight: StoredWeight, files: AnyFiles, config: Nf4Config) -> None:
    """ValueError where a weight is not as the configuration says; beside a published format each says its own.

    With a plan it is as that says of some layer: files may have other names than the model.
    """
    if config.codebook_name in FORMATS:
        return
    wrong = [_difference(key, weight, files, options) for options in (config.quant_options, *_planned(config))]
    if all(wrong):
        raise ValueError(f"{WHO}: the checkpoint {wrong[0]} in {key}")


def _planned(config: Nf4Config) -> list[dict[str, Any]]:
    return [config.options_of([name]) for name, options in config.plan.items() if options is not None]


def _difference(key: str, weight: StoredWeight, files: AnyFiles, options: dict[str, Any]) -> str | None:
    """What must be and what came; None where nothing differs."""
    levels = options["codebook"] if isinstance(options["codebook"], torch.Tensor) else None
    codebook = options["codebook"] if levels is None else "custom"
    if codebook in FORMATS:
        return None if weight.codebook == codebook else f"must have codebook {codebook}, got {weight.codebook}"
    for what, expected, came in (
        ("codebook", codebook, weight.codebook),
        ("block size", options["block_size"] or weight.block_size, weight.block_size),
        ("double_quant", options["double_quant"], weight.double_quant),
    ):
        if expected != came:
            return f"must have {what} {expected} as the configuration says, got {came}"
    if levels is not None and not torch.equal(files.read(f"{key}.quant_map"), levels):
        return "must have the configuration's codebook, got another"
    return None


def _expect_weights(
    model: Any, files: AnyFiles, stored: dict[str, StoredWeight], aliases: dict[str, list[str]]
) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    state = model.state_dict(keep_vars=True)
    for group in group_tensors(model, stored, state):
        key = next(iter(group.sources))
        if group.converter is not None:
            raise ValueError(f"{WHO}: {key} must be dense, since the model has it inside of {group.target}, got 4 bits")
        if group.target not in state:
            continue  # of a part that the model lacks, as of a head: the loader says so
        owner = group.target.rpartition(".")[0]
        module: Any = model.get_submodule(owner)
        if type(module) is not nn.Linear and not is_conv1d(module):
            raise ValueError(f"{WHO}: the model must have an nn.Linear for {key}, got a {type(module).__name__}")
        (target,) = targets_of(model, aliases.get(owner, [owner]))
        if target.weight_shape != stored[key].shape:
            expected = list(target.weight_shape)
            raise ValueError(f"{WHO}: {key} must have shape {expected} as in the model, got {list(stored[key].shape)}")
        targets.update(dict.fromkeys(target.keys, target))
        module.weight = nn.Parameter(files.on_meta(key), requires_grad=False)
    return targets


def _expect_experts(
    model: Any, files: AnyFiles, config: Nf4Config, keys: list[str], aliases: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Put QuantExperts on the meta device where the checkpoint has such; name of a part -> its stored checksum."""
    checksums: dict[str, Tensor] = {}
    in_file: dict[str, dict[str, str]] = {}  # module -> leaf -> key
    for group in group_tensors(model, keys, model.state_dict(keep_vars=True)):
        owner, _, leaf = group.target.rpartition(".")
        in_file.setdefault(owner, {})[leaf] = next(iter(group.sources))
    if not hasattr(HfQuantizer, "update_weight_conversions"):  # an older transformers goes by all its rules
        for rule in get_model_conversion_mapping(model):
            if converts(rule, [f"{key}.weight" for key in keys]):
                expected = f"must be one that can leave out the conversion of {rule.target_patterns[0]}, 5.24 does"
                raise ValueError(f"{WHO}: transformers {expected}, got {transformers.__version__}")
    modules = dict(named_modules(model))
    for owner, found in in_file.items():
        module: Any = modules.get(owner)
        if module is None:  # of a layer that the model lacks: the loader says so
            continue
        problem = layout_problem(module, config.block_size)
        if problem is None and len(found) != 2:
            problem = f"{', '.join(found)} alone"
        if problem is not None:
            raise ValueError(f"{WHO}: the model must have experts that QuantExperts can stand for as {owner}, "
                             f"got {problem}")  # fmt: skip
        first = targets_of(model, aliases[owner])[0]
        tensors_of = {leaf: _headers(files, key) for leaf, key in found.items()}
        empty = {leaf: torch.empty_like(weight, device="meta") for leaf, weight in dense_weights(module).items()}
        try:
            on_meta = {
                leaf: experts_from_tensors(tensors_of[leaf], found[leaf], tuple(weight.shape))
                if config.codebook_name in FORMATS else quantize_experts(weight, **config.options_of(aliases[owner]))
                for leaf, weight in empty.items()
            }  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"{WHO}: {owner}: {error}") from None
        experts = place_experts(model, first, on_meta, config.compute_dtype)
        for leaf, key in found.items():
            part: GroupedQuantLinear = getattr(experts, leaf)
            tensors = tensors_of[leaf]
            for message in part.state_errors(tensors, f"{key}."):
                raise ValueError(f"{WHO}: {message}")
            source = WEIGHT_DTYPES[int(tensors[f"{key}.source_dtype"])]
            part.cast_to = None if source == first.dtype else first.dtype
            if f"{key}.checksum" in tensors:
                checksums[f"{owner}.{leaf}"] = tensors[f"{key}.checksum"]
    return checksums


def _headers(files: AnyFiles, key: str) -> dict[str, Tensor]:
    """What is stored for experts, on meta but for what is small."""
    own = [name for name in files.names if name.startswith(f"{key}.")]
    return {name: files.peek(name) if _is_small(name) else files.on_meta(name) for name in own}


def _is_small(name: str) -> bool:
    return name.rpartition(".")[2] in ("code", "scale_code", *OTHER_BUFFERS)


def check_experts(model: nn.Module, checksums: dict[str, Tensor]) -> None:
    """ValueError where experts that were loaded are not the bytes that were saved."""
    for name, recorded in checksums.items():
        part: Any = get_submodule(model, name)
        if recorded.any() and part.checksum.any() and not torch.equal(part.checksum.cpu(), recorded):
            raise ValueError(f"{WHO}: {name} must hold the bytes that its checksum is of, got others")
