"""Where tests call the Triton ops: on CPU tensors under Triton's interpreter, or on a GPU."""

import functools
import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch


@dataclass(frozen=True)
class TritonOps:
    ops: SimpleNamespace  # as torch.ops.nf4kernels
    backend: object  # nf4kernels.backends.triton
    device: str

    def move(self, arguments: tuple) -> list:
        """An op's arguments with their tensors on the device."""
        return [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]

    def running(self, path: str | None, config=None) -> AbstractContextManager:
        """Every 16-bit product by this path, fused or dequantize_gemm, and this configuration."""
        return self.backend.choose.forcing(path, config)

    def buckets(self, op: str) -> list:
        """(rows that a bucket begins at, its configuration) of the table that is in use here."""
        choose = self.backend.choose
        limits = choose.table_for(choose.architecture_of(torch.device(self.device, 0))).configs[op]
        return [(before + 1, config) for before, (_, config) in zip([0, *(most for most, _ in limits)], limits)]


@functools.cache
def load(device: str) -> TritonOps:
    """Imports Triton and the backend, which must not come with the tests' collection."""
    pytest.importorskip("triton", reason="Triton is not installed: its backend is not tested")
    if device == "cpu":
        importlib.import_module("support.triton_interpreter").correct()
    backend = importlib.import_module("nf4kernels.backends.triton")
    importlib.import_module("nf4kernels.backends.triton.choose")
    return TritonOps(SimpleNamespace(**backend.OPS), backend, device)


class LaunchRecorder:
    """Stands in for a kernel: keeps each launch's grid and keyword arguments, and runs nothing."""

    def __init__(self) -> None:
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, options))
