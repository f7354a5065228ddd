"""The ops' kernels for one dispatch key, settled when the first call comes."""

import functools
import threading
from collections.abc import Callable, Mapping

import torch

from ..ops import OPS


class Registration:
    """Until the first call, or `settle`, a stand-in takes the calls; then what `implement` gives.

    `implement` is called once. It returns the functions to register by op, or none where they registered themselves.
    If it raises, so does the call, and the next call asks again: no other kernel runs instead. Registrations live as
    long as this object.
    """

    def __init__(self, namespace: str, key: str, implement: Callable[[], Mapping[str, Callable]]) -> None:
        self._namespace, self._key, self._implement = namespace, key, implement
        self._lock = threading.Lock()
        self._settled = False
        self._register({op: functools.partial(self._first_call, op) for op in OPS})

    def settle(self) -> None:
        with self._lock:
            if self._settled:
                return
            self._library._destroy()  # a kernel registered over another one makes torch warn
            try:
                self._register(self._implement())
            except BaseException:
                self._register({op: functools.partial(self._first_call, op) for op in OPS})
                raise
            self._settled = True

    def _first_call(self, op: str, *arguments, **keywords):
        self.settle()
        return getattr(getattr(torch.ops, self._namespace), op)(*arguments, **keywords)

    def _register(self, functions: Mapping[str, Callable]) -> None:
        self._library = torch.library.Library(self._namespace, "IMPL")
        for op, function in functions.items():
            self._library.impl(op, function, self._key)
