"""LoRA on dense weights against LoRA on each 4-bit variant: a fine-tune for each of them and each seed."""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from ...codebook import FORMATS
from ...storage.atomic import write_json
from ..errors import StageError
from ..finetune.recipe import DENSE, Recipe, read_recipe
from ..finetune.run import finetune, finished
from .losses import Run, TunedComparison, TunedVariant
from .variants import Variant, variants

CODEBOOKS = ("nf4", "fp4", "int4")  # the paper's
SEEDS = (0, 1, 2)
RESULT = "compare.json"  # in the output directory, beside a directory a run
OURS = {
    "seed": "say --seeds", "codebook": "say --codebooks", "output_dir": "say --output", "out": "say --output",
    "data": "say --finetune", "model": "it is MODEL", "model_name_or_path": "it is MODEL",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run to do: the variant, None for dense weights, and the recipe with its seed and directory."""

    variant: Variant | None
    seed: int
    recipe: Recipe


def compare_finetunes(
    model: str | Path,
    data: Sequence[str | Path],
    out: Path,
    codebooks: Sequence[str] = CODEBOOKS,
    block_sizes: Sequence[int] | None = None,
    scales: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    config: Path | None = None,
    flags: Sequence[str] = (),
    progress: bool = True,
) -> TunedComparison:
    """The held-out loss before and after LoRA, of the dense model and of each variant, once a seed.

    All runs have the same examples, held-out examples, steps and LoRA; those of one seed begin with the same adapters
    and see the examples in the same order. Each is a fine-tune as `nf4kernels finetune` does it, in its own directory
    in `out`. The same call goes on after the runs that are finished, and in the midst of one from its last checkpoint;
    with more seeds or codebooks it does what is missing.

    Args:
        model: a dense Hugging Face directory of a causal language model.
        data: files of examples, as of `finetune`.
        out: for the runs, and compare.json with the result.
        codebooks: as of `variants`.
        block_sizes, scales: as of `variants`; None is what the recipe says.
        seeds: of the adapters' first values and of the order of the examples.
        config, flags: the recipe, as of `read_recipe`, without model, data, codebook, seed and output_dir.
        progress: show a progress bar on stderr.

    Raises:
        StageError: an argument, the recipe, the data or the model is not as it must be, or `out` holds something else.
    """
    plans = plan_finetunes(model, data, out, codebooks, block_sizes, scales, seeds, config, flags)
    found = [_finished(plan) for plan in plans]
    done = sum(each is not None for each in found)
    with _begun(out, plans[0].recipe), _without_bars(), _Bar(done, len(plans), progress) as bar:
        for i, plan in enumerate(plans):
            if found[i] is None:
                bar.begin(plan)
                finetune(plan.recipe, say=lambda text: None, progress=bar, samples=0)
                found[i] = _finished(plan)
                for checkpoint in plan.recipe.out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                    shutil.rmtree(checkpoint)
                gc.collect()  # the trainer holds itself
                bar.end()
    comparison = _compared(plans, [each for each in found if each is not None])
    write_json(out / RESULT, _read(out) | comparison.as_dict())
    return comparison


def plan_finetunes(
    model: str | Path,
    data: Sequence[str | Path],
    out: Path,
    codebooks: Sequence[str],
    block_sizes: Sequence[int] | None,
    scales: Sequence[str] | None,
    seeds: Sequence[int],
    config: Path | None,
    flags: Sequence[str],
) -> list[Plan]:
    """The runs, one variant after the other, dense first; arguments as of `compare_finetunes`.

    Raises:
        StageError: an argument or the recipe is not as it must be.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise StageError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, seeds)) or 'none'}")
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name in OURS:
            raise StageError(f"{flag.partition('=')[0]} must be left out: {OURS[name]}")
    of_all = [*flags, f"--model_name_or_path={model}", "--data", *map(str, data)]

    def recipe(variant: Variant | None, seed: int, split_seed: int) -> Recipe:
        name = "-".join(map(str, (*vars(variant).values(), f"seed{seed}"))) if variant else f"{DENSE}-seed{seed}"
        its = [f"--seed={seed}", f"--split_seed={split_seed}", f"--output_dir={out / name}", *_weights(variant)]
        return read_recipe(config, [*of_all, *its])

    first = read_recipe(config, [*of_all, f"--output_dir={out}", "--codebook=nf4"])
    if not first.held_out:
        raise StageError("--held_out must be above 0: the losses are those of the examples held out")
    assert first.quantization is not None
    if scales is None:
        scales = [first.quantization.scale_codebook if first.quantization.double_quant else "float32"]
    compared = variants(codebooks, [first.quantization.block_size] if block_sizes is None else block_sizes, scales)
    return [Plan(v, seed, recipe(v, seed, first.split_seed)) for v in (None, *compared) for seed in seeds]


