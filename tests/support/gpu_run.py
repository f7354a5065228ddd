"""A benchmark of a GPU without one: on the CPU, by the CPU's clock, with kernels that are forced in name only."""

import time
from contextlib import contextmanager

import torch

from benchmarks.gpu import timing


class Cpu:
    """What benchmarks.gpu.timing.Cuda is, for the CPU; each sample is one call."""

    device = torch.device("cpu")
    name, arch, capability, sms, ghz, is_hbm = "A Test GPU", "sm_90a", 90, 132, 1.7, True
    cache_bytes, copy_bytes, gemm_size = 20_000, 1 << 16, 64

    def sampler(self, run, copies, graph=True):
        run()

        def sample() -> float:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3

        return sample

    forgotten = 0

    def forget_graphs(self) -> None:
        self.forgotten += 1

    def temporary_mib(self, run) -> float:
        return 0.0

    def between_shapes(self) -> None:
        pass


class Force:
    """Records which kernel was forced while something ran."""

    def __init__(self, refuses: tuple[str, ...] = ()) -> None:
        self.now, self.seen, self.refuses = None, set(), refuses

    @contextmanager
    def __call__(self, kernel: str, tile: int = -1, splits: int = 0):
        if kernel in self.refuses:
            raise RuntimeError(f"the forced kernel {kernel} cannot run this: too many rows")
        self.now = kernel
        self.seen.add(kernel)
        yield
        self.now = None


def new_run(seconds: float = 1000.0, **settings) -> timing.Run:
    return timing.Run(Cpu(), settings.pop("force", Force()), time.perf_counter() + seconds, 0.0, **settings)
