"""Which configuration runs a product: a committed table for each architecture, `tuned/<architecture>.json`.

A choice depends on the op, a bucket of M, the dtype, K and the block size, never on N or the device's size: so
products with several weights at once have the bits of separate ones, and M does not recompile a kernel.
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
PATHS = ("fused", "panel")
INTERPRETED = "sm_80"  # whose table Triton's interpreter reads
OTHER = "sm_86"  # for devices without a table: that with the least shared memory

# fp32 and bf16 sums: at most 512 terms, or mma's of 16 terms each, in one run (DESIGN section 7).
LONGEST_FP32 = 512
LONGEST_DEPTH = 512 * 16
# Rows from which an odd shape's weight is better dequantized than decoded element by element for another tile of rows.
# Predicted, not measured.
ELEMENT_ROWS = 64


@dataclass(frozen=True)
class Config:
    """A program's share of a product, and how it is compiled.

    The columns are rows of W; linear_dgrad has those of a block of W instead.
    """

    columns: int
    rows: int  # of x or dY
    warps: int
    stages: int
    depth: int  # of the contraction that one program sums: a multiple of 64, at most LONGEST_DEPTH

    def __post_init__(self) -> None:
        if self.depth % 64 or not 0 < self.depth <= LONGEST_DEPTH:
            raise ValueError(f"nf4kernels: depth must be a multiple of 64 up to {LONGEST_DEPTH}, got {self.depth}")

    @property
    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


# For fp32, without tensor cores, and in 16 bits for rows whose weights are decoded one by one. Not tuned.
FP32 = Config(columns=32, rows=16, warps=4, stages=1, depth=LONGEST_DEPTH)
ELEMENTS = Config(columns=32, rows=16, warps=8, stages=1, depth=LONGEST_DEPTH)


@dataclass(frozen=True)
class Table:
    origin: str  # "predicted ..." or "measured ..."
    configs: dict[str, tuple[tuple[int, Config], ...]]  # op -> (most rows, config) ascending; the last takes any
    panel_from: dict[str, int]  # op -> least M that goes by panels

    def config(self, op: str, M: int) -> Config:
        buckets = self.configs[op]
        return next((config for most, config in buckets if most >= M), buckets[-1][1])

    def to_json(self) -> str:
        """One line a bucket."""
        lines = [f'  "origin": {json.dumps(self.origin)}', f'  "panel_from": {json.dumps(self.panel_from)}']
        for op, buckets in self.configs.items():
            rows = [json.dumps({"up_to": most} | vars(config)) for most, config in buckets]
            lines.append(f'  "{op}": [\n    ' + ",\n    ".join(rows) + "\n  ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Raises ValueError for what is no table."""
        data = json.loads(text)
        names = [f.name for f in fields(Config)]
        if set(data) != {"origin", "panel_from", *PRODUCTS} or set(data["panel_from"]) != set(PRODUCTS):
            raise ValueError(f"nf4kernels: a table must have origin, panel_from and {PRODUCTS}, got {list(data)}")
        configs = {
            op: tuple((row["up_to"], Config(**{name: row[name] for name in names})) for row in data[op])
            for op in PRODUCTS
        }
        for op, buckets in configs.items():
            limits = [most for most, _ in buckets]
            if not limits or limits != sorted(set(limits)):
                raise ValueError(f"nf4kernels: {op}'s rows must have ascending up_to, got {limits}")
        return cls(data["origin"], configs, data["panel_from"])


def architecture_of(device: torch.device) -> str:
    """As "sm_90" or "gfx942"; a CPU tensor is one of Triton's interpreter."""
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
    """Which path the 16-bit products take on a device by rows of x, and why; for people."""
    table = table_for(architecture_of(device))
    for op, least in table.panel_from.items():
        yield f"{op} bf16, fp16, up to {least - 1} rows: fused ({table.origin})"
        yield f"{op} bf16, fp16, more rows: panel ({table.origin})"


def is_whole(K: int, block_size: int) -> int:
    """How many consecutive weights of any row share a scale and whole bytes, 64 or 32; 0: fewer."""
    size = min(block_size, 64)
    return size if K % size == 0 else 32 if K % 32 == 0 else 0


_forced: dict = {"path": None, "config": None}


@contextmanager
def forcing(path: str | None = None, config: Config | None = None) -> Iterator[None]:
    """Run every 16-bit product inside a `with` block by this path ("fused" or "panel") and configuration.

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
    block: int  # of `is_whole`


def choose(op: str, M: int, K: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    block = is_whole(K, block_size)
    if dtype == torch.float32:
        if _forced["path"] == "panel":
            raise RuntimeError(f"nf4kernels.{op}: fp32 is multiplied in true fp32, not by panels")
        return Choice("fused", _forced["config"] or FP32, block)
    table = table_for(architecture_of(device))
    least = table.panel_from[op] if block else ELEMENT_ROWS + 1
    path = _forced["path"] or ("panel" if least <= M else "fused")
    return Choice(path, _forced["config"] or (table.config(op, M) if block else ELEMENTS), block)


def choose_for_experts(
    op: str, T: int, E: int, K: int, block_size: int, depth: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    """That of linear or its gradient for the experts' mean number of rows, fused."""
    if _forced["path"] == "panel":
        raise RuntimeError(f"nf4kernels.{op}: experts' products do not go by panels")
    choice = choose(op.removeprefix("grouped_"), -(-T // max(E, 1)), K, block_size, dtype, device)
    config = choice.config
    if _forced["config"] is None and dtype != torch.float32 and depth > LONGEST_DEPTH and config.rows >= 64:
        # The sum of runs takes registers too: 4 warps spill on sm_86 and gfx1100.
        config = replace(config, warps=max(config.warps, 8))
    return Choice("fused", config, choice.block)
