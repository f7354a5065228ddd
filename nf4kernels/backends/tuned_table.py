"""What was measured on a card, or predicted for an architecture: the one format of every such table, JSON.

A table has parameters, not shapes: the rows up to which each kernel runs and what fills the card, Triton's
configurations, and which backend takes an op. What it does not have stays as it was predicted.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields

import torch

from ..ops import OPS

FORMAT = 1
BACKENDS = ("native", "triton", "reference")
PRODUCTS = ("linear", "linear_dgrad")
CUDA_PRODUCTS = (*PRODUCTS, "grouped_linear", "grouped_linear_dgrad")
ANY_ROWS = 1 << 62
MOST_COST = 1000 * 1000
LONGEST_DEPTH = 512 * 16  # of one sum in 16 bits: 512 mma's of 16 terms each (docs/design.md, section 7)


class TableError(ValueError):
    """Text that is no table; the message goes on from the file's name: "must ..., got ..."."""


@dataclass(frozen=True)
class Config:
    """A Triton program's share of a product, and how it is compiled. BLOCK_K is given by K and the block size."""

    BLOCK_M: int  # rows of x or dY
    BLOCK_N: int  # rows of W: of y's tile in linear, of a step in linear_dgrad
    warps: int
    stages: int
    depth: int  # how much of the contraction one program sums: a multiple of 64, at most LONGEST_DEPTH

    def __post_init__(self) -> None:
        if self.depth % 64 or not 0 < self.depth <= LONGEST_DEPTH:
            raise ValueError(f"depth must be a multiple of 64 up to {LONGEST_DEPTH}, got {self.depth}")

    @property
    def launch(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tile:
    """A tile of a CUDA kernel, "MxNxK"; see csrc/cuda/tuning.h."""

    tile: str
    up_to: int = ANY_ROWS  # of experts: the most rows of each
    cost: int = 1000  # of one weight: thousandths of the time that is predicted, by which tiles are compared
    blocks: int = 1  # of one weight: that a multiprocessor is taken to hold


@dataclass(frozen=True)
class CudaOp:
    """What csrc/cuda/choose.h reads of an op. Rows are those of each weight."""

    small: int  # the most rows of small; 0: it never runs
    tiled: int  # the most rows of tiled; above it dequantize_gemm runs
    tiles: tuple[Tile, ...]  # ascending in rows; the last one takes any

    def numbers(self) -> list[int]:
        """As nf4kernels_cuda_tune takes them."""
        return [1, self.small, self.tiled, *(number for t in self.tiles for number in (t.up_to, t.cost, t.blocks))]


@dataclass(frozen=True)
class Rule:
    """Up to `rows` rows of an op's first argument, in this dtype, go to `backend`."""

    op: str
    dtype: str
    rows: int
    backend: str
    reason: str

    def __str__(self) -> str:
        rows = "any rows" if self.rows == ANY_ROWS else f"up to {self.rows} rows"
        return f"{self.op} {self.dtype}, {rows}: {self.backend} ({self.reason})"


@dataclass(frozen=True)
class Table:
    """One file. `card` is a device's name, or "" in what is predicted for all of an architecture."""

    architecture: str  # "sm_90", "gfx942"
    origin: str  # how it was measured or predicted; for people
    card: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # of what the measurement depends on
    cuda: Mapping[str, CudaOp] = field(default_factory=dict)  # op -> what was measured of it
    triton: Mapping[str, Mapping[int, Config]] = field(default_factory=dict)  # op -> most rows -> configuration
    dequantize_gemm_from: Mapping[str, int] = field(
        default_factory=dict
    )  # op -> least rows, of Triton; ANY_ROWS: never
    rules: tuple[Rule, ...] = ()  # fewest rows first

    def to_json(self) -> str:
        """A line for each row of each list."""
        cuda = {
            op: {
                "small": {"up_to": _most(own.small)},
                "tiled": {"up_to": _most(own.tiled)},
                "tiles": [_tile_row(op, tile) for tile in own.tiles],
            }
            for op, own in self.cuda.items()
        }
        triton = {
            op: [{"up_to": _most(most)} | vars(config) for most, config in buckets.items()]
            for op, buckets in self.triton.items()
        }
        rules = [
            {"op": r.op, "dtype": r.dtype, "up_to": _most(r.rows), "backend": r.backend, "why": r.reason}
            for r in self.rules
        ]
        parts = {
            "format": FORMAT, "card": self.card, "architecture": self.architecture, "origin": self.origin,
            "versions": dict(self.versions), "cuda": cuda, "triton": triton,
            "triton_dequantize_gemm_from": {op: _most(rows) for op, rows in self.dequantize_gemm_from.items()},
            "backends": rules,
        }  # fmt: skip
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {_lines(value, 1)}" for key, value in parts.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Raises TableError for text that is no table of this format."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TableError(f"must be JSON, got {error}") from None
        if not isinstance(data, dict) or not _is_int(data.get("format")):
            raise TableError("must be a table of nf4kernels, got another JSON")
        if data["format"] > FORMAT:
            raise TableError(f"must have format {FORMAT}, got {data['format']} of a newer nf4kernels")
        known = {"format", "card", "architecture", "origin", "versions", "cuda", "triton",
                 "triton_dequantize_gemm_from", "backends"}  # fmt: skip
        _object(data, known, "the table")
        versions = {name: _text(value, f"versions.{name}") for name, value in _entries(data["versions"], "versions")}
        cuda = {op: _cuda_op(op, own) for op, own in _entries(data["cuda"], "cuda", CUDA_PRODUCTS)}
        triton = {op: _configs(op, rows) for op, rows in _entries(data["triton"], "triton", PRODUCTS)}
        limits = "triton_dequantize_gemm_from"
        least = {op: _rows(value, f"{limits}.{op}") for op, value in _entries(data[limits], limits, PRODUCTS)}
        rules = sorted((_rule(row) for row in _list(data["backends"], "backends")), key=lambda rule: rule.rows)
        architecture, origin, card = (_text(data[name], name) for name in ("architecture", "origin", "card"))
        return cls(architecture, origin, card, versions, cuda, triton, least, tuple(rules))


def by_rules(op: str, rules: list[Rule], kernels: dict[str, Callable], default: str) -> Callable:
    """The op by the first rule that fits its first argument, else by the default backend."""
    own = [rule for rule in rules if rule.op == op]

    def run(tensor, *arguments, **keywords):
        dtype, rows = str(tensor.dtype).removeprefix("torch."), tensor.shape[:-1].numel()
        fitting = (rule.backend for rule in own if rule.dtype == dtype and rows <= rule.rows)
        return kernels[next(fitting, default)](tensor, *arguments, **keywords)

    return run


def _most(rows: int) -> int | None:
    return None if rows >= ANY_ROWS else rows


def _lines(value, depth: int) -> str:
    """Objects of lists and lists of objects a line each; what is in them on that line."""
    inside, outside = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, list) and value:
        return "[" + ",".join(inside + json.dumps(row) for row in value) + outside + "]"
    if isinstance(value, dict) and any(isinstance(part, (dict, list)) for part in value.values()):
        rows = (f"{inside}{json.dumps(key)}: {_lines(part, depth + 1)}" for key, part in value.items())
        return "{" + ",".join(rows) + outside + "}"
    return json.dumps(value)


