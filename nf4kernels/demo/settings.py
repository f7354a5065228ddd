"""What the user chose, and the rules it keeps."""

import json
from dataclasses import dataclass
from pathlib import Path

from .data import WORDNET, Example, read_examples

MADE_BY = "nf4kernels demo"
PACKAGES = ("transformers", "accelerate", "gguf", "matplotlib")  # of the [demo] extra
RESULTS = "results.json"
# Of what a run can mean: a day's steps, a batch and a rank that fit a small machine, torch's seeds.
LIMITS = {
    "steps": (1, 10**5), "batch": (1, 10**4), "rank": (1, 10**4), "seed": (0, 2**63 - 1), "byte_steps": (1, 10**5),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Options of the demonstration.

    Attributes:
        out: the directory to write; an earlier demonstration's is replaced.
        cache: where the downloaded model stays.
        model: a Hugging Face directory of a causal language model; None is SmolLM2-135M-Instruct.
        data: a `.jsonl` file of prompts and answers; None is WordNet's definitions.
        steps, batch, lr, rank, seed: of the fine-tuning. alpha is twice the rank.
        byte_steps: how long the byte model trains where SmolLM2 cannot be had.

    Raises:
        ValueError: one of them is out of its range; the message names the option.
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
                raise ValueError(f"--{name.replace('_', '-')} must be {least} to {most}, got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise ValueError(f"--lr must be between 0 and 1, got {self.lr}")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(f"--model must be a Hugging Face directory with a config.json, got {self.model}")
        if self.data is not None and not self.data.is_file():
            raise ValueError(f"--data must be a .jsonl file, got {self.data}")
        if self.cache.exists() and not self.cache.is_dir():
            raise ValueError(f"--cache must be a directory, got {self.cache}")
        out = self.out.resolve()
        if out == Path.cwd() or out in Path.cwd().parents:
            raise ValueError(f"--out must be a directory of its own, got {self.out}")
        if any(parent.exists() and not parent.is_dir() for parent in out.parents):
            raise ValueError(f"--out must be a directory that can be made, got {self.out}")
        for name in ("model", "data", "cache"):
            path = getattr(self, name)
            if path is not None and out in (path.resolve(), *path.resolve().parents):
                raise ValueError(f"--{name} must lie outside --out, which is replaced, got {path}")
        if not may_replace(self.out):
            raise ValueError(f"--out must be new, empty or written by an earlier demo, got {self.out}")

    def read_examples(self) -> tuple[list[Example], list[Example]]:
        """(train, held out) of `data`; ValueError for a file that is not as it must be."""
        return read_examples(WORDNET if self.data is None else self.data, self.seed)


def may_replace(out: Path) -> bool:
    """Whether nothing is lost when `out` is replaced: it is absent, empty, or an earlier demonstration's."""
    if not out.exists():
        return not out.is_symlink()
    if not out.is_dir() or out.is_symlink():
        return False
    if not any(out.iterdir()):
        return True
    try:
        return json.loads((out / RESULTS).read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False
