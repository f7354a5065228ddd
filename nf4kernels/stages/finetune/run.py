"""A fine-tune, from its recipe to the directory of its adapters."""

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from ...model.prepare import prepare_for_training
from ...storage.atomic import TargetError, flush, replacing, write_json
from ..data.reading import Split, read
from ..data.view import begun, missing_beginning
from ..errors import StageError
from .examples import Counts, counts, in_chat_form, shown
from .outputs import CARD, LOG, PICTURE, RECIPE, write_card, write_log, write_picture
from .recipe import Recipe

START = "started.json"  # what the run began with; beside it the checkpoints
WHOLE = "whole.json"  # in a checkpoint, written when all the rest of it is on disk
SAMPLES = 3
ANSWER_TOKENS = 64
PROMPT_TOKENS = 16  # of a plain text, to go on from
logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class _Trainer(SFTTrainer):
    """TRL's, which also counts what is cut, and keeps the first example, whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.counted: dict[str, Counts] = {}
        self.first_row: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return _ByLength(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        uncut = copy.copy(args)
        uncut.max_length = None
        rows = super()._prepare_dataset(dataset, processing_class, uncut, False, formatting_func, dataset_name)
        self.counted[dataset_name] = counts(rows, args.max_length)
        if dataset_name == "train":
            self.first_row = {name: value[: args.max_length] for name, value in rows[0].items() if _is_ids(value)}
        rows = rows.remove_columns([name for name in rows.column_names if not _is_ids(rows[0][name])])
        return super()._prepare_dataset(rows, processing_class, args, packing, formatting_func, dataset_name)


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


class _Keeper(TrainerCallback):
    """Marks whole checkpoints, keeps log.csv up to date, and shows the speed in the progress bar's line."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = (time.monotonic(), 0)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = self.out / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            for file in directory.iterdir():
                flush(file)
            write_json(directory / WHOLE, {"step": state.global_step})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "num_tokens" in logs and "loss" in logs:
            seconds, tokens = time.monotonic() - self.began[0], logs["num_tokens"] - self.began[1]
            logs["tokens/s"] = round(tokens / max(seconds, 1e-9), 1)
            self.began = (time.monotonic(), logs["num_tokens"])
        if state.is_world_process_zero and (self.out / START).exists():  # else it is the held-out loss before
            write_log(self.out / LOG, state.log_history)


def finetune(recipe: Recipe, say: Say = print) -> Path:
    """Train adapters as `recipe` says, and write them to its output_dir with log.csv, loss.png, README.md, recipe.yaml.

    A directory that holds a part of the same run is gone on with, from its last whole checkpoint: on one process the
    log is then the same, bit for bit, as of a run that nothing stopped. Bad input leaves everything as it was.

    Returns:
        The directory, which PEFT loads.

    Raises:
        StageError: the recipe, the data, the model or the directory must be another.
    """
    started = _started(recipe)
    split = read(recipe.sources, recipe.held_out, recipe.training.seed)
    tokenizer = _tokenizer(recipe)
    trainer = _trainer(recipe, split, tokenizer)
    checkpoint = _last_whole(recipe.out)
    _announce(trainer, recipe, tokenizer, say)
    begun = {"examples": trainer.counted["train"].examples, "tokens": trainer.counted["train"].tokens}
    if started is None:
        started = {**begun, "held_out_loss": _held_out_loss(trainer)}
        with replacing(recipe.out / RECIPE) as partial:
            partial.write_text(yaml.safe_dump(recipe.given, allow_unicode=True), encoding="utf-8")
        write_json(recipe.out / START, started)
    elif {name: started.get(name) for name in begun} != begun:
        raise StageError(f"--output_dir must hold a run on the same data, got {recipe.out}, whose run has"
                         f" {started.get('examples')} examples of {started.get('tokens')} tokens")  # fmt: skip
    before = started["held_out_loss"]
    if before is not None:
        say(f"held-out loss before: {before:.4f}")
    say(f"going on from {checkpoint}" if checkpoint else f"writing to {recipe.out}")
    set_seed(recipe.training.seed)  # what was drawn until here, a resumed run does not draw
    if checkpoint is not None and _is_last(checkpoint):
        _take(trainer, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    history = list(trainer.state.log_history)
    after = _held_out_loss(trainer)
    if after is not None:
        say(f"held-out loss after: {after:.4f}")
    trainer.save_model(str(recipe.out))
    if trainer.is_world_process_zero():
        write_log(recipe.out / LOG, history)
        write_picture(recipe.out / PICTURE, history, before, after)
        samples = _samples(trainer, split, tokenizer)
        base = str(recipe.model.model_name_or_path)
        write_card(recipe.out / CARD, base, recipe.given, _facts(trainer, recipe, before, after), samples)
        write_json(recipe.out / START, {**started, "held_out_loss_after": after, "finished": True})
        for prompt, _, answer in samples:
            say(f"asked: {prompt}\nanswered: {answer}")
    return recipe.out


def _started(recipe: Recipe) -> dict[str, Any] | None:
    """What the run in the directory began with; None where there is none, and StageError where it is another's."""
    out = recipe.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / START).is_file() or not (out / RECIPE).is_file():
        if out.is_dir() and all(entry.name.startswith(".") or entry.name == RECIPE for entry in out.iterdir()):
            return None  # killed before the first step
        raise StageError(f"--output_dir must be new or hold a run of this recipe, got {out}")
    started = yaml.safe_load((out / START).read_text(encoding="utf-8"))
    stored = yaml.safe_load((out / RECIPE).read_text(encoding="utf-8"))
    names = sorted(name for name in {*stored, *recipe.given} if stored.get(name) != recipe.given.get(name))
    names = [name for name in names if name != "output_dir"]  # it may have been moved
    if names:
        name = names[0]
        raise StageError(
            f"--output_dir must hold a run of this recipe, got {out}, whose run has {name}="
            f"{stored.get(name, 'the default')} where this one has {recipe.given.get(name, 'the default')}"
        )
    if started.get("finished"):
        raise StageError(f"--output_dir must be new, got {out}, which holds this run, finished")
    return started