def _tile_row(op: str, tile: Tile) -> dict:
    if op.startswith("grouped_"):
        return {"tile": tile.tile, "up_to": _most(tile.up_to)}
    return {"tile": tile.tile, "cost": tile.cost, "blocks": tile.blocks}


def _cuda_op(op: str, data) -> CudaOp:
    where = f"cuda.{op}"
    own = _object(data, {"small", "tiled", "tiles"}, where)
    small, tiled = (_object(own[kernel], {"up_to"}, f"{where}.{kernel}")["up_to"] for kernel in ("small", "tiled"))
    tiles = []
    for row in _list(own["tiles"], f"{where}.tiles"):
        if op.startswith("grouped_"):
            _object(row, {"tile", "up_to"}, f"{where}.tiles")
            tiles.append(Tile(_text(row["tile"], where), _rows(row["up_to"], where)))
        else:
            _object(row, {"tile", "cost", "blocks"}, f"{where}.tiles")
            cost, blocks = _count(row["cost"], f"{where}.tiles.cost", MOST_COST), _count(row["blocks"], where)
            tiles.append(Tile(_text(row["tile"], where), cost=cost, blocks=blocks))
    up_to = [tile.up_to for tile in tiles]
    if not tiles or up_to != sorted(up_to) or len({tile.tile for tile in tiles}) != len(tiles):
        raise TableError(f"must have different tiles with ascending up_to in {where}, got {own['tiles']}")
    return CudaOp(_rows(small, where), _rows(tiled, where), tuple(tiles))


def _configs(op: str, data) -> dict[int, Config]:
    names, found = [f.name for f in fields(Config)], {}
    for row in _list(data, f"triton.{op}"):
        _object(row, {"up_to", *names}, f"triton.{op}")
        sizes = {name: _count(row[name], f"triton.{op}.{name}", 1 << 16) for name in names}
        if any(sizes[name] & (sizes[name] - 1) for name in ("BLOCK_M", "BLOCK_N", "warps")):
            raise TableError(f"must have powers of two in triton.{op}, got {sizes}")
        try:
            found[_rows(row["up_to"], f"triton.{op}")] = Config(**sizes)
        except ValueError as error:
            raise TableError(f"must have configurations that run in triton.{op}, got one whose {error}") from None
    if not found or list(found) != sorted(found) or len(found) != len(data):
        raise TableError(f"must have ascending up_to in triton.{op}, got {list(found)}")
    return found


def _rule(row) -> Rule:
    _object(row, {"op", "dtype", "up_to", "backend", "why"}, "backends")
    op, dtype, backend, why = (_text(row[name], f"backends.{name}") for name in ("op", "dtype", "backend", "why"))
    if op not in OPS or backend not in BACKENDS or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise TableError(f"must have ops, dtypes and backends of ours, got {row}")
    return Rule(op, dtype, _rows(row["up_to"], "backends"), backend, why)


def _object(data, keys: set[str], where: str) -> dict:
    if not isinstance(data, dict) or set(data) != keys:
        found = sorted(data) if isinstance(data, dict) else data
        raise TableError(f"must have {', '.join(sorted(keys))} in {where}, got {str(found)[:200]}")
    return data


def _entries(data, where: str, known: Collection[str] | None = None):
    if not isinstance(data, dict) or (known is not None and not set(data) <= set(known)):
        raise TableError(f"must have an object of {', '.join(known or ('texts',))} in {where}, got {str(data)[:200]}")
    return data.items()


def _list(data, where: str) -> list:
    if not isinstance(data, list):
        raise TableError(f"must have a list in {where}, got {str(data)[:200]}")
    return data


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise TableError(f"must have a text in {where}, got {str(value)[:200]}")
    return value


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rows(value, where: str) -> int:
    """A number of rows; null: any."""
    if value is not None and not (_is_int(value) and 0 <= value < ANY_ROWS):
        raise TableError(f"must have a number of rows or null in {where}, got {str(value)[:200]}")
    return ANY_ROWS if value is None else value


def _count(value, where: str, most: int = 32) -> int:
    if not _is_int(value) or not 0 < value <= most:
        raise TableError(f"must have a number from 1 to {most} in {where}, got {str(value)[:200]}")
    return value
