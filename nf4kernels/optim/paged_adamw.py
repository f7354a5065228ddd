"""AdamW whose state may leave the device."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..nn.dtensors import local_of
from .managed_memory import managed_memory

DEVICES = ("cpu", "cuda", "meta")


class PagedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, its arguments and its bits, with the state in CUDA managed memory.

    exp_avg, exp_avg_sq, max_exp_avg_sq of `amsgrad`, and step where torch has it on the device (`fused`, `capturable`)
    are in memory whose pages the driver moves to the host while something else needs the room, a long batch say, where
    AdamW would be out of memory. Each step brings them back first, in order with the current stream. They have their
    parameter's dtype, as in AdamW. Parameters on the CPU have an ordinary state there; of DTensors the local part is
    paged. State dicts are AdamW's: each loads the other's.

    What the device has free is checked before the first step makes the state, and before a state is loaded.

    Raises:
        ValueError: a parameter is on another device than the CPU and CUDA's.
        torch.OutOfMemoryError: the state is larger than what the device has free; nothing is changed.
        RuntimeError: there is no compiled CUDA library, or the GPU's managed memory does not move while it runs.

    Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3, paged optimizers.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.device.type not in DEVICES:
                self.param_groups.pop()
                raise ValueError(
                    f"nf4kernels.optim.PagedAdamW: params must be on a CUDA device or the CPU, got {param.device}"
                )

    def _init_group(self, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """torch's, which makes the state of parameters that have none, and lists all that the step reads and writes."""
        missing = [
            (param, each)
            for each in self.param_groups
            for param in each["params"]
            if param.grad is not None and not self.state.get(param)
        ]
        needed: Counter[int] = Counter()
        for param, each in missing:
            needed[_device(param)] += (2 + bool(each["amsgrad"])) * local_of(param).nbytes
        _check_room(needed)
        made = [param for param, each in missing if each is group]
        with _allocating(map(_device, made)):
            found = super()._init_group(group, *args, **kwargs)
        self._check_is_managed(made)
        _prefetch(tensor for param in group["params"] for tensor in _tensors(self.state.get(param)))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        needed: Counter[int] = Counter()
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for param, key in zip(group["params"], saved["params"]):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and name != "step":
                        needed[_device(param)] += local_of(value).numel() * param.element_size()
        _check_room(needed)
        with _allocating(needed):
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a copy or an unpickled optimizer: what is on the device in torch's own memory is moved over."""
        super().__setstate__(state)
        outside = [
            (own, name)
            for own in self.state.values()
            for name, value in own.items()
            if isinstance(value, Tensor) and not _is_managed(value)
        ]
        needed: Counter[int] = Counter()
        for own, name in outside:
            needed[_device(own[name])] += local_of(own[name]).nbytes
        _check_room(needed)
        with _allocating(needed):
            for own, name in outside:
                own[name] = own[name].clone()

    def _check_is_managed(self, params: list[Tensor]) -> None:
        if all(_is_managed(tensor) for param in params for tensor in _tensors(self.state[param])):
            return
        for param in params:
            self.state.pop(param)
        raise RuntimeError(
            "nf4kernels.optim.PagedAdamW: torch must allocate the state from its pool, and did not: unset"
            " PYTORCH_NO_CUDA_MEMORY_CACHING, and expandable_segments in PYTORCH_ALLOC_CONF"
        )


def _check_room(needed: Mapping[int, int]) -> None:
    """By the number of the device, of which -1 is the CPU: bytes that it must have free."""
    for device, nbytes in needed.items():
        if device >= 0:
            managed_memory(device).check_room(nbytes)


@contextmanager
def _allocating(devices: Iterable[int]) -> Iterator[None]:
    """What is allocated inside on these devices is managed."""
    with ExitStack() as stack:
        for device in set(devices):
            if device >= 0:
                stack.enter_context(managed_memory(device).allocating())
        yield


def _prefetch(tensors: Iterable[Tensor]) -> None:
    pointers: dict[int, list[int]] = {}
    for tensor in tensors:
        device = _device(tensor)
        if device >= 0 and tensor.numel():
            pointers.setdefault(device, []).append(local_of(tensor).data_ptr())
    for device, own in pointers.items():
        managed_memory(device).prefetch(own)


def _tensors(state: dict[str, Any] | None) -> list[Tensor]:
    return [value for value in (state or {}).values() if isinstance(value, Tensor)]


def _device(tensor: Tensor) -> int:
    """The number of its CUDA device, -1 for what is not paged."""
    return tensor.device.index if tensor.device.type == "cuda" else -1


def _is_managed(tensor: Tensor) -> bool:
    device = _device(tensor)
    return device < 0 or local_of(tensor).numel() == 0 or managed_memory(device).holds(local_of(tensor).data_ptr())
