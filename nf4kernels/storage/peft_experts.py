"""Experts' adapters in PEFT's files: where `target_parameters` puts them, and in which layout.

PEFT wraps the module that holds the parameters once for each parameter, in the order of the parameters, and a wrapper
inside another is its `base_layer`. All experts' factors are one matrix: lora_A [r * E, K], expert by expert, and lora_B
[N, r * E], where the expert is the last index. Before PEFT 0.19.1 it took a weight [E, N, K] for [E, in, out]: then
lora_A holds what is B here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..nn.experts_layout import dense_weights, weight_names
from ..nn.quant_experts import QuantExperts
from .peft_format import StoredLora, stored_lora

WRAPPED = ".base_layer"


@dataclass(frozen=True)
class ExpertsShapes:
    """The two weights of fused experts: name -> (E, N, K), and whether the dense module has them as [E, K, N]."""

    weights: dict[str, tuple[int, ...]]
    is_transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> "ExpertsShapes | None":
        """Of experts, dense or in 4 bits; None of another module."""
        if isinstance(module, QuantExperts):
            shapes = {name: getattr(module, name).weight_shape for name in module.weight_names}
            return cls(shapes, module.is_transposed)
        if any(getattr(module._parameters.get(name), "ndim", 0) != 3 for name in weight_names(module)):
            return None
        shapes = {name: tuple(weight.shape) for name, weight in dense_weights(module).items()}
        return cls(shapes, bool(getattr(module, "is_transposed", False)))


def wrapper_names(path: str, count: int) -> list[str]:
    """What the wrappers of `count` adapted parameters of the module `path` are called, in the parameters' order."""
    return [path + WRAPPED * (count - 1 - i) for i in range(count)]


def wrapped_module(name: str) -> tuple[str, int]:
    """(the module's name, how many wrappers are around this one)."""
    depth = 0
    while name.endswith(WRAPPED):
        name, depth = name.removesuffix(WRAPPED), depth + 1
    return name, depth


def to_peft(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's two matrices of `[E, r, K]` and `[E, N, r]`."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def from_peft(stored: StoredLora, shape: tuple[int, ...], holds_out_first: bool) -> StoredLora:
    """The adapter of a weight of `shape` with a factor for each expert.

    `holds_out_first`: whether a square one has lora_A of N columns.
    """
    E, N, K = shape
    A, B = stored.A.unflatten(0, (E, -1)), stored.B.unflatten(1, (-1, E))
    is_older = (A.shape[2], B.shape[0]) == (N, K) and (N != K or holds_out_first)
    down, up = (B.permute(2, 1, 0), A.mT) if is_older else (A, B.permute(2, 0, 1))
    return replace(stored, A=down.contiguous(), B=up.contiguous())


def experts_loras(
    factors: Mapping[str, tuple[Tensor, Tensor]], experts: Mapping[str, ExpertsShapes],
    fit: Callable[[str], str | None], config: dict[str, Any], file: Path, who: str,
    called: str = "experts in 4 bits",
) -> dict[str, StoredLora]:  # fmt: skip
    """weight of experts -> its adapter, of the factors in a file that are of experts; ValueError where they do not fit.

    Args:
        factors: name in the file -> lora_A and lora_B.
        experts: name in the model -> what they are.
        fit: the model's name for one in the file.
        called: what the model's experts are called in a message.
    """
    found: dict[str, StoredLora] = {}
    targets = tuple(config.get("target_parameters") or ())
    known = [f"{name}.weight" for name in factors]  # PEFT can name a layer by its parameter, too
    for path, count in _counts(factors).items():
        module = experts.get(fit(path) or path)
        if module is None:
            continue
        names = [name for name in module.weights if _is_target(f"{path}.{name}", targets)]
        if len(names) != count:
            raise ValueError(
                f"{who}: target_parameters in {file} must name the {count} weights of {path} that it has adapters of,"
                f" got {list(targets)}"
            )
        for wrapper, name in zip(wrapper_names(path, count), names):
            shape = module.weights[name]
            A, B = factors[wrapper]
            stored = stored_lora(config, f"{path}.{name}", A, B, file, who, shape[0])
            found[f"{fit(path) or path}.{name}"] = from_peft(stored, shape, _holds_out_first(config, module))
            known.append(f"{path}.{name}")
    for target in targets:
        if not any(_is_target(name, (target,)) for name in known):
            raise ValueError(
                f"{who}: target_parameters in {file} must name weights of the model's {called} that have an"
                f" adapter in the file, got {target!r}"
            )
    return found


def _counts(names: Mapping[str, Any]) -> dict[str, int]:
    """module -> how many wrappers it has, of those whose innermost is there."""
    counts: dict[str, int] = {}
    for name in names:
        path, depth = wrapped_module(name)
        counts[path] = max(counts.get(path, 0), depth + 1)
    return {path: count for path, count in counts.items() if {*wrapper_names(path, count)} <= {*names}}


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _holds_out_first(config: dict[str, Any], module: ExpertsShapes) -> bool:
    """Whether the PEFT that wrote the file took the weights' dimensions the wrong way round."""
    version = str(config.get("peft_version") or "")
    return version == "0.19.0" or (version.startswith(("0.17.", "0.18.")) and not module.is_transposed)
