"""Distillation: the sum of losses between a student and its teacher on a batch, and a plain loop that trains by it."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..storage.atomic import replacing
from .batches import IGNORED, Batch
from .heads import CHUNK, Head, HeadReader, Rows, summed_by_chunks
from .layers import recording, text_rows
from .losses import LayerLoss, TopK, hard_labels, soft_labels
from .teacher import Answer, Teacher, as_teacher, device_of, moved
from .teacher_cache import digests


@dataclass(frozen=True)
class Distilled:
    """Of one batch.

    Attributes:
        loss: the weighted sum, a differentiable number.
        terms: each term by its name (soft, hard, cosine, hint, contrastive), unweighted, detached fp32 numbers.
        rows: that the soft labels were compared on.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    rows: int


class DistillLoss(nn.Module):
    """soft * T² KL(teacher || student) + hard * cross-entropy + the sum of weight * layer loss; each a mean over rows.

    Logits are made for `chunk` rows at a time, of student and teacher alike, and gradients with them, so that beside a
    chunk only hidden states are in memory. Its own parameters are what hints and contrastive terms learn.

    Args:
        soft: weight of the soft labels.
        temperature: T of the soft labels, of both.
        k: the teacher's k likeliest classes and the rest as one; None is the full vocabulary.
        hard: weight of the labels (of a causal model without `labels`, its next tokens).
        layers: `Cosine`, `Hint` and `Contrastive` between layers, with their weights.
        labelled_only: soft labels only where the batch has a label (the answers of a fine-tune, say).
        chunk: rows.
        head: of the student, as of `HeadReader`.

    Raises:
        ValueError: a weight is negative or all are 0, or temperature, k or chunk is not positive.
    """

    def __init__(
        self, soft: float = 1.0, temperature: float = 1.0, k: int | None = None, *, hard: float = 0.0,
        layers: Sequence[LayerLoss] = (), labelled_only: bool = False, chunk: int = CHUNK, head: Head = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        who = "nf4kernels.recover.DistillLoss"
        weights = [soft, hard, *(each.weight for each in layers)]
        if not all(math.isfinite(each) and each >= 0 for each in weights) or not any(weights):
            raise ValueError(f"{who}: weights must be 0 or more and one of them above 0, got {weights}")
        for name, value in (("temperature", temperature), ("k", k), ("chunk", chunk)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{who}: {name} must be above 0, got {value}")
        self.soft, self.temperature, self.k, self.hard = soft, temperature, k, hard
        self.layers = nn.ModuleList(layers)
        self.labelled_only, self.chunk = labelled_only, chunk
        self.head = [head]  # in a list, so that the student's head is no part of this module
        self._readers: list[HeadReader] = []

    def forward(self, student: nn.Module, teacher: Teacher | nn.Module, batch: Batch) -> Distilled:
        """The losses of one batch; the student runs in the mode that it is in, the teacher in evaluation.

        Raises:
            ValueError: rows, classes or widths of the two differ, or hard labels are wanted where there are none.
        """
        pairs: list[LayerLoss] = list(self.layers)  # type: ignore[arg-type]  # as it was given
        asks = self.soft or pairs
        answer = as_teacher(teacher).answer(batch, [each.teacher for each in pairs]) if asks else None
        with recording(student, [each.student for each in pairs]) as seen:
            rows = self._reader(student).rows(batch)
        loss, terms, count = self._of_logits(rows, answer)
        for layer in pairs:
            own = text_rows(seen[layer.student], batch)
            theirs = answer.hidden[layer.teacher].to(own.device)  # type: ignore[union-attr]  # a layer asks
            if len(own) != len(theirs):
                raise ValueError(
                    f"nf4kernels.recover.DistillLoss: layers must have as many rows as the teacher's, got"
                    f" {list(own.shape)} of {layer.student} beside {list(theirs.shape)} of {layer.teacher}"
                )
            with torch.autocast(own.device.type, enabled=False):
                value = layer(own, theirs)
            loss = loss + layer.weight * value
            terms[layer.kind] = terms.get(layer.kind, 0) + value.detach()
        return Distilled(loss, terms, count)

    @property
    def identity(self) -> list[Any]:
        """What it adds up, as numbers and words."""
        pairs = [[each.kind, each.student, each.teacher, each.weight] for each in self.layers]  # type: ignore[union-attr]
        return [self.soft, self.temperature, self.k, self.hard, self.labelled_only, pairs]

    def _reader(self, student: nn.Module) -> HeadReader:
        """It is kept, since what it has learned of the model is."""
        if not self._readers or self._readers[0].model is not student:
            self._readers = [HeadReader(student, self.head[0])]
        return self._readers[0]

    def _of_logits(self, rows: Rows, answer: Answer | None) -> tuple[Tensor, dict[str, Tensor], int]:
        who = "nf4kernels.recover.DistillLoss"
        expected = rows.expected
        if (self.hard or self.labelled_only) and expected is None:
            raise ValueError(f"{who}: batch must have labels, for hard labels or labelled_only, got none")
        if self.soft and answer is not None and len(answer) != len(rows):
            raise ValueError(f"{who}: teacher must have the student's {len(rows)} rows, got {len(answer)}")
        which = None
        if self.labelled_only:
            which = expected.ne(IGNORED).nonzero().flatten()  # type: ignore[union-attr]  # checked
        count = len(rows) if which is None else len(which)
        names = [name for name, weight in (("soft", self.soft), ("hard", self.hard)) if weight]
        if not names:
            return rows.values.new_zeros((), dtype=torch.float32), {}, count
        labelled = int((expected != IGNORED).sum()) if self.hard else 0  # type: ignore[union-attr]  # checked
        # Sums are of the order of one a row, so that fp16 gradients do not vanish before they are scaled.
        counts = {"soft": max(count, 1), "hard": max(labelled, 1)}
        scale = float(max(count, 1))

        def terms_of(logits: Tensor, which: Tensor) -> Tensor:
            found = []
            if self.soft:
                found.append(self._soft(logits, answer, which) * (self.soft * scale / counts["soft"]))
            if self.hard:
                found.append(hard_labels(logits, expected[which]) * (self.hard * scale / counts["hard"]))  # type: ignore[index]
            return torch.stack(found)

        total, sums = summed_by_chunks(rows, terms_of, which, self.chunk)
        terms = {name: part / (scale * getattr(self, name)) for name, part in zip(names, sums)}
        return total / scale, terms, count

    def _soft(self, logits: Tensor, answer: Any, which: Tensor) -> Tensor:
        target = answer.target(which, self.temperature, self.k)
        if isinstance(target, TopK):
            target = TopK(*(each.to(logits.device) for each in (target.indices, target.log_probs, target.log_rest)))
        elif target.shape != logits.shape:
            raise ValueError(f"nf4kernels.recover.DistillLoss: teacher must have the student's classes, got"
                             f" {target.shape[-1]} beside {logits.shape[-1]}")  # fmt: skip
        else:
            target = target.to(logits.device)
        return soft_labels(logits, target, self.temperature)


@dataclass(frozen=True)
class Training:
    """How `distill` trains.

    Attributes:
        steps: of the optimizer.
        learning_rate: of AdamW at its highest.
        warmup: share of the steps in which it rises from 0.
        schedule: what it does then: `cosine` or `linear` to 0, or `constant`.
        accumulate: batches a step.
        clip: the norm that gradients are cut to; 0 leaves them.
        seed: of the order of the batches and of all that is drawn.
        shuffle: batches are drawn without repetition, epoch by epoch; else in order.
        save_steps: the state is written each time so many steps are done, where there is a file for it.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    accumulate: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    shuffle: bool = True
    save_steps: int = 50

    def __post_init__(self) -> None:
        who = "nf4kernels.recover.Training"
        for name in ("steps", "accumulate", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{who}: {name} must be 1 or more, got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"{who}: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"{who}: learning_rate must be above 0, got {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * SCHEDULES[self.schedule]((step - rising) / max(self.steps - rising, 1))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def distill(
    model: nn.Module, teacher: Teacher | nn.Module, batches: Sequence[Batch], training: Training,
    loss: DistillLoss | None = None, *, state: Path | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None, progress: bool = False,
) -> list[dict[str, float]]:  # fmt: skip
    """Train what of `model` requires a gradient to match `teacher` on `batches`, in place, by AdamW.

    Args:
        model: the student; it is left in the mode that it was in.
        teacher: a model, or one of `LiveTeacher`, `EarlierSelf`, `CachedTeacher`.
        batches: what a batch is says batches.py; each is moved to the model's device.
        loss: None is the KL divergence alone, T = 1. What it learns itself is trained with the model.
        state: a file for what a run that is stopped goes on from; the same call goes on where it was, to the same bits
            on the same machine. It is removed at the end.
        callback: gets each step's number, from 1, and its losses.

    Returns:
        Of each step `loss` and its terms, unweighted, means over its batches.

    Raises:
        ValueError: there is no batch, nothing to train, a loss that is not finite, or `state` is of another run.
    """
    who = "nf4kernels.recover.distill"
    loss = DistillLoss() if loss is None else loss
    teacher = as_teacher(teacher)
    device = device_of(model)
    loss.to(device)
    trained = [each for each in (*model.parameters(), *loss.parameters()) if each.requires_grad]
    if not any(each.requires_grad for each in model.parameters()):
        raise ValueError(f"{who}: model must have parameters that require a gradient, got none")
    if not len(batches):
        raise ValueError(f"{who}: batches must be one or more, got none")
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        others = {
            "batches": [len(batches), *digests(batches[0]), *digests(batches[-1])], "loss": loss.identity,
            "teacher": type(teacher).__name__,
        }  # fmt: skip
        run = _Run(training, trained, optimizer, teacher, others)
        if state is not None:
            run.load(state)
        optimizer.zero_grad(set_to_none=True)  # of whatever was before
        try:
            model.train()
            _train(model, teacher, batches, training, loss, run, state, callback, progress)
        finally:
            optimizer.zero_grad(set_to_none=True)
            for module, mode in modes:
                module.training = mode
    if state is not None:
        state.unlink(missing_ok=True)
    return run.log


def _train(model, teacher, batches, training, loss, run, state, callback, progress) -> None:  # type: ignore[no-untyped-def]
    device = device_of(model)
    bar = tqdm(total=training.steps, initial=len(run.log), desc="distill", unit="step", disable=not progress)
    order = _order(len(batches), training, len(run.log) * training.accumulate)
    with bar:
        for step in range(len(run.log), training.steps):
            found: dict[str, float] = {}
            for _ in range(training.accumulate):
                made = loss(model, teacher, moved(batches[next(order)], device))
                if not made.loss.isfinite():
                    raise ValueError(
                        f"nf4kernels.recover.distill: loss must be finite, got {made.loss.item()} at step {step + 1}"
                    )
                (made.loss / training.accumulate).backward()
                for name, value in {"loss": made.loss.detach(), **made.terms}.items():
                    found[name] = found.get(name, 0.0) + float(value) / training.accumulate
            if training.clip:
                nn.utils.clip_grad_norm_(run.trained, training.clip)
            for group in run.optimizer.param_groups:
                group["lr"] = training.rate(step)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            teacher.after_step()
            run.log.append(found)
            bar.set_postfix({name: f"{value:.4g}" for name, value in found.items()})
            bar.update()
            if callback is not None:
                callback(step + 1, found)
            if state is not None and (step + 1) % training.save_steps == 0:
                run.save(state)


def _order(count: int, training: Training, start: int) -> Iterator[int]:
    """Numbers of batches without an end, from the `start`-th on."""
    epoch, place = divmod(start, count)
    while True:
        drawn = torch.Generator().manual_seed(training.seed + epoch)
        numbers = torch.randperm(count, generator=drawn).tolist() if training.shuffle else range(count)
        yield from numbers[place:]
        epoch, place = epoch + 1, 0


class _Run:
    """What changes from step to step, and its file."""

    def __init__(
        self, training: Training, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, teacher: Teacher,
        others: dict[str, Any],
    ) -> None:  # fmt: skip
        self.training, self.trained, self.optimizer, self.teacher = training, trained, optimizer, teacher
        self.log: list[dict[str, float]] = []
        self.identity = {**asdict(training), **others, "shapes": [list(each.shape) for each in trained]}
        del self.identity["save_steps"]

    def save(self, path: Path) -> None:
        kept = getattr(self.teacher, "kept", {})
        content = {
            "identity": self.identity, "log": self.log, "trained": [each.detach() for each in self.trained],
            "optimizer": self.optimizer.state_dict(), "kept": list(kept.values()), "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }  # fmt: skip
        with replacing(path) as partial:
            torch.save(content, partial)

    def load(self, path: Path) -> None:
        """Nothing where there is no file."""
        if not path.exists():
            return
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["identity"] != self.identity:
            names = [name for name, value in self.identity.items() if content["identity"].get(name) != value]
            raise ValueError(f"nf4kernels.recover.distill: state must be of this run, got {os.fspath(path)}, whose"
                             f" {', '.join(names)} differ")  # fmt: skip
        self.log = content["log"]
        with torch.no_grad():
            for each, value in zip(self.trained, content["trained"]):
                each.copy_(value)
            for each, value in zip(getattr(self.teacher, "kept", {}).values(), content["kept"]):
                each.copy_(value)
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        if content["cuda"]:
            torch.cuda.set_rng_state_all(content["cuda"])
