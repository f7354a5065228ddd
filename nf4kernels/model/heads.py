"""Which linear layers stay dense by what a model's class says: heads, what PEFT trains, what is kept in float32."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from .walk import inside

# By name, where no rule tells: parts whose rounding costs more than their bytes are worth. One list for
# `quantize_model` and for directories, whose `skip` adds to it.
SKIP = ("lm_head", "embed_out", "router", "*.gate", "score", "classifier")


def trained_whole(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """linear layer -> why it stays dense, by rules that hold for transformers' and PEFT's modules of any class."""
    reasons: dict[nn.Module, str] = {}
    for module in modules:
        for rule in (_saved_by_peft, _trained_in_peft, output_layers, _beside_the_base, _kept_in_fp32):
            for part, reason in rule(module):
                for layer in part.modules():
                    if isinstance(layer, nn.Linear):
                        reasons.setdefault(layer, reason)
    return reasons


def _saved_by_peft(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    if "original_module" in module._modules and "modules_to_save" in module._modules:
        yield module, "in PEFT's modules_to_save"


def _trained_in_peft(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    if not isinstance(vars(module).get("peft_config"), dict):
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and getattr(layer.weight, "requires_grad", False):
            yield layer, "trained inside a PEFT model"


def output_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(the head of this module, why it stays dense), where the module tells of one."""
    method = getattr(module, "get_output_embeddings", None)
    if not callable(method):
        return
    try:
        output = method()
    except (AttributeError, NotImplementedError):  # a backbone, which has none
        return
    if isinstance(output, nn.Module):
        yield output, f"the output layer of {type(module).__name__}"


def _beside_the_base(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What a task's class adds to the model that it is for, other models that it holds excepted."""
    base_name = getattr(type(module), "base_model_prefix", None)
    if not isinstance(base_name, str):
        return
    has_base = base_name in module._modules
    num_labels = getattr(getattr(module, "config", None), "num_labels", None)
    for name, child in module._modules.items():
        if child is None or name == base_name or hasattr(type(inside(child)), "base_model_prefix"):
            continue
        if has_base or getattr(inside(child), "out_features", None) == num_labels is not None:
            yield child, f"a head of {type(module).__name__}"


def _kept_in_fp32(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What its class keeps in float32, whatever the model's dtype: its results overflow or are rounded too far."""
    kept = [getattr(module, f"_keep_in_fp32_modules{which}", None) or () for which in ("", "_strict")]
    entries = [entry.removesuffix(".weight") for entries in kept for entry in entries]
    for name, part in module.named_modules() if entries else ():
        if isinstance(part, nn.Linear) and left_dense_by_loader(name, entries):
            yield part, f"kept in float32 by {type(module).__name__}"


def left_dense_by_loader(name: str, entries: Iterable[str]) -> bool:
    """Whether transformers leaves the layer dense, given `llm_int8_skip_modules`: a prefix, a pattern or a suffix."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{entry}){boundary}", name) or name.endswith(entry) for entry in entries)
