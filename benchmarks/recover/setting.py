"""The model and the texts of the table: what is trained and calibrated on, and what is held out."""

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nf4kernels.demo import smollm2
from nf4kernels.model.heads import SKIP
from nf4kernels.model.memory import model_bytes
from nf4kernels.model.plan import plan_layers
from nf4kernels.model.training import training_dtype
from nf4kernels.model.walk import get_submodule
from nf4kernels.recover import Agreement, agreement
from nf4kernels.recover.batches import Batch
from nf4kernels.recover.teacher import LiveAnswer, LiveTeacher

LENGTH = 128  # tokens of a window
HELD_OUT = 4096  # tokens of each text
HELD_DEFINITIONS, HELD_TOPICS = 400, 12  # the last ones, never trained on
DRAWN = 400  # windows
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Scores:
    """Of a model beside the 16-bit one: on held-out text of the kind that it was calibrated and trained on, and of
    another kind."""

    same: Agreement
    other: Agreement


class Setting:
    """SmolLM2-135M-Instruct; WordNet's definitions, and Python's own documentation as the other text.

    Args:
        cache: where the model is, or is downloaded to.
        length, held_out: tokens of a window and of each held-out text.
    """

    def __init__(self, cache: Path, length: int = LENGTH, held_out: int = HELD_OUT) -> None:
        self.directory, self.length, self.held_out = smollm2.fetch(cache), length, held_out
        self.sensitivity = cache / "sensitivity.json"  # of the layers, which all plans are made of
        self.dtype = training_dtype(torch.device("cpu"))
        self.memory = Memory()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.directory)

    def dense(self) -> nn.Module:
        """A fresh copy of the 16-bit model, evaluating."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.directory, dtype=self.dtype)
        return model.eval()

    @cached_property
    def reference(self) -> nn.Module:
        return self.dense().requires_grad_(False)

    @cached_property
    def teacher(self) -> "RememberedTeacher":
        return RememberedTeacher(self.reference, self.memory)

    @cached_property
    def weights(self) -> int:
        """How many weights quantize_model takes."""
        return sum(get_submodule(self.reference, names[0]).weight.numel() for names in self._targets)

    @cached_property
    def other_bytes(self) -> int:
        """Of the model without the layers that quantize_model takes."""
        return model_bytes(self.reference) - sum(
            get_submodule(self.reference, names[0]).weight.nbytes for names in self._targets
        )

    @cached_property
    def _targets(self) -> list[list[str]]:
        return plan_layers(self.reference, SKIP)[0]

    @cached_property
    def _definitions(self) -> list[str]:
        lines = (files("nf4kernels.demo") / "wordnet.jsonl").read_text(encoding="utf-8").splitlines()
        return [record["prompt"] + record["completion"] for record in map(json.loads, lines)]

    @cached_property
    def train(self) -> Tensor:
        """`[windows, length]`, definitions one after the other."""
        return self._windows("\n".join(self._definitions[:-HELD_DEFINITIONS]))

    @cached_property
    def train_other(self) -> Tensor:
        """The same of the other text."""
        return self._windows("\n\n".join(self._topics[:-HELD_TOPICS]))

    @cached_property
    def _topics(self) -> list[str]:
        return [text for _, text in sorted(topics.topics.items())]

    @cached_property
    def drawn(self) -> Tensor:
        """The same, drawn from the 16-bit model: text for a student where there is none of its task."""
        first = torch.randint(len(self.tokenizer), (DRAWN, 1), generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.reference.generate(  # type: ignore[operator]
                first, attention_mask=torch.ones_like(first), do_sample=True, min_length=self.length,
                max_length=self.length, pad_token_id=0, top_k=0,
            )  # fmt: skip

    @cached_property
    def held_same(self) -> Batches:
        return self._held("\n".join(self._definitions[-HELD_DEFINITIONS:]))

    @cached_property
    def held_other(self) -> Batches:
        return self._held("\n\n".join(self._topics[-HELD_TOPICS:]))

    def batches(self, windows: Tensor, rows: int, count: int, seed: int = 0) -> Batches:
        """`count` batches of `rows` windows, drawn without one coming twice before all have come."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([
            torch.randperm(len(windows), generator=generator) for _ in range(-(-rows * count // len(windows)))
        ])  # fmt: skip
        return [{"input_ids": windows[chosen]} for chosen in order[: rows * count].split(rows)]

    def scores(self, model: nn.Module) -> Scores:
        return Scores(*(agreement(model, self._remembered, held) for held in (self.held_same, self.held_other)))

    @cached_property
    def _remembered(self) -> nn.Module:
        return Remembered(self.reference, self.memory)

    def _windows(self, text: str) -> Tensor:
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        return ids[: len(ids) // self.length * self.length].view(-1, self.length)

    def _held(self, text: str) -> Batches:
        windows = self._windows(text)[: self.held_out // self.length]
        if windows.numel() < self.held_out:
            raise ValueError(f"a held-out text must have {self.held_out} tokens, got {windows.numel()}")
        return [{"input_ids": part} for part in windows.split(8)]


class Memory:
    """What rows have in common, made once; `saved` are the seconds that each would have taken to make it again."""

    def __init__(self) -> None:
        self.saved = 0.0
        self._found: dict[Hashable, tuple[Any, float]] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self._found:
            value, seconds = self._found[key]
            self.saved += seconds
            return value
        began = time.perf_counter()
        value = make()
        self._found[key] = value, time.perf_counter() - began
        return value


class RememberedTeacher(LiveTeacher):
    """The 16-bit model: of each batch the head's inputs are kept, 0.6 MB for 512 tokens of SmolLM2."""

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        super().__init__(model)
        self.memory = memory

    def answer(self, batch: Batch, layers: Sequence[str] = ()) -> LiveAnswer:
        answer = super().answer
        if layers:  # whose outputs would be kept, too
            return answer(batch, layers)
        return self.memory.get(("answer", content_of(batch["input_ids"])), lambda: answer(batch))


class Remembered(nn.Module):
    """A model that computes the logits of each batch once: 0.4 GB for 4096 tokens of SmolLM2's vocabulary in bf16."""

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.model, self.memory = model, memory

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.memory.get(
            ("logits", content_of(input_ids)), lambda: self.model(input_ids=input_ids, use_cache=False).logits
        )


def content_of(ids: Tensor) -> bytes:
    return ids.numpy().tobytes()


Build = Callable[[Setting, int], nn.Module]  # of a seed


@dataclass(frozen=True)
class Way:
    """A row of the table: what is done to the model; of several seeds where something is trained or drawn."""

    name: str
    group: str
    build: Build
    seeds: Sequence[int] = (0,)
