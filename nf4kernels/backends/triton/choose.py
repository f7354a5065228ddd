"""Which configuration runs a product: a committed table for each architecture, `tuned/<architecture>.json`.

A choice depends on the op, a bucket of M, the dtype, K and the block size, never on the size of the device, so that
every device of an architecture gives the same bits, and M does not recompile a kernel.
`python -m benchmarks.gpu.tune_triton` measures and writes a table; one whose "origin" says predicted was not measured.
"""

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import triton

TABLES = Path(__file__).parent / "tuned"
PRODUCTS = ("linear", "linear_dgrad")
PATHS = ("fused", "dequantize_gemm")
INTERPRETED = "sm_80"  # whose table Triton's interpreter reads
OTHER = "sm_86"  # the table for devices without one: that with the least shared memory

# The most terms of one sum, in fp32 and in 16 bits: 512, or 512 mma's of 16 terms each (docs/design.md, section 7).
LONGEST_FP32 = 512
LONGEST_DEPTH = 512 * 16
# The largest M at which an odd shape's weights are decoded one by one; above it dequantize + GEMM is faster. Predicted,
# not measured.
ELEMENTS_M = 64


@dataclass(frozen=True)
class Config:
    """A program's share of a product, and how it is compiled. BLOCK_K is in Choice: K and the block size give it."""

    BLOCK_M: int  # rows of x or dY
    BLOCK_N: int  # rows of W: of y's tile in linear, of a step in linear_dgrad
    warps: int
    stages: int
    depth: int  # how much of the contraction one program sums: a multiple of 64, at most LONGEST_DEPTH

    def __post_init__(self) -> None:
        if self.depth % 64 or not 0 < self.depth <= LONGEST_DEPTH:
            raise ValueError(f"nf4kernels: depth must be a multiple of 64 up to {LONGEST_DEPTH}, got {self.depth}")

    @property
    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


# For fp32, without tensor cores, and for 16 bits where weights are decoded one by one. Not tuned.
FP32 = Config(BLOCK_M=16, BLOCK_N=32, warps=4, stages=1, depth=LONGEST_DEPTH)
ELEMENTS = Config(BLOCK_M=16, BLOCK_N=32, warps=8, stages=1, depth=LONGEST_DEPTH)
ELEMENTS_BLOCK_K = 32


@dataclass(frozen=True)
class Table:
    origin: str  # "predicted ..." or "measured ..."
    configs: dict[str, tuple[tuple[int, Config], ...]]  # op -> (largest M, config) ascending; the last takes any M
    dequantize_gemm_from: dict[str, int]  # op -> the least M for which dequantize + GEMM is faster

    def config(self, op: str, M: int) -> Config:
        buckets = self.configs[op]
        return next((config for most, config in buckets if most >= M), buckets[-1][1])

    def to_json(self) -> str:
        """One line a bucket."""
        lines = [
            f'  "origin": {json.dumps(self.origin)}',
            f'  "dequantize_gemm_from": {json.dumps(self.dequantize_gemm_from)}',
        ]
        for op, buckets in self.configs.items():
            rows = [json.dumps({"up_to": most} | vars(config)) for most, config in buckets]
            lines.append(f'  "{op}": [\n    ' + ",\n    ".join(rows) + "\n  ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Raises ValueError for text that is no table."""
        data = json.loads(text)
        names = [f.name for f in fields(Config)]
        limits = "dequantize_gemm_from"
        if set(data) != {"origin", limits, *PRODUCTS} or set(data[limits]) != set(PRODUCTS):
            raise ValueError(f"nf4kernels: a table must have origin, {limits} and {PRODUCTS}, got {list(data)}")
        configs = {
            op: tuple((row["up_to"], Config(**{name: row[name] for name in names})) for row in data[op])
            for op in PRODUCTS
        }
        for op, buckets in configs.items():
            up_to = [most for most, _ in buckets]
            if not up_to or up_to != sorted(set(up_to)):
                raise ValueError(f"nf4kernels: {op}'s rows must have ascending up_to, got {up_to}")
        return cls(data["origin"], configs, data[limits])


def architecture_of(device: torch.device) -> str:
    """Like "sm_90" or "gfx942"; the interpreter's for a CPU device."""
    if device.type == "cpu":
        return INTERPRETED
    index = device.index if device.index is not None else torch.get_device_module(device).current_device()
    return _architecture_of(device.type, index)


@functools.cache
def _architecture_of(device_type: str, index: int) -> str:
    with torch.get_device_module(device_type).device(index):
        target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def known_architecture(architecture: str, known: frozenset[str]) -> str:
    """The table that this architecture reads: its own, else the next older one of NVIDIA's, AMD's family, or OTHER."""
    if architecture in known:
        return architecture
    if match := re.fullmatch(r"sm_(\d+)", architecture):
        older = [int(name[3:]) for name in known if name.startswith("sm_") and int(name[3:]) <= int(match[1])]
        return f"sm_{max(older)}" if older else OTHER
    family = [name for name in sorted(known) if architecture.startswith("gfx") and name[:4] == architecture[:4]]
    return family[-1] if family else OTHER


@functools.cache
def table_for(architecture: str) -> Table:
    known = frozenset(path.stem for path in TABLES.glob("*.json"))
    return Table.from_json((TABLES / f"{known_architecture(architecture, known)}.json").read_text())


def kernel_lines(device: torch.device) -> Iterator[str]:
    """Which path the 16-bit products take on a device by M, and why; for people."""
    table = table_for(architecture_of(device))
    for op, least in table.dequantize_gemm_from.items():
        yield f"{op} bf16, fp16, up to {least - 1} rows: fused ({table.origin})"
        yield f"{op} bf16, fp16, more rows: dequantize_gemm ({table.origin})"


def whole_step(K: int, block_size: int) -> tuple[int, int]:
    """(weights, their scales) of a step along a row, that is of whole blocks or within one: 64 or 32; (0, 0): fewer."""
    step = 64 if K % 64 == 0 else 32 if K % 32 == 0 else 0
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
    table = table_for(architecture_of(device))
    least = table.dequantize_gemm_from[op] if scales else ELEMENTS_M + 1
    path = _forced["path"] or ("dequantize_gemm" if least <= M else "fused")
    return Choice(path, _forced["config"] or (table.config(op, M) if scales else ELEMENTS), BLOCK_K, scales)


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
