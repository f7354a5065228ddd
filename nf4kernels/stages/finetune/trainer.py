"""TRL's trainer with what it lacks: counts of what is cut, checkpoints known to be whole, the same order again."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames
from trl import SFTTrainer

from ...distributed.expert_load import ExpertLoad
from ...nn.dtensors import whole
from ...optim import PagedAdamW
from ...storage.atomic import flush, write_json
from ..errors import StageError
from .examples import IGNORED, Counts, counts
from .outputs import LOG, write_log
from .processes import wait_for_all

START = "started.json"  # what the run began with; beside it the checkpoints
WHOLE = "whole.json"  # in a checkpoint, written when all the rest of it is on disk


class Trainer(SFTTrainer):
    """TRL's, which also counts what is cut, and keeps the first example, whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.counted: dict[str, Counts] = {}
        self.measured: dict[str, float] = {}  # by the last evaluation, beside the loss
        self._held_out: list[tuple[torch.Tensor, torch.Tensor]] = []  # each row's loss and tokens, in an evaluation
        self.first_row: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        self.expert_load = ExpertLoad(self.model)
        if self._is_vision_dataset:  # whose rows TRL makes tensors of only when it trains on them
            for name, rows in (("train", self.train_dataset), ("eval", self.eval_dataset)):
                if rows is not None:
                    self.counted[name] = Counts(len(rows), 0, 0, 0)
            self._collate: Any = vars(self)["data_collator"]
            self.data_collator = self._collate_with_images
            made = self.data_collator([self.train_dataset[0]])
            self.first_row = {name: made[name][0].tolist() for name in ("input_ids", "labels")}

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """transformers', but for its paged AdamW, which is bitsandbytes' there and torch's with paged states here."""
        if args.optim != OptimizerNames.PAGED_ADAMW:
            return SFTTrainer.get_optimizer_cls_and_kwargs(args, model)
        plain = copy.copy(args)
        plain.optim = OptimizerNames.ADAMW_TORCH_FUSED
        return PagedAdamW, SFTTrainer.get_optimizer_cls_and_kwargs(plain, model)[1]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        sampler.batch_size *= self.args.world_size  # of a whole step: the same order on any number of processes
        return _ByLength(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but of what FSDP has sharded what is trained alone is gathered, and never the base."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        frozen = {id(parameter) for parameter in self.model.parameters() if not parameter.requires_grad}
        state = self.model.state_dict(keep_vars=True)
        trained = {name: whole(tensor).cpu() for name, tensor in state.items() if id(tensor) not in frozen}
        self._save(output_dir or self.args.output_dir, state_dict=trained)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the balance of a mixture's router beside the training loss; every process comes here."""
        if "loss" in logs:
            logs.update({name: round(value, 4) for name, value in self.expert_load.take().items()})
        super().log(logs, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._images_whole():
            return super().compute_loss(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, which also notes how many tokens the loss is the mean of, and leaves a router's own loss out."""
        tokens = inputs["labels"][:, 1:].ne(IGNORED).sum(1)
        made = super().prediction_step(model, inputs, *args, **kwargs)
        loss = torch.as_tensor(made[0], device=tokens.device).detach().double().mean()
        if router := self._metrics["eval"].get("aux_loss"):
            loss = loss - self.router_aux_loss_coef * router[-1]
        rows: Any = self.accelerator.gather_for_metrics((loss.expand(len(tokens)).contiguous(), tokens))
        self._held_out.append(tuple(each.cpu() for each in rows))
        return made

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """transformers', with the mean over all tokens for the loss, where its own is over batches, by their rows."""
        self._held_out = []
        made = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._held_out:
            losses, tokens = (torch.cat(each) for each in zip(*self._held_out, strict=True))
            learned = tokens > 0
            mean = (losses[learned] * tokens[learned]).sum() / tokens.sum()
            made.metrics[f"{metric_key_prefix}_loss"] = float(mean)
        return made

    def _collate_with_images(self, rows: list[dict[str, Any]]) -> Any:
        with self._images_whole():
            return self._collate(rows)

    @contextmanager
    def _images_whole(self) -> Iterator[None]:
        """What processors and models raise where max_length has cut an image, in a sentence."""
        try:
            yield
        except ValueError as error:
            if not self._is_vision_dataset or "max_length" not in str(error):
                raise
            raise StageError(
                f"--max_length must leave the images of each example whole, got {self.args.max_length}"
            ) from None

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        uncut = copy.copy(args)
        uncut.max_length = None
        rows = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
        self.counted[dataset_name] = counts(rows, args.max_length)
        if dataset_name == "train":
            self.first_row = {name: _cut(value, args) for name, value in rows[0].items() if _is_ids(value)}
        rows = rows.remove_columns([name for name in rows.column_names if not _is_ids(rows[0][name])])
        kept = super()._prepare_dataset(rows, processing_class, args, packing, formatting_func, dataset_name)
        count = self.counted[dataset_name]
        count.tokens = sum(map(len, kept["input_ids"]))
        if not packing:
            count.lost = len(rows) - len(kept)
        if not len(kept):
            raise StageError(f"--max_length must leave something to learn, got {args.max_length}: in every"
                             f" {'training' if dataset_name == 'train' else 'held-out'} example the answer begins"
                             " beyond it")  # fmt: skip
        if dataset_name == "train" and len(kept) < args.world_size:
            raise StageError(f"--data must have a training example for each of the {args.world_size} processes, got"
                             f" {len(kept)}")  # fmt: skip
        return kept


class _ByLength(LengthGroupedSampler):
    """Draws an epoch's order by its number, so that an epoch gone on with has the order that it began with."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class Keeper(TrainerCallback):
    """Marks whole checkpoints, keeps log.csv up to date, and adds the speed to what is logged."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = (time.monotonic(), 0)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = (time.monotonic(), 0)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = self.out / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        wait_for_all()  # each process writes a part
        if state.is_world_process_zero and directory.is_dir():
            for file in directory.rglob("*"):
                flush(file)
            write_json(directory / WHOLE, {"step": state.global_step})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "num_tokens" in logs and "loss" in logs:
            seconds, tokens = time.monotonic() - self.began[0], logs["num_tokens"] - self.began[1]
            logs["tokens/s"] = round(tokens / max(seconds, 1e-9), 1)
            self.began = (time.monotonic(), logs["num_tokens"])
        if state.is_world_process_zero and (self.out / START).exists():  # else it is the held-out loss before
            write_log(self.out / LOG, state.log_history)


def _cut(value: list[int], args: Any) -> list[int]:
    """What max_length leaves of a row, as TRL cuts it."""
    if args.max_length is None:
        return value
    return value[-args.max_length :] if args.truncation_mode == "keep_end" else value[: args.max_length]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], int))
