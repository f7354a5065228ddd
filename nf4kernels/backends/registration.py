"""The ops' kernels for one dispatch key, settled when the first call comes."""

import threading
from collections.abc import Callable, Mapping

import torch

from ..ops import OPS


class Registration:
    """Who runs a namespace's ops for a dispatch key: what `implement` says, asked when the first call comes.

    `implement` gives the functions by op, or none where they registered themselves, or None: then the reference runs.
    If it raises, so does the call, and the next call asks again. Kernels are only ever added, never taken away: another
    thread may be in one. They live as long as this object.
    """

    def __init__(self, namespace: str, key: str, implement: Callable[[], Mapping[str, Callable] | None]) -> None:
        self._library = torch.library.Library(namespace, "IMPL")
        self._key, self._implement = key, implement
        self._lock = threading.Lock()
        self._has_kernels: bool | None = None

    def settle(self) -> bool:
        """Whether the key has kernels now; else the reference is to run."""
        if self._has_kernels is None:
            with self._lock:
                if self._has_kernels is None:
                    functions = self._implement()
                    for op, function in (functions or {}).items():
                        self._library.impl(op, function, self._key)
                    self._has_kernels = functions is not None
        return self._has_kernels


def stand_in(namespace: str, op: str, reference: Callable, registrations: Mapping[str, Registration]) -> Callable:
    """The op where no kernel is registered (yet): settles who runs it, and calls the op again or the reference."""

    def run(tensor, *arguments, **keywords):
        registration = registrations.get(tensor.device.type)
        if registration is None or not registration.settle():
            return reference(tensor, *arguments, **keywords)
        return getattr(getattr(torch.ops, namespace), op)(tensor, *arguments, **keywords)

    return run


def check_is_complete(functions: Mapping[str, Callable], backend: str) -> Mapping[str, Callable]:
    """`functions`, if there is one for every op: a missing one would call its own stand-in for ever."""
    missing = [op for op in OPS if op not in functions]
    if missing:
        raise RuntimeError(f"nf4kernels: the {backend} backend must have every op, and lacks {', '.join(missing)}")
    return functions
