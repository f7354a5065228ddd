"""Who a student learns from: models of any kind, several of them, or the student's own earlier self."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .agreement import evaluating
from .batches import Batch
from .heads import Head, HeadReader, Rows
from .layers import recording, text_rows
from .losses import TopK, teacher_log_probs, top_k


class Answer(Protocol):
    """What a teacher says of a batch, row by row of those that count.

    Attributes:
        hidden: `[rows, width]` of each layer that was asked for, by its name.
    """

    hidden: dict[str, Tensor]

    def __len__(self) -> int: ...

    def target(self, rows: Tensor, temperature: float, k: int | None) -> Tensor | TopK:
        """Of the rows int64 `[n]`: log-probabilities at that temperature, fp32 `[n, classes]`, or their top k."""
        ...


class Teacher(Protocol):
    """What `DistillLoss` and `distill` learn from."""

    def answer(self, batch: Batch, layers: Sequence[str] = ()) -> Answer: ...

    def after_step(self) -> None:
        """Told of each step of the student's optimizer."""


class LiveTeacher:
    """One model or several, run on each batch; the average of their probabilities is what they say.

    Args:
        models: of the student's classes; evaluated, without gradients, each on its own device.
        weights: of each in the average, above 0; None is equal ones.
        heads: as of `HeadReader`, one for each.
        within: makes the `with` block that each run stands in, `lambda: disable_adapters(model)` say, where the teacher
            is the student without its adapters.

    Hidden states are the first model's.

    Raises:
        ValueError: no model, or weights that are not one positive number each.
    """

    def __init__(
        self, *models: nn.Module, weights: Sequence[float] | None = None, heads: Sequence[Head] | None = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        who = "nf4kernels.recover.LiveTeacher"
        if not models:
            raise ValueError(f"{who}: models must be one or more, got none")
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not all(math.isfinite(each) and each > 0 for each in weights):
            raise ValueError(
                f"{who}: weights must be a positive number for each of {len(models)} models, got {weights}"
            )
        total = sum(weights)
        self.models, self.weights, self.within = models, [each / total for each in weights], within
        chosen: Sequence[Head] = heads or ["auto"] * len(models)
        self.readers = [HeadReader(model, head) for model, head in zip(models, chosen, strict=True)]

    @torch.no_grad()
    def answer(self, batch: Batch, layers: Sequence[str] = ()) -> "LiveAnswer":
        members: list[Rows] = []
        hidden: dict[str, Tensor] = {}
        for model, reader in zip(self.models, self.readers):
            own = moved(batch, device_of(model))
            with self.within(), evaluating(model), recording(model, [] if members else layers) as seen:
                members.append(reader.rows(own))
            hidden.update({name: text_rows(each, own) for name, each in seen.items()})
        return LiveAnswer(members, self.weights, hidden, self.within)

    def after_step(self) -> None:
        pass


class LiveAnswer:
    """The heads are applied when rows are asked for, to those rows."""

    def __init__(
        self, members: Sequence[Rows], weights: Sequence[float], hidden: dict[str, Tensor],
        within: Callable[[], AbstractContextManager[Any]],
    ) -> None:  # fmt: skip
        self.members, self.weights, self.hidden, self.within = members, weights, hidden, within

    def __len__(self) -> int:
        return len(self.members[0])

    @torch.no_grad()
    def target(self, rows: Tensor, temperature: float, k: int | None) -> Tensor | TopK:
        with self.within():
            log_probs = self._log_probs(rows, temperature)
        return log_probs if k is None else top_k(log_probs, min(k, log_probs.shape[-1]))

    def _log_probs(self, rows: Tensor, temperature: float) -> Tensor:
        total: Tensor | None = None
        for member, weight in zip(self.members, self.weights):
            own = teacher_log_probs(member.logits(rows.to(member.values.device)), temperature)
            if len(self.members) == 1:
                return own
            own = (own + math.log(weight)).to(rows.device)
            total = own if total is None else torch.logaddexp(total, own)
        assert total is not None  # a teacher has a member
        return total


class EarlierSelf(LiveTeacher):
    """The student with the values that its trained parameters had, or with a running average of them.

    Only what requires a gradient is kept a second time: of a 4-bit model with adapters a few megabytes.

    Args:
        model: the student.
        decay: None keeps the values of now; a number d makes them d * kept + (1 - d) * now after each step of the
            optimizer (a mean teacher, Tarvainen and Valpola, 2017).

    Raises:
        ValueError: nothing of the model trains, or decay is not from 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float | None = None, head: Head = "auto") -> None:
        who = "nf4kernels.recover.EarlierSelf"
        self.kept = {each: each.detach().clone() for each in model.parameters() if each.requires_grad}
        if not self.kept:
            raise ValueError(f"{who}: model must have parameters that require a gradient, got none")
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"{who}: decay must be from 0 to 1, got {decay}")
        self.decay = decay
        super().__init__(model, heads=[head], within=self._swapped)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.decay is not None:
            for parameter, kept in self.kept.items():
                kept.lerp_(parameter.detach().to(kept), 1 - self.decay)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        now = {parameter: parameter.data for parameter in self.kept}
        try:
            for parameter, kept in self.kept.items():
                parameter.data = kept
            yield
        finally:
            for parameter, own in now.items():
                parameter.data = own


def as_teacher(teacher: Teacher | nn.Module) -> Teacher:
    return LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher


def device_of(model: nn.Module) -> torch.device:
    tensor = next((each for each in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return [value.to(device) if isinstance(value, Tensor) else value for value in batch]
