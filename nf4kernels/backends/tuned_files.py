"""Where the tables of measurements are, and which one speaks for a card.

This machine's own, that `nf4kernels tune` wrote to the user's cache, comes before one that this package brings for such
a card (`tuned/<card>.json`), and both before what was predicted for its architecture. A file of the cache that cannot
speak for this card as it is now is ignored, and `Found.ignored` says why.
"""

import functools
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..version import VERSION
from .tuned_table import Table, TableError

VARIABLE = "NF4KERNELS_CACHE"
SHIPPED = Path(__file__).parent / "tuned"
HERE, ON_SUCH_A_CARD, PREDICTED = "measured here", "measured on such a card", "predicted"
MOST_BYTES = 1 << 20
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there where the driver is loaded


@dataclass(frozen=True)
class Card:
    """A kind of device, with what its measurements depend on."""

    name: str
    architecture: str  # "sm_90", "gfx942"
    driver: str

    @property
    def file_name(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{words or 'card'}-{self.architecture}.json"

    def versions(self) -> dict[str, str]:
        return {"nf4kernels": VERSION, "driver": self.driver, "torch": torch.__version__, "triton": triton_version()}


@dataclass(frozen=True)
class Found:
    """What is known of a card: its table, how it is known, and why a file of the cache is ignored, if one is."""

    table: Table | None
    source: str = PREDICTED
    ignored: str = ""


@functools.cache
def triton_version() -> str:
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"


def driver_version() -> str:
    """The NVIDIA driver's release, else what torch knows of the driver or of ROCm."""
    try:
        release = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", NVIDIA_DRIVER.read_text(encoding="utf-8"))
    except OSError:
        release = None
    if release:
        return release[1]
    if torch.version.cuda is not None and hasattr(torch._C, "_cuda_getDriverVersion"):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"
    return torch.version.hip or "unknown"


def card_of(device_type: str, index: int) -> Card:
    """The card of a device, which this initialises."""
    module = torch.get_device_module(device_type)
    properties = module.get_device_properties(index)
    if device_type != "cuda":
        return Card(properties.name, device_type, getattr(properties, "driver_version", "unknown"))
    if torch.version.hip is not None:
        return Card(properties.name, properties.gcnArchName.partition(":")[0], driver_version())
    return Card(module.get_device_name(index), "sm_{}{}".format(*module.get_device_capability(index)), driver_version())


def folder() -> Path | None:
    """Of this user's tables; None where there is to be none: NF4KERNELS_CACHE is empty, or there is no home."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "nf4kernels"
    except RuntimeError:
        return None


def cache_path(card: Card) -> Path | None:
    where = folder()
    return None if where is None else where / card.file_name


def read(path: Path) -> Table:
    """Raises TableError, whose message goes on from the path; OSError."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise TableError(f"must have at most {MOST_BYTES} bytes, got more")
    try:
        return Table.from_json(content.decode())
    except UnicodeDecodeError:
        raise TableError("must be text in UTF-8, got other bytes") from None


def check_is_of(table: Table, card: Card) -> None:
    """TableError where a table of the cache was measured on another card, or with other software."""
    if (table.card, table.architecture) != (card.name, card.architecture):
        raise TableError(
            f"must be measured on {card.name} ({card.architecture}), got {table.card} ({table.architecture})"
        )
    uses_triton = bool(table.triton or table.dequantize_gemm_from or table.rules)
    for name, own in card.versions().items():
        measured = table.versions.get(name)
        if measured != own and (name != "triton" or uses_triton):
            raise TableError(f"must be measured with {name} {own}, got {measured}: run `nf4kernels tune` again")


def measured_table(card: Card) -> Found:
    """The table that was measured on such a card, or none."""
    ignored, path = "", cache_path(card)
    if path is not None:
        try:
            table = read(path)
            check_is_of(table, card)
            return Found(table, HERE)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (TableError, OSError) as error:
            if isinstance(error, PermissionError) and not os.access(path.parent, os.X_OK):
                return _shipped_table(card)  # another user's home: nobody tuned here
            why = error if isinstance(error, TableError) else f"cannot be read: {error.strerror}"
            ignored = f"{path} is ignored: it {why}"
    return _shipped_table(card, ignored)


def _shipped_table(card: Card, ignored: str = "") -> Found:
    try:
        table = read(SHIPPED / card.file_name)
    except FileNotFoundError:
        return Found(None, PREDICTED, ignored)
    return Found(table, ON_SUCH_A_CARD, ignored)


@functools.cache
def predicted_table(architecture: str) -> Table:
    """What this package brings for the architecture, or for the one that `known_architecture` takes in its place."""
    return read(SHIPPED / f"{known_architecture(architecture, predicted_architectures())}.json")


@functools.cache
def predicted_architectures() -> frozenset[str]:
    return frozenset(path.stem for path in SHIPPED.glob("*.json") if re.fullmatch(r"sm_\d+|gfx\w+", path.stem))


OTHER = "sm_86"  # the table for devices without one: that with the least shared memory


def known_architecture(architecture: str, known: frozenset[str]) -> str:
    """The table that this architecture reads: its own, else the next older one of NVIDIA's, AMD's family, or OTHER."""
    if architecture in known:
        return architecture
    if match := re.fullmatch(r"sm_(\d+)", architecture):
        older = [int(name[3:]) for name in known if name.startswith("sm_") and int(name[3:]) <= int(match[1])]
        return f"sm_{max(older)}" if older else OTHER
    family = [name for name in sorted(known) if architecture.startswith("gfx") and name[:4] == architecture[:4]]
    return family[-1] if family else OTHER
