"""Files of examples, read and split into those to train on and those held out."""

import codecs
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, Json, List, Value
from PIL.Image import DecompressionBombError
from PIL.Image import open as open_image

from ..errors import StageError, first_line
from .examples import ExampleError, example

LONGEST_LINE = 1_000_000  # bytes: beyond it a file is no list of examples, one a line
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Source:
    """A file of examples, and how often an epoch sees each: 2 is twice, 0.5 half of them, drawn by the seed."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Split:
    """Examples to train on and held-out ones, in TRL's columns; `form` is text, prompt or messages."""

    train: Dataset
    held_out: Dataset
    form: str
    digest: str  # of the examples on each side, in order

    @property
    def has_images(self) -> bool:
        return "images" in self.train.column_names


@dataclass(frozen=True)
class Example:
    """One example of a file, or what is wrong at its place."""

    where: str
    form: str = ""
    row: dict[str, Any] | None = None
    problem: str = ""

    @property
    def shape(self) -> str:
        """What all examples must have in common: their form, and whether a prompt is text or the turns of a chat."""
        row = self.row or {}
        is_chat = self.form == "prompt" and isinstance(row.get("prompt"), list)
        return ("prompt of turns" if is_chat else self.form) + (" with images" if "images" in row else "")


def read(sources: Sequence[Source], held_out: float | int = 0.1, seed: int = 0) -> Split:
    """All examples of `sources` in one form, in order, split by `seed`.

    `held_out` is a share below 1, or a number of examples, of the distinct ones: an example that stands several times,
    in one file or in several, is on one side alone. 0 holds none out.

    Raises:
        StageError: a source is not there or holds no examples, one of them is broken (the message names its line), two
            have different forms, or nothing is left to train on.
    """
    if held_out < 0 or (held_out >= 1 and held_out != int(held_out)):
        raise StageError(f"held_out must be a share below 1 or a number of examples, got {held_out}")
    drawn: list[tuple[str, dict[str, Any]]] = []
    distinct: dict[str, dict[str, Any]] = {}
    first: Example | None = None
    draw = random.Random(seed)
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise StageError(f"the weight of {source.path} must be above 0, got {source.weight}")
        rows: list[tuple[str, dict[str, Any]]] = []
        for found in walk(source.path):
            if found.row is None:
                raise StageError(f"{found.where}: {found.problem}")
            first = first or found
            if found.shape != first.shape:
                raise StageError(f"{found.where}: {other_shape(found, first)}")
            rows.append((identity(found.row), found.row))
            distinct.setdefault(*rows[-1])
        if not rows:
            raise StageError(f"{source.path} must hold examples, got none")
        drawn += _weighted(rows, source.weight, draw)
    if first is None:
        raise StageError("there must be a file of examples, got none")
    share = max(1, round(held_out * len(distinct))) if held_out else 0
    count = int(held_out) if held_out >= 1 else share
    if count >= len(distinct):
        raise StageError(f"held_out must leave examples to train on, got {held_out} of {len(distinct)} distinct ones")
    apart = set(random.Random(seed).sample(list(distinct), count))
    train = [(key, row) for key, row in drawn if key not in apart]
    if not train:
        raise StageError("the weights must leave examples to train on, got none")
    kept = [(key, row) for key, row in distinct.items() if key in apart]
    both = _table([row for _, row in train + kept])  # of one schema, also where one side is empty
    said = json.dumps([[key for key, _ in side] for side in (train, kept)])
    digest = hashlib.sha256(said.encode()).hexdigest()[:32]
    return Split(both.select(range(len(train))), both.select([*range(len(train), len(both))]), first.form, digest)


