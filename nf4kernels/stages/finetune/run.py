"""A fine-tune, from its recipe to the directory of its adapters."""

import json
import math
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from transformers import ProgressCallback, TrainerCallback, TrainerState, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar as disable_loading_bar

from ...nn.quant_module import QuantModule
from ...storage.atomic import TargetError, replacing, write_json
from ...version import VERSION
from ..data.reading import Split, read
from ..data.view import marking_template
from ..errors import StageError, first_line
from .answers import SAMPLES, answers
from .examples import in_chat_form, shown
from .forecast import forecast_memory, resident
from .loading import in_one_line, load_processor, load_tokenizer
from .method import ADAPTERS, Method
from .outputs import CARD, LOG, PICTURE, RECIPE, write_card, write_log, write_picture
from .processes import Found, check_alike, from_main, in_time, is_main, is_restarted
from .progress import Clock, Progress
from .recipe import DENSE, Recipe
from .trainer import START, WHOLE, Keeper, Trainer

Say = Callable[[str], None]


def finetune(
    recipe: Recipe,
    say: Say = print,
    progress: TrainerCallback | None = None,
    samples: int = SAMPLES,
    method: Method = ADAPTERS,
) -> Path:
    """Train adapters as `recipe` says, and write them to its output_dir with log.csv, loss.png, README.md, recipe.yaml.

    A directory that holds a part of the same run is gone on with, from its last whole checkpoint: on as many processes
    the log is then the same, bit for bit, as of a run that nothing stopped. On another number of processes a step must
    have as many examples. Bad input leaves everything as it was.

    Args:
        say: gets what is to be told, some lines at a time.
        progress: takes the place of TRL's own bar or printed log.
        samples: how many held-out examples the trained model answers.
        method: what is trained and written; ADAPTERS is PEFT's LoRA on weights in 4 bits.

    Returns:
        The directory, which PEFT loads, where `method` is ADAPTERS.

    Raises:
        StageError: the recipe, the data, the model or the directory must be another; or the processes are not alike,
            or one has ended.
    """
    if not is_main():
        say = _silent
        disable_loading_bar()
    with in_time(recipe.training.ddp_timeout):
        check_alike(recipe.training.ddp_timeout, {"nf4kernels": VERSION, "torch": torch.__version__, **recipe.given})
        if _from_main(recipe, lambda: is_restarted() and finished(recipe) is not None):
            say(f"{recipe.out} holds this run, finished before the restart")
            return recipe.out
        return _run(recipe, say, progress, samples, method)


def _run(recipe: Recipe, say: Say, progress: TrainerCallback | None, samples: int, method: Method) -> Path:
    program = resident()
    started = _from_main(recipe, lambda: _started(recipe))
    with _quiet_libraries():
        split = read(recipe.sources, recipe.held_out, recipe.split_seed)
    processor = load_processor(recipe) if split.has_images else load_tokenizer(recipe)
    tokenizer = processor.tokenizer if split.has_images else processor
    trainer = _trainer(recipe, split, processor, method)
    if progress is not None:
        trainer.remove_callback(PrinterCallback if recipe.training.disable_tqdm else Progress)
        trainer.add_callback(progress)
    checkpoint = _from_main(recipe, lambda: _last_whole(recipe.out))
    _announce(trainer, recipe, tokenizer, say, method)
    if method.has_forecast:
        _announce_memory(trainer, program, say)
    started = _begin(recipe, trainer, started, split)
    before = started["held_out_loss"]
    if before is not None:
        say(f"held-out loss before: {before:.4f}")
    for name, value in started.get("measured", {}).items():
        say(f"{name} before: {value:.4f}")
    say(f"going on from {checkpoint}" if checkpoint else f"writing to {recipe.out}")
    trainer.add_callback(Clock(say, started.get("held_out_seconds", 0.0)))
    _train(trainer, recipe, checkpoint, method)
    history = list(trainer.state.log_history)
    if _is_distributed(trainer):
        before = next((row["eval_loss"] for row in history if row["step"] == 0 and "eval_loss" in row), None)
        if before is not None:
            say(f"held-out loss before: {before:.4f}")
    after = _held_out_loss(trainer)
    if after is not None:
        say(f"held-out loss after: {after:.4f}")
    for name, value in trainer.measured.items():
        say(f"{name} after: {value:.4f}")
    method.write(trainer, recipe)
    answered = answers(  # on every process, where each has a part of the model
        trainer.model, split, processor, samples, recipe.training.max_length
    )
    if is_main():
        write_log(recipe.out / LOG, history)
        first, last = (next(iter(each.values()), None) for each in (started.get("measured", {}), trainer.measured))
        write_picture(recipe.out / PICTURE, history, before, after, kl=(first, last))
        base = str(recipe.model.model_name_or_path)
        facts = _facts(trainer, method.rank(recipe), before, after)
        for when, measured in (("before", started.get("measured", {})), ("after", trainer.measured)):
            facts.update({f"{name} {when}": f"{value:.4f}" for name, value in measured.items()})
        write_card(recipe.out / CARD, base, recipe.given, facts, answered, method.card)
        losses = {"held_out_loss": before, "held_out_loss_after": after}
        write_json(recipe.out / START, {**started, **losses, "finished": True})
        for prompt, _, answer in answered:
            say(f"asked: {prompt}\nanswered: {answer}")
    return recipe.out


