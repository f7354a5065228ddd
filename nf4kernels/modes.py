"""What of torch's modes is on: autocast, inference mode, transforms of torch.func, derivatives of derivatives."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_transforms_are_active = torch._C._are_functorch_transforms_active
_P = ParamSpec("_P")
_R = TypeVar("_R")


def autocast_is_on(device: torch.device) -> bool:
    device_type = device.type
    is_on: bool = device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch raises for meta
    return is_on


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A `with` in which products of fp32 are in fp32, whatever is on around it."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def outside_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """For what makes tensors that training is to go through: autograd refuses those that inference mode made."""

    @functools.wraps(function)
    def normal(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return normal


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD or a transform of torch.func is at work on one of the tensors."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    return _transforms_are_active() and any(_is_wrapped(tensor) for tensor in tensors if tensor is not None)


def is_differentiated_again() -> bool:
    """Whether a backward that is running is itself recorded; never in what torch.compile traces."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
