"""The Triton ops, on CPU tensors under Triton's interpreter or on a GPU, and a stand-in for a kernel."""

import functools
import importlib
from types import SimpleNamespace

import pytest
from support.ways import TritonWay


@functools.cache
def load(device: str) -> TritonWay:
    """Imports Triton and the backend, which must not come with the tests' collection."""
    pytest.importorskip("triton", reason="Triton is not installed: its backend is not tested")
    launched = None
    if device == "cpu":
        interpreter = importlib.import_module("support.triton_interpreter")
        interpreter.correct()
        launched = interpreter.LAUNCHED
    backend = importlib.import_module("nf4kernels.backends.triton")
    importlib.import_module("nf4kernels.backends.triton.choose")
    name = "interpreter" if device == "cpu" else "triton"
    return TritonWay(name, SimpleNamespace(**backend.OPS), device, backend=backend, launched=launched)


class LaunchRecorder:
    """Stands in for a kernel: keeps each launch's grid and keyword arguments, and runs nothing."""

    def __init__(self) -> None:
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, options))
