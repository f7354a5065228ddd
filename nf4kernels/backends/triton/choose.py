"""Which configuration runs a product.

A table for each architecture, ../tuned/<architecture>.json, is predicted; what was measured on the card takes the place
of its rows (../tuned_files.py). A choice depends on the op, a bucket of M, the dtype, K and the block size, never on
the size of the device, so that M does not recompile a kernel. Devices that have the same tables give the same bits.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import triton
from triton.runtime.errors import TritonError

from ..tuned_files import PREDICTED, Found, card_of, measured_table, predicted_table
from ..tuned_table import ANY_ROWS, LONGEST_DEPTH, PRODUCTS, Config

PATHS = ("fused", "dequantize_gemm")
REFUSALS = (TritonError, triton.CompilationError)  # of a configuration that the device or the compiler cannot take
INTERPRETED = "sm_80"  # whose table Triton's interpreter reads
LONGEST_FP32 = 512  # the most terms of one sum in fp32 (docs/design.md, section 7); in 16 bits LONGEST_DEPTH
# The largest M at which an odd shape's weights are decoded one by one; above it dequantize + GEMM is faster. Predicted,
# not measured.
ELEMENTS_M = 64

# For fp32, without tensor cores, and for 16 bits where weights are decoded one by one. Not tuned.
FP32 = Config(BLOCK_M=16, BLOCK_N=32, warps=4, stages=1, depth=LONGEST_DEPTH)
ELEMENTS = Config(BLOCK_M=16, BLOCK_N=32, warps=8, stages=1, depth=LONGEST_DEPTH)
ELEMENTS_BLOCK_K = 32
LONG_STEP = 128  # linear's, along K, for few rows: what a step costs beside decoding is spread over more weights


@dataclass(frozen=True)
class Table:
    """What the products of a device run by: predicted rows, and measured ones in their place."""

    configs: dict[str, tuple[tuple[int, Config], ...]]  # op -> (largest M, config) ascending; the last takes any M
    dequantize_gemm_from: dict[str, int]  # op -> the least M for which dequantize + GEMM is faster
    why: dict[str, str]  # op -> where dequantize_gemm_from is from
    measured: dict[str, tuple[int, ...]]  # op -> the largest M of the configurations that were measured
    source: str  # of these: how they are known

    def config(self, op: str, M: int) -> Config:
        buckets = self.configs[op]
        return next((config for most, config in buckets if most >= M), buckets[-1][1])


def table_for(architecture: str, found: Found | None = None) -> Table:
    """The predicted table of an architecture ("sm_90"), with the rows of a measured one in it."""
    predicted = predicted_table(architecture)
    measured = found.table if found is not None else None
    source = f"{found.source}, {measured.origin}" if measured is not None and found is not None else PREDICTED
    configs, least, why, rows = {}, {}, {}, {}
    for op in PRODUCTS:
        own = measured.triton.get(op, {}) if measured is not None else {}
        configs[op] = tuple((most, own.get(most, config)) for most, config in predicted.triton[op].items())
        rows[op] = tuple(most for most in predicted.triton[op] if most in own)
        least[op], why[op] = predicted.dequantize_gemm_from[op], predicted.origin
        if measured is not None and op in measured.dequantize_gemm_from:
            least[op], why[op] = measured.dequantize_gemm_from[op], source
    return Table(configs, least, why, rows, source)


def architecture_of(device: torch.device) -> str:
    """Like "sm_90" or "gfx942"; the interpreter's for a CPU device."""
    return INTERPRETED if device.type == "cpu" else _architecture_of(device.type, _index_of(device))


def _index_of(device: torch.device) -> int:
    return device.index if device.index is not None else torch.get_device_module(device).current_device()


@functools.cache
def _architecture_of(device_type: str, index: int) -> str:
    with torch.get_device_module(device_type).device(index):
        target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def table_on(device: torch.device) -> Table:
    """The table that a device's products run by; read once in a process."""
    return _table_on(device.type, 0 if device.type == "cpu" else _index_of(device))