def walk(path: Path) -> Iterator[Example]:
    """Each example of a JSONL or Parquet file, or of a directory that `datasets` saved, with its place.

    Raises:
        StageError: the file is not there, or is none of these.
    """
    if not path.exists():
        raise StageError(f"{path} must be a file of examples, got nothing there")
    if path.is_dir():
        records = _rows(path, lambda: datasets.load_from_disk(str(path)), "a directory that datasets saved")
    elif path.suffix == ".parquet":
        records = _rows(path, lambda: Dataset.from_parquet(str(path), keep_in_memory=True), "a Parquet file")
    elif path.suffix == ".json":
        records = _rows(path, lambda: _array(path), "an array of objects in JSON")
    elif path.suffix in SUFFIXES:
        records = _lines(path)
    else:
        raise StageError(f"{path} must end in {', '.join(SUFFIXES)}, or be a directory that datasets saved")
    for where, record in records:
        if isinstance(record, ExampleError):
            yield Example(where, problem=str(record))
            continue
        try:
            form, row = example(record)
            if "images" in row:
                row["images"] = [_image(path.parent / image) for image in row["images"]]
        except ExampleError as error:
            yield Example(where, problem=str(error))
        else:
            yield Example(where, form, row)


def _image(path: Path) -> str:
    """The absolute path of an image that can be read; ExampleError where it is none."""
    try:
        with open_image(path) as image:
            image.load()
    except FileNotFoundError:
        raise ExampleError(f"image {path} must be there, got nothing") from None
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        raise ExampleError(f"image {path} must be an image that can be read, got {first_line(error)}") from None
    return str(path.absolute())


def other_shape(found: Example, first: Example) -> str:
    """What is wrong with `found`, whose shape is not that of `first`."""
    return f"must be {first.shape} as {first.where} is, got {found.shape}"


def identity(row: dict[str, Any]) -> str:
    """Equal for equal examples."""
    return json.dumps(row, sort_keys=True, default=str)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise StageError(f"{path} must be a readable file, got {error.strerror}") from None
    with file:
        start = 0
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            where, begin = f"{path} line {number}", start
            start += len(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, begin = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):  # to the line's end
                    line = file.readline(LONGEST_LINE)
                    start += len(line)
                length = start - begin
                yield where, ExampleError(f"must be one example of at most {LONGEST_LINE} bytes, got {length}")
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {begin + error.start} of the file is 0x{line[error.start]:02x}"
                yield where, ExampleError(f"must be UTF-8, but {byte}")
                continue
            if not text.strip():
                continue
            try:
                yield where, json.loads(text.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                yield where, ExampleError(f"must be JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield where, ExampleError("must be JSON of a few levels, got too many")


def _rows(path: Path, load, expected: str) -> Iterator[tuple[str, Any]]:
    try:
        table = load()
    except Exception as error:  # what datasets and pyarrow raise about a file has no common type
        raise StageError(f"{path} must be {expected}, got {first_line(error)}") from None
    if isinstance(table, datasets.DatasetDict):
        if len(table) != 1:
            raise StageError(f"{path} must hold one split, got {', '.join(table)}: name its folder")
        (table,) = table.values()
    for number, record in enumerate(table, 1):
        yield f"{path} row {number}", record


def _array(path: Path) -> list:
    records = json.loads(path.read_bytes())
    if not isinstance(records, list):
        raise ValueError(type(records).__name__)
    return records


def _table(rows: list[dict[str, Any]]) -> Dataset:
    """Arrow gives all turns the same keys, None where one had none, which chat templates trip over: those are kept as
    JSON where turns differ in more than role and content."""
    names = [name for name, value in rows[0].items() if isinstance(value, list) and name != "images"]
    images = {"images": List(Value("string"))} if "images" in rows[0] else {}
    if all(turn.keys() == {"role", "content"} for row in rows for name in names for turn in row[name]):
        table = Dataset.from_list(rows)
    else:
        table = Dataset.from_list(rows, features=Features({name: List(Json()) for name in names} | images))
    return table.cast_column("images", List(Image())) if images else table


def _weighted(rows: list, weight: float, draw: random.Random) -> list:
    whole = int(weight)
    part = draw.sample(range(len(rows)), round((weight - whole) * len(rows)))
    return rows * whole + [rows[i] for i in sorted(part)]
