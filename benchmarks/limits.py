"""The machine's own limits, each measured in the run that asks for it, and the floor that they put under a time."""

import functools
from pathlib import Path

import torch

from .harness import alternate, is_disturbed, watch_others

L3_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@functools.cache
def cache_bytes() -> int:
    """What no cache holds: three times the L3, and 96 MiB at least."""
    l3 = int(L3_SIZE.read_text(encoding="utf-8").strip().removesuffix("K")) << 10 if L3_SIZE.exists() else 0
    return max(96 << 20, 3 * l3)


def floor_ms(nbytes: float, gb_s: float, flops: float = 0.0, gflop_s: float = 1.0) -> float:
    """The longer of moving `nbytes` and computing `flops`."""
    return max(nbytes / gb_s, flops / gflop_s) / 1e6


class Limits:
    """Rates with torch's present number of threads, measured where they are first asked for and then kept.

    Products are counted at the rate of dense ones in `dtype`: fp32 where the processor is to have no bf16 products.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def read_gb_s(self, nbytes: int) -> float:
        """The largest element of a buffer, over and over: from the cache that holds `nbytes`, or from memory."""
        return _read_gb_s(torch.get_num_threads(), nbytes)

    def copy_gb_s(self, nbytes: int) -> float:
        """Bytes read and written a second by `copy_` of half of `nbytes` into the other half."""
        return _copy_gb_s(torch.get_num_threads(), nbytes)

    def product_gflop_s(self) -> float:
        """A dense product, M = 512 and N = K = 4096."""
        return _product_gflop_s(torch.get_num_threads(), self.dtype)

    def product_ms(self, weight_bytes: int, flops: float, cache: str, passes: int = 1) -> float:
        """Floor of `passes` reads of the weight and `flops` operations."""
        read = self.read_gb_s(weight_bytes if cache == "in" else cache_bytes())
        return floor_ms(passes * weight_bytes, read, flops, self.product_gflop_s())

    def move_ms(self, nbytes: int, cache: str) -> float:
        """Floor of reading and writing `nbytes` together."""
        return floor_ms(nbytes, self.copy_gb_s(nbytes if cache == "in" else 2 * cache_bytes()))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"limits with {torch.get_num_threads()} threads: reading {self.read_gb_s(cache_bytes()):.1f} GB/s, copying "
            f"{self.copy_gb_s(2 * cache_bytes()):.1f} GB/s, dense {dtype} {self.product_gflop_s():.0f} GFLOP/s"
        )


def _undisturbed_ms(run) -> float:
    """The fastest of all rounds in 0.7 s: a limit that another process lowered would flatter us."""
    others = watch_others()
    fastest = min(alternate({"limit": run}, seconds=0.7, most=1000)["limit"])
    if is_disturbed(others()):
        print("DISTURBED: other processes were busy while a limit was measured; shares of floors with it are too high")
    return fastest


@functools.cache
def _read_gb_s(threads: int, nbytes: int) -> float:
    source = torch.randint(2**62, (nbytes // 8,))
    return nbytes / _undisturbed_ms(source.amax) / 1e6


@functools.cache
def _copy_gb_s(threads: int, nbytes: int) -> float:
    source = torch.randint(2**62, (nbytes // 16,))
    target = torch.empty_like(source)
    return nbytes / _undisturbed_ms(lambda: target.copy_(source)) / 1e6


@functools.cache
def _product_gflop_s(threads: int, dtype: torch.dtype) -> float:
    x, w = torch.randn(512, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    return 2 * 512 * 4096**2 / _undisturbed_ms(lambda: torch.nn.functional.linear(x, w)) / 1e6
