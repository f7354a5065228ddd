"""The GPU as the benchmarks see it: how a side is timed there, and what a table must say about it."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

SAMPLE_MS = 2.0


class Cuda:
    """The first CUDA device; a sample is a CUDA graph of as many calls as take about SAMPLE_MS."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        p = torch.cuda.get_device_properties(0)
        self.name, self.cache_bytes = p.name, p.L2_cache_size
        self.arch = f"sm_{p.major}{p.minor}{'a' if p.major == 9 else ''}"
        self.sms, self.ghz = p.multi_processor_count, getattr(p, "clock_rate", 0) / 1e6
        self.is_hbm = getattr(p, "memory_bus_width", 4096) > 512
        self.copy_bytes, self.gemm_size = 2 << 30, 8192

    def sampler(self, run: Callable[[], object], copies: int, graph: bool = True) -> Callable[[], float]:
        """A function that times `run` in ms a call, captured in a graph or call by call."""
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        took = (time.perf_counter() - start) * 1e3
        # a short call's eager time is mostly the launch; its graph takes every copy once at least
        calls = max(1, round(SAMPLE_MS / took), copies if took < 0.2 else 1)
        repeated = self._captured(run, calls) if graph else lambda: [run() for _ in range(calls)]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            begin.record()
            repeated()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / calls

        sample()
        return sample

    def _captured(self, run: Callable[[], object], calls: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return graph.replay

    def temporary_mib(self, run: Callable[[], Tensor]) -> float:
        """What a call takes from torch's allocator at most, its result apart."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return (torch.cuda.max_memory_allocated() - before - result.nbytes) / 2**20

    def between_shapes(self) -> None:
        torch.cuda.empty_cache()
