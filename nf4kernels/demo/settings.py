"""What the user chose, and the rules it keeps."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..stages.errors import StageError

MADE_BY = "nf4kernels demo"
# Of the [demo] extra.
PACKAGES = ("transformers", "peft", "accelerate", "trl", "datasets", "gguf", "matplotlib", "yaml")
RESULTS = "results.json"
WRITTEN = {RESULTS, "byte-model", "nf4", "adapter", "merged", "loss.png", "weight_error.png"}
# Of what a run can mean: a day's steps, a batch and a rank that fit a small machine, numpy's seeds.
LIMITS = {
    "steps": (1, 10**5), "batch": (1, 10**4), "rank": (1, 10**4), "seed": (0, 2**32 - 1), "byte_steps": (1, 10**5),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Options of the demonstration.

    Attributes:
        out: the directory to write; an earlier demonstration's is replaced.
        cache: where the downloaded model stays.
        model: a Hugging Face directory of a causal language model; None is SmolLM2-135M-Instruct.
        data: a file of examples, as `nf4kernels finetune` takes it; None is WordNet's definitions.
        steps, batch, lr, rank, seed: of the fine-tuning. alpha is twice the rank.
        byte_steps: how long the byte model trains where SmolLM2 cannot be had.

    Raises:
        StageError: one of them is out of its range; the message names the option.
    """

    out: Path = Path("demo-output")
    cache: Path = Path(".cache")
    model: Path | None = None
    data: Path | None = None
    steps: int = 100
    batch: int = 8
    lr: float = 1e-3
    rank: int = 8
    seed: int = 0
    byte_steps: int = 250

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise StageError(f"--{name.replace('_', '-')} must be {least} to {most}, got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise StageError(f"--lr must be between 0 and 1, got {self.lr}")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise StageError(f"--model must be a Hugging Face directory with a config.json, got {self.model}")
        if self.data is not None and not self.data.exists():
            raise StageError(f"--data must be a file of examples, got {self.data}")
        if self.cache.exists() and not self.cache.is_dir():
            raise StageError(f"--cache must be a directory, got {self.cache}")
        out = self.out.resolve()
        if out == Path.cwd() or out in Path.cwd().parents:
            raise StageError(f"--out must be a directory of its own, got {self.out}")
        if any(parent.exists() and not parent.is_dir() for parent in out.parents):
            raise StageError(f"--out must be a directory that can be made, got {self.out}")
        for name in ("model", "data", "cache"):
            path = getattr(self, name)
            if path is not None and out in (path.resolve(), *path.resolve().parents):
                raise StageError(f"--{name} must lie outside --out, which is replaced, got {path}")
        if self.model is not None and self.model.resolve() in out.parents:
            raise StageError(f"--out must lie outside --model, got {self.out}")
        if not may_replace(self.out):
            raise StageError(f"--out must be new, empty or written by an earlier demo and nothing else, got {self.out}")


def may_replace(out: Path) -> bool:
    """Whether nothing is lost when `out` is replaced: it is absent, empty, or an earlier demonstration's."""
    if not out.exists():
        return not out.is_symlink()
    if not out.is_dir() or out.is_symlink():
        return False
    if not {entry.name for entry in out.iterdir()} <= WRITTEN:
        return False
    if not any(out.iterdir()):
        return True
    try:
        return json.loads((out / RESULTS).read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False