@functools.cache
def _table_on(device_type: str, index: int) -> Table:
    device = torch.device(device_type, index)
    found = None if device_type == "cpu" else measured_table(card_of(device_type, index))
    return table_for(architecture_of(device), found)


def kernel_lines(device: torch.device) -> Iterator[str]:
    """Which path the 16-bit products take on a device by M, by which configurations, and why; for people."""
    table = table_on(device)
    for op, least in table.dequantize_gemm_from.items():
        if least < ANY_ROWS:
            yield f"{op} bf16, fp16, up to {least - 1} rows: fused ({table.why[op]})"
            yield f"{op} bf16, fp16, more rows: dequantize_gemm ({table.why[op]})"
        else:
            yield f"{op} bf16, fp16, any rows: fused ({table.why[op]})"
        if table.measured[op]:
            rows = ", ".join(map(str, table.measured[op]))
            yield f"{op}, configurations up to {rows} rows: {table.source}; others: {PREDICTED}"


def whole_step(K: int, block_size: int, longest: int = 64) -> tuple[int, int]:
    """(weights, their scales) of a step along a row, that is of whole blocks or within one: `longest`, 64 or 32;
    (0, 0): fewer."""
    step = next((step for step in (longest, 64, 32) if K % step == 0), 0)
    return (step, max(step // block_size, 1)) if step else (0, 0)


_forced: dict = {"path": None, "config": None}


@contextmanager
def forcing(path: str | None = None, config: Config | None = None) -> Iterator[None]:
    """Run every 16-bit product inside a `with` block by this path (of PATHS) and configuration.

    Raises ValueError for an unknown path; a product that cannot run so is a RuntimeError.
    """
    if path not in (None, *PATHS):
        raise ValueError(f"nf4kernels: a path must be one of {PATHS}, got {path!r}")
    before = dict(_forced)
    _forced.update(path=path, config=config)
    try:
        yield
    finally:
        _forced.update(before)


@dataclass(frozen=True)
class Choice:
    path: str
    config: Config
    BLOCK_K: int
    scales: int  # of a step of BLOCK_K in a row; 0: rows are not whole steps, and weights are decoded one by one


def choose(op: str, M: int, K: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    step, scales = whole_step(K, block_size)
    BLOCK_K = step or ELEMENTS_BLOCK_K
    if dtype == torch.float32:
        if _forced["path"] == "dequantize_gemm":
            raise RuntimeError(f"nf4kernels.{op}: fp32 is multiplied in true fp32, not by dequantize_gemm")
        return Choice("fused", _forced["config"] or FP32, BLOCK_K, scales)
    table = table_on(device)
    least = table.dequantize_gemm_from[op] if scales else ELEMENTS_M + 1
    path = _forced["path"] or ("dequantize_gemm" if least <= M else "fused")
    config = _forced["config"] or (table.config(op, M) if scales else ELEMENTS)
    if op == "linear" and config.BLOCK_M <= 16 and config.depth % LONG_STEP == 0:
        step, scales = whole_step(K, block_size, LONG_STEP)
    return Choice(path, config, step or ELEMENTS_BLOCK_K, scales)


def choose_for_experts(
    op: str, T: int, E: int, K: int, block_size: int, depth: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    """The fused choice of linear or linear_dgrad for the experts' mean M."""
    if _forced["path"] == "dequantize_gemm":
        raise RuntimeError(f"nf4kernels.{op}: experts' products have no dequantize_gemm")
    choice = choose(op.removeprefix("grouped_"), -(-T // max(E, 1)), K, block_size, dtype, device)
    config = choice.config
    if dtype == torch.float32:
        is_large = op == "grouped_linear_dgrad"
    else:
        is_large = depth > LONGEST_DEPTH and config.BLOCK_M >= 64
    if _forced["config"] is None and is_large:
        # The sum of runs needs registers as well: with 4 warps it spills on sm_86 and gfx1100, in fp32 on sm_120.
        config = replace(config, warps=max(config.warps, 8))
    return replace(choice, path="fused", config=config)
