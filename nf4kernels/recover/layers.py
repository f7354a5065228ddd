"""What named layers read and give while a model runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.walk import named_modules
from .batches import Batch, token_ids


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, or the only one whose name ends in ".name" (of a model in a wrapper, say).

    Raises:
        ValueError: there is none, or several end so.
    """
    modules = dict(named_modules(model))
    if name in modules:
        return modules[name]
    found = [each for each in modules if each.endswith(f".{name}")]
    if len(found) != 1:
        came = ", ".join(found[:3]) if found else "none"
        raise ValueError(f"nf4kernels.recover: layer must name one module of the {type(model).__name__}, got {name!r}"
                         f" which is {came}")  # fmt: skip
    return modules[found[0]]


@contextmanager
def recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the `with` the mapping gets each layer's output by the name given, or the first of several outputs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = []
    try:
        for name in dict.fromkeys(names):
            handles.append(layer_named(model, name).register_forward_hook(keep(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def text_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """`[rows, width]`: of `[B, T, width]` the positions in `attention_mask`, or all; of `[B, ...]` one row each."""
    if hidden.dim() != 3:
        return hidden.flatten(1)
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if mask is not None and mask.shape == hidden.shape[:2]:
        return hidden[mask.bool()]
    ids = token_ids(batch)
    is_sequence = mask is not None or (ids is not None and ids.shape == hidden.shape[:2])
    return hidden.flatten(0, 1) if is_sequence else hidden.flatten(1)


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[rows, K]` of `[..., K]`, without those that the mask `[B, T]` leaves out."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def mask_of(batch: Batch) -> Tensor | None:
    """bool `[B, T]` of `attention_mask`, where there is one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.dim() != 2 else mask.bool()


@contextmanager
def inputs_seen(
    layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor | None], None]
) -> Iterator[Callable[[Batch], None]]:
    """A `with` in which `see(name, x, mask)` is called for each run of a layer; it gives what tells it the batch."""
    masks: list[Tensor | None] = [None]

    def told(batch: Batch) -> None:
        masks[0] = mask_of(batch)

    def hook(name: str) -> Callable:
        return lambda module, args, kwargs: see(name, args[0] if args else kwargs["input"], masks[0])

    hooks = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield told
    finally:
        for each in hooks:
            each.remove()