def _tokenizer(recipe: Recipe) -> Any:
    model = recipe.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=recipe.training.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"--model_name_or_path must be a directory with a model and its tokenizer, got"
                         f" {model.model_name_or_path}: {_line(error)}") from None  # fmt: skip
    if tokenizer.eos_token is None:
        raise StageError(
            f"--model_name_or_path must have an EOS token in its tokenizer, got {model.model_name_or_path}"
        )
    template = recipe.training.chat_template_path
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def _model(recipe: Recipe) -> Any:
    """In 4 bits: quantized as it is read, or as a 4-bit directory has it; where the trainer wants it."""
    options = {
        "revision": recipe.model.model_revision, "trust_remote_code": recipe.training.trust_remote_code,
    }  # fmt: skip
    where = recipe.model.model_name_or_path
    try:
        stored = getattr(AutoConfig.from_pretrained(where, **options), "quantization_config", None)
        if stored is None:
            options["quantization_config"] = recipe.quantization
        device = recipe.training.device
        if device.type != "cpu":
            options["device_map"] = {"": device}
        return AutoModelForCausalLM.from_pretrained(
            where, dtype=recipe.dtype, attn_implementation=recipe.model.attn_implementation, **options
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise StageError(
            f"--model_name_or_path must be a model that can be loaded, got {where}: {_line(error)}"
        ) from None


def _trainer(recipe: Recipe, split: Split, tokenizer: Any) -> _Trainer:
    args = recipe.training
    is_conversation = split.form == "messages" or (
        split.form == "prompt" and not isinstance(split.train[0]["prompt"], str)
    )
    if recipe.is_answers_only is None:
        args.assistant_only_loss = split.form == "messages"
    with _quiet_maps():
        train = in_chat_form(split.train, split.form, tokenizer)
        held_out = in_chat_form(split.held_out, split.form, tokenizer) if len(split.held_out) else None
    if args.chat_template_path is not None and Path(args.chat_template_path).is_file():
        args.chat_template_path = None  # the tokenizer has it
    if args.assistant_only_loss and not is_conversation:
        raise StageError("--assistant_only_loss must be left out unless the data is chat messages")
    if args.eval_strategy != "no" and held_out is None:
        raise StageError(f"--eval_strategy must be no where nothing is held out, got {args.eval_strategy}")
    model = prepare_for_training(_model(recipe), checkpointing=args.gradient_checkpointing)
    had = recipe.out.exists()
    try:
        with _quiet_maps():
            return _Trainer(
                model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
                peft_config=recipe.lora, callbacks=[_Keeper(recipe.out)],
            )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, OSError, TargetError) as error:
        if not had:
            shutil.rmtree(recipe.out, ignore_errors=True)
        raise StageError(_line(error)) from error