def _begin(recipe: Recipe, trainer: Trainer, started: dict[str, Any] | None, split: Split) -> dict[str, Any]:
    """Note what the run begins with, or check that `started`, noted by the run to go on with, is of the same data.

    Raises:
        StageError: it is not.
    """
    count = trainer.counted["train"]
    begun = {"examples": count.examples, "tokens": count.tokens, "data": split.digest}
    check_alike(recipe.training.ddp_timeout, {f"{name} in --data": value for name, value in begun.items()})
    if started is not None:
        if {name: started.get(name) for name in begun} != begun:
            raise StageError(f"--output_dir must hold a run on the same data, got {recipe.out}, whose run has"
                             f" {started.get('examples')} examples of {started.get('tokens')} tokens, where this one"
                             f" has {'others' if started.get('tokens') == count.tokens else count.tokens}")  # fmt: skip
        return started
    since = time.monotonic()
    loss = None if _is_distributed(trainer) else _held_out_loss(trainer)
    started = {**begun, "held_out_examples": len(split.held_out), "held_out_loss": loss}
    started["held_out_seconds"] = 0.0 if loss is None else time.monotonic() - since
    if trainer.measured:
        started["measured"] = dict(trainer.measured)
    started["batch"], started["processes"] = math.prod(_batch(recipe).values()), recipe.training.world_size
    if is_main():
        with replacing(recipe.out / RECIPE) as partial:
            partial.write_text(yaml.safe_dump(recipe.given, allow_unicode=True), encoding="utf-8")
        write_json(recipe.out / START, started)
    return started


def _train(trainer: Trainer, recipe: Recipe, checkpoint: Path | None, method: Method) -> None:
    """All steps, or those after `checkpoint`."""
    set_seed(recipe.training.seed)  # what was drawn until here, a resumed run does not draw
    if checkpoint is not None and _is_last(checkpoint):
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        method.take(trainer, checkpoint if best is None else recipe.out / Path(best).name)
        return
    # accelerate wraps a model once, for training or for evaluation, where several processes share the work: there the
    # loss before comes from within the training, as a row of the log.
    has_no_loss = _is_distributed(trainer) and checkpoint is None
    trainer.args.eval_on_start = has_no_loss and trainer.eval_dataset is not None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _from_main(recipe: Recipe, find: Callable[[], Found]) -> Found:
    return from_main(recipe.training.ddp_timeout, find)


def _silent(message: str) -> None:
    """For all processes but one."""


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """What came of the run of `recipe` in its output_dir; None where it is not there, or not at its end.

    `examples`, `tokens` are those trained on, and `held_out_examples` those held out; `held_out_loss` and
    `held_out_loss_after` are nats a token, None where nothing was held out.

    Raises:
        StageError: the directory holds something else.
    """
    stored = _stored(recipe)
    return stored if stored is not None and stored.get("finished") else None


def _started(recipe: Recipe) -> dict[str, Any] | None:
    """What the run to go on with began with; None where there is none, and StageError where it is another's."""
    stored = _stored(recipe)
    if stored is not None and stored.get("finished"):
        raise StageError(f"--output_dir must be new, got {recipe.out}, which holds this run, finished")
    return stored


def _stored(recipe: Recipe) -> dict[str, Any] | None:
    """What the run in the directory noted; None where there is none, and StageError where it is another's."""
    out = recipe.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / START).is_file() or not (out / RECIPE).is_file():
        if out.is_dir() and all(entry.name.startswith(".") or entry.name == RECIPE for entry in out.iterdir()):
            return None  # killed before the first step
        raise StageError(f"--output_dir must be new or hold a run of this recipe, got {out}")
    started = json.loads((out / START).read_text(encoding="utf-8"))
    stored = yaml.safe_load((out / RECIPE).read_text(encoding="utf-8"))
    names = sorted(name for name in {*stored, *recipe.given} if stored.get(name) != recipe.given.get(name))
    batch = _batch(recipe)
    changeable = ["output_dir"]  # it may have been moved
    if "batch" in started:
        changeable += batch
        if started["batch"] != math.prod(batch.values()):
            raise StageError(
                f"--output_dir must hold a run with as many examples a step, got {out}, whose run has"
                f" {started['batch']} ({started['processes']} processes) where this one has {math.prod(batch.values())}"
                f" ({' x '.join(f'{value} {name}' for name, value in batch.items())})"
            )
    names = [name for name in names if name not in changeable]
    if names:
        name = names[0]
        raise StageError(
            f"--output_dir must hold a run of this recipe, got {out}, whose run has {name}="
            f"{stored.get(name, 'the default')} where this one has {recipe.given.get(name, 'the default')}"
        )
    return started


