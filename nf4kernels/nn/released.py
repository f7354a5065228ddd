"""Parameters that DeepSpeed's ZeRO-3 has released: empty until it gathers them, told by the marks that it leaves."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

GATHER = "with deepspeed.zero.GatheredParameters(parameters)"


def is_released(tensor: Tensor | None) -> bool:
    """Whether only this rank's part of the tensor is here, beside it and not in it."""
    marked: Any = tensor
    return getattr(marked, "ds_tensor", None) is not None and marked.numel() != marked.ds_numel


def check_gathered(tensors: Iterable[tuple[str, Tensor | None]], who: str) -> None:
    """ValueError where one of the (name, tensor) is released."""
    for name, tensor in tensors:
        if is_released(tensor):
            raise ValueError(
                f"{who}: {name} must be whole, got it released by DeepSpeed's ZeRO-3: gather it first, on every rank"
                f" ({GATHER})"
            )