def _announce(trainer: _Trainer, recipe: Recipe, tokenizer: Any, say: Say) -> None:
    args, steps = recipe.training, _steps(trainer)
    for name, called in (("train", "training"), ("eval", "held out")):
        if name in trainer.counted:
            count = trainer.counted[name]
            cut = f", {count.cut} of them cut to {args.max_length}" if count.cut else ""
            say(f"{called}: {count.examples} examples, {count.tokens} tokens{cut}")
    trained, of = trainer.model.get_nb_trainable_parameters()
    say(f"trainable: {trained} of {of} parameters; {steps} steps, dense parts in {str(recipe.dtype)[6:]}")
    say(f"one example as the model sees it, what is learned between ⟦ and ⟧:\n{shown(trainer.first_row, tokenizer)}")


def _steps(trainer: _Trainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def _held_out_loss(trainer: _Trainer) -> float | None:
    if trainer.eval_dataset is None:
        return None
    history = list(trainer.state.log_history)
    loss = float(trainer.evaluate()["eval_loss"])
    trainer.state.log_history = history
    return loss


def _last_whole(out: Path) -> Path | None:
    """The last checkpoint that was written to its end; later ones, which were not, are removed."""
    found = []
    for directory in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (directory / WHOLE).is_file():
            found.append((int(directory.name.rpartition("-")[2]), directory))
        else:
            shutil.rmtree(directory)
    return max(found)[1] if found else None


def _is_last(checkpoint: Path) -> bool:
    """Whether nothing is left to train after it: the trainer would do one step more."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def _take(trainer: _Trainer, checkpoint: Path) -> None:
    """The checkpoint's adapters and log, as they are after training."""
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _samples(trainer: _Trainer, split: Split, tokenizer: Any) -> list[tuple[str, str, str]]:
    """(asked, in the data, answered) of the first examples held out, by greedy decoding."""
    rows = split.held_out if len(split.held_out) else split.train
    made = []
    for row in rows.select(range(min(SAMPLES, len(rows)))):
        ids, asked, expected = _prompt(row, split.form, tokenizer)
        inputs = torch.tensor([ids], device=trainer.model.device)
        trainer.model.eval()
        with torch.no_grad():
            out = trainer.model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=ANSWER_TOKENS, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        made.append((asked, expected, tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)))
    return made


def _prompt(row: dict[str, Any], form: str, tokenizer: Any) -> tuple[list[int], str, str]:
    """Token ids to go on from, and as text what was asked and what the data answers."""
    if form == "text":
        ids = tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS]
        asked = tokenizer.decode(ids, skip_special_tokens=True)
        return ids, asked, row["text"].removeprefix(asked)
    if form == "prompt" and isinstance(row["prompt"], str):
        asked, expected = row["prompt"], row["completion"]
        if not tokenizer.chat_template:
            return tokenizer(begun(asked, missing_beginning(tokenizer)))["input_ids"], asked, expected
        turns = [{"role": "user", "content": asked}]
    else:
        turns, last = (row["prompt"], row["completion"]) if form == "prompt" else (row["messages"], [])
        if form == "messages":
            answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
            turns, last = turns[: answers[-1]], turns[answers[-1] :]
        asked, expected = str(turns[-1]["content"]), str(last[0]["content"])
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"], asked, expected


def _facts(trainer: _Trainer, recipe: Recipe, before: float | None, after: float | None) -> dict[str, Any]:
    train = trainer.counted["train"]
    return {
        "held-out loss before": "-" if before is None else f"{before:.4f}",
        "held-out loss after": "-" if after is None else f"{after:.4f}",
        "training examples": train.examples, "training tokens": train.tokens, "cut": train.cut,
        "held-out examples": trainer.counted["eval"].examples if "eval" in trainer.counted else 0,
        "steps": trainer.state.global_step,
        "weights": f"{recipe.quantization.codebook_name}, blocks of {recipe.quantization.block_size}",
        "rank": recipe.lora.r,
    }  # fmt: skip


@contextmanager
def _quiet_maps() -> Iterator[None]:
    """TRL tokenizes in a handful of passes, each with a bar of its own."""
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], int))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