def _batch(recipe: Recipe) -> dict[str, int]:
    """What the examples of a step are the product of."""
    args = recipe.training
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps, "processes": args.world_size,
    }  # fmt: skip


def _trainer(recipe: Recipe, split: Split, processor: Any, method: Method = ADAPTERS) -> Trainer:
    args = recipe.training
    is_conversation = split.form == "messages" or (
        split.form == "prompt" and not isinstance(split.train[0]["prompt"], str)
    )
    if recipe.is_answers_only is None:
        args.assistant_only_loss = split.form == "messages"
    with _quiet_libraries():
        train = in_chat_form(split.train, split.form, processor)
        held_out = in_chat_form(split.held_out, split.form, processor) if len(split.held_out) else None
    args.chat_template_path = None  # the tokenizer has it
    if args.assistant_only_loss and not is_conversation:
        raise StageError("--assistant_only_loss must be left out unless the data is chat messages")
    if args.assistant_only_loss:
        marking_template(processor)  # else its sentence, before the model is read
    if args.eval_strategy != "no" and held_out is None:
        raise StageError(f"--eval_strategy must be no where nothing is held out, got {args.eval_strategy}")
    set_seed(args.seed)
    model = method.load(recipe, split.has_images)
    set_seed(args.seed)  # of the adapters' first values
    had = recipe.out.exists()
    try:
        with _quiet_libraries():
            trainer = method.trainer(
                model, args, train_dataset=train, eval_dataset=held_out, processing_class=processor,
                peft_config=method.peft_config(recipe), callbacks=[Keeper(recipe.out)],
            )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, OSError, TargetError) as error:
        if not had and is_main():
            shutil.rmtree(recipe.out, ignore_errors=True)
        raise StageError(in_one_line(error)) from error
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress())
    return trainer


def _announce(trainer: Trainer, recipe: Recipe, tokenizer: Any, say: Say, method: Method) -> None:
    args, steps = recipe.training, _steps(trainer)
    for name, called in (("train", "training"), ("eval", "held out")):
        if name in trainer.counted:
            count = trainer.counted[name]
            cut = f", {count.cut} of them cut to {args.max_length}" if count.cut else ""
            lost = f", {count.lost} left out, their answers begin beyond it" if count.lost else ""
            tokens = f", {count.tokens} tokens" if count.tokens else " with images"
            say(f"{called}: {count.examples} examples{tokens}{cut}{lost}")
    trained, of = method.parameters(trainer.model)
    say(f"trainable: {trained} of {of} parameters; {steps} steps, dense parts in {str(recipe.dtype)[6:]}")
    say(f"one example as the model sees it, what is learned between ⟦ and ⟧:\n{shown(trainer.first_row, tokenizer)}")


def _announce_memory(trainer: Trainer, program: int, say: Say) -> None:
    if not is_main():
        return
    if trainer._is_vision_dataset:
        return say("memory: no estimate for examples with images")
    if is_deepspeed_zero3_enabled():
        return say("memory: no estimate where DeepSpeed shares the weights among the processes")
    try:
        say(str(forecast_memory(trainer, program)))
    except Exception as error:  # a model's own code on tensors without values; the run does not depend on it
        say(f"memory: no estimate for this {trainer.model.config.model_type}: {first_line(error)}")


def _steps(trainer: Trainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def _is_distributed(trainer: Trainer) -> bool:
    return trainer.args.world_size > 1 or getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None


def _held_out_loss(trainer: Trainer) -> float | None:
    if trainer.eval_dataset is None:
        return None
    history = list(trainer.state.log_history)
    loss = float(trainer.evaluate()["eval_loss"])
    trainer.state.log_history = history
    return loss


def _last_whole(out: Path) -> Path | None:
    """The last checkpoint that was written to its end; those that were not are removed."""
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


def _facts(trainer: Trainer, rank: int | None, before: float | None, after: float | None) -> dict[str, Any]:
    train = trainer.counted["train"]
    kinds = Counter(
        f"{layer.codebook}, blocks of {layer.block_size}" for layer in trainer.model.modules()
        if isinstance(layer, QuantModule)
    )  # fmt: skip
    return {
        "held-out loss before": "-" if before is None else f"{before:.4f}",
        "held-out loss after": "-" if after is None else f"{after:.4f}",
        "training examples": train.examples, "training tokens": train.tokens, "cut": train.cut,
        "held-out examples": trainer.counted["eval"].examples if "eval" in trainer.counted else 0,
        "steps": trainer.state.global_step,
        "weights": next((kind for kind, _ in kinds.most_common(1)), DENSE),
    } | ({} if rank is None else {"rank": rank})  # fmt: skip


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """TRL tokenizes in a handful of passes, each with a bar of its own, and PEFT asks transformers by an old name."""
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        enable_progress_bar()
