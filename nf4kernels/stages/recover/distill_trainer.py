"""Trainers of transformers and TRL that learn from a teacher: a mixin before theirs, and the one that finetune has."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer as PlainTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...recover import DistillLoss, Teacher
from ...recover.teacher import as_teacher
from ...storage.atomic import replacing
from ..errors import StageError
from ..finetune.trainer import Trainer as FinetuneTrainer

LEARNED = "distill_loss.pt"  # in a checkpoint: what hints and contrastive terms learned, and a running average
KL = "KL to the teacher"


class DistillMixin:
    """`class Mine(DistillMixin, Trainer)`, of transformers' Trainer or TRL's SFTTrainer: trains by a `DistillLoss`.

    While the model trains, compute_loss is the distillation loss, a mean over the rows of a batch. While it is
    evaluated, the loss is the cross-entropy with the labels, so that eval_loss says what it says without a teacher, and
    eval_kl is KL(teacher || student), at the loss's temperature and k. What the loss has learned itself goes into the
    optimizer and into checkpoints.

    Args (by keyword, beside the trainer's own):
        distill_loss: a DistillLoss.
        teacher: a model, or a LiveTeacher, EarlierSelf or CachedTeacher.
    """

    def __init__(self, *args: Any, distill_loss: DistillLoss, teacher: Teacher | nn.Module, **kwargs: Any) -> None:
        self.distill_loss, self.teacher = distill_loss, as_teacher(teacher)
        self.distill_check = DistillLoss(
            temperature=distill_loss.temperature, k=distill_loss.k, hard=1.0, chunk=distill_loss.chunk
        )
        self._distilled: dict[str, list[tuple[dict[str, float], int]]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a mean a batch, which the trainer divides among those of a step
        self.distill_loss.to(self.args.device)  # type: ignore[attr-defined]  # the trainer's

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        if hasattr(getattr(model, "config", None), "use_cache"):
            inputs = {**inputs, "use_cache": False}
        loss = self.distill_loss if model.training else self.distill_check
        made = loss(model, self.teacher, inputs)
        terms = {name: float(value) for name, value in made.terms.items()}
        if not all(map(math.isfinite, terms.values())):
            raise StageError(f"loss must be finite, got {terms}: of the teacher, of the model, or by the learning rate")
        self._distilled["train" if model.training else "eval"].append((terms, made.rows))
        value = made.loss if model.training else made.terms["hard"]
        if not return_outputs:
            return value
        with torch.no_grad():
            return value, model(**{name: each for name, each in inputs.items() if name != "labels"})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]  # the trainer's
        optimizer: Any = self.optimizer  # type: ignore[attr-defined]
        projections = list(self.distill_loss.parameters())
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if projections and id(projections[0]) not in known:
            optimizer.add_param_group({"params": projections})
        return made

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._take("train"))
        elif "eval_loss" in logs and self._distilled["eval"]:
            logs["eval_kl"] = self._take("eval")["soft"] / self.distill_loss.temperature**2
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer's

    def _take(self, mode: str) -> dict[str, float]:
        """The means, over rows, of what was computed since the last time."""
        found, self._distilled[mode] = self._distilled[mode], []
        rows = sum(count for _, count in found)
        names = found[0][0] if found else {}
        return {name: sum(terms[name] * count for terms, count in found) / max(rows, 1) for name in names}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """After a step of the optimizer a running average follows, before the next one's first batch.

        The trainer clears the gradients of the model alone.
        """
        step = self.state.global_step  # type: ignore[attr-defined]  # the trainer's
        if step != getattr(self, "_followed", step):
            self.teacher.after_step()
            self.distill_loss.zero_grad()
        self._followed = step
        return super().training_step(*args, **kwargs)  # type: ignore[misc]  # the trainer's

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]  # the trainer's
        directory = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"  # type: ignore[attr-defined]
        kept = list(getattr(self.teacher, "kept", {}).values())
        if (kept or len(list(self.distill_loss.parameters()))) and directory.is_dir():
            with replacing(directory / LEARNED) as partial:
                torch.save({"loss": self.distill_loss.state_dict(), "teacher": kept}, partial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]  # the trainer's
        file = Path(resume_from_checkpoint) / LEARNED
        if file.is_file():
            learned = torch.load(file, weights_only=True)
            self.distill_loss.load_state_dict(learned["loss"])
            for kept, stored in zip(getattr(self.teacher, "kept", {}).values(), learned["teacher"], strict=True):
                kept.copy_(stored)


class DistillTrainer(DistillMixin, PlainTrainer):
    """transformers' Trainer that learns from a teacher."""


class DistillFinetuneTrainer(DistillMixin, FinetuneTrainer):
    """finetune's trainer, which is TRL's SFTTrainer, that learns from a teacher."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and "attention_mask" in inputs:
            self._total_train_tokens += int(inputs["attention_mask"].sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        if "eval_kl" in found:
            self.measured = {KL: found["eval_kl"]}
        return found