def _weights(variant: Variant | None) -> list[str]:
    """The recipe's fields that say what the weights are; a format has its own kind of scale."""
    if variant is None:
        return [f"--codebook={DENSE}"]
    double = variant.codebook in FORMATS or variant.scales != "float32"
    codebook = variant.scales if double and variant.codebook not in FORMATS else "e4m3"
    return [
        f"--codebook={variant.codebook}", f"--block_size={variant.block_size}", f"--double_quant={double}",
        f"--scale_codebook={codebook}",
    ]  # fmt: skip


def _finished(plan: Plan) -> dict[str, Any] | None:
    try:
        return finished(plan.recipe)
    except StageError as error:
        raise StageError(str(error).replace("--output_dir must", "--output must", 1)) from None


@contextmanager
def _begun(out: Path, recipe: Recipe) -> Iterator[None]:
    """Notes in `out` what data its runs are of, or checks that they are of this; takes the note back if none began.

    Raises:
        StageError: they are of other data, or `out` holds something else, or cannot be made.
    """
    digests = [_digest(source.path) for source in recipe.sources]
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        if not (out / RESULT).is_file():
            raise StageError(f"--output must be new or hold runs of this comparison, got {out}")
        if _read(out).get("data") != digests:
            raise StageError(
                f"--output must hold runs on this data, got {out}, whose runs had other examples; give another one"
            )
        yield
        return
    had = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RESULT, {"data": digests})
    except OSError as error:
        raise StageError(f"--output must be a directory that can be written, got {error}") from None
    try:
        yield
    except StageError:
        if not any(entry.is_dir() for entry in out.iterdir()):
            shutil.rmtree(out) if not had else (out / RESULT).unlink()
        raise


def _read(out: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"--output must be new or hold runs of this comparison, got {out / RESULT}: {error}") from None
    return content


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a directory."""
    digest = hashlib.sha256()
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_dir():
                continue
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise StageError(f"--finetune must be files of examples, got {error}") from None
    return digest.hexdigest()


def _compared(plans: list[Plan], found: list[dict[str, Any]]) -> TunedComparison:
    rows: dict[Variant | None, list[Run]] = {}
    for plan, result in zip(plans, found):
        run = Run(plan.seed, result["held_out_loss"], result["held_out_loss_after"])
        rows.setdefault(plan.variant, []).append(run)
    first = found[0]
    return TunedComparison(
        first["examples"], first["tokens"], first["held_out_examples"], str(plans[0].recipe.dtype)[6:],
        [TunedVariant(variant, runs) for variant, runs in rows.items()],
    )  # fmt: skip


class _Bar(TrainerCallback):
    """One bar over all runs, which moves with each step; beside it the run and its training loss."""

    def __init__(self, done: int, total: int, is_shown: bool) -> None:
        self.done, self.loss = done, ""
        self.bar = tqdm(
            total=total, initial=done, disable=not is_shown, dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.close()

    def begin(self, plan: Plan) -> None:
        self.loss = ""
        self.bar.set_description(f"run {self.done + 1} of {self.bar.total}: {plan.recipe.out.name} ")

    def end(self) -> None:
        self.done += 1
        self._move(self.done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.set_postfix_str(f"step {state.global_step}/{state.max_steps}{self.loss}", refresh=False)
        self._move(self.done + state.global_step / (state.max_steps + 1))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.loss = f", loss {float(logs['loss']):.3f}"

    def _move(self, place: float) -> None:
        self.bar.update(place - self.bar.n)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers has a bar of its own for each model that it reads."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
