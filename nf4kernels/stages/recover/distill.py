"""`nf4kernels recover distill`: LoRA on weights in 4 bits, trained to say what a teacher says, on any text."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ...recover import Contrastive, Cosine, DistillLoss, Hint, LayerLoss, LiveTeacher, cache_teacher
from ...recover.layers import layer_named
from ...recover.teacher import moved
from ...storage.atomic import replacing
from ..data.reading import Source
from ..errors import StageError, refuse_unused
from ..finetune.loading import in_one_line, load_tokenizer
from ..finetune.method import Method
from ..finetune.outputs import Card
from ..finetune.recipe import Recipe
from ..finetune.run import finetune
from ..finetune.trainer import Trainer
from ..text_loss import read_documents, windows
from .distill_trainer import DistillFinetuneTrainer

MADE = ".made"  # in output_dir: examples that were made of plain text or drawn from the teacher
GREEDY = 3  # tokens of a drawn text after its first that are the likeliest ones, as in LLM-QAT
AT_A_TIME = 16  # texts that are drawn together, and a file
LETTERS = 16  # characters a token, at most: what is read of a text for so many tokens
LAYERS = {"cosine": Cosine, "hint": Hint, "contrastive": Contrastive}


@dataclass
class DistillOptions:
    """The fields of `recover distill` beside those of finetune."""

    teacher: list[str] | None = field(
        default=None, metadata={"help": "directories of models with the same tokenizer; --model in 16 bits."}
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "of each teacher in the average of their probabilities; equal ones."}
    )
    soft: float = field(default=1.0, metadata={"help": "weight of the soft labels, T^2 KL(teacher || student)."})
    temperature: float = field(default=1.0, metadata={"help": "T, which divides the logits of both."})
    top_k: int | None = field(
        default=None, metadata={"help": "the teacher's likeliest tokens alone, and the rest as one; all of them."}
    )
    hard: float = field(default=0.0, metadata={"help": "weight of the cross-entropy with the data."})
    cosine: float = field(default=0.0, metadata={"help": "weight of 1 - cos of hidden states, of the same width."})
    hint: float = field(default=0.0, metadata={"help": "weight of a regressor between hidden states of any widths."})
    contrastive: float = field(default=0.0, metadata={"help": "weight of InfoNCE between projected hidden states."})
    layers: list[str] | None = field(
        default=None, metadata={"help": "STUDENT:TEACHER, names of layers whose outputs these three compare."}
    )
    answers_only: bool = field(default=False, metadata={"help": "soft labels for the answers in the data alone."})
    text: list[str] | None = field(
        default=None, metadata={"help": "plain text files, or .jsonl with a document in each line's text, to learn on."}
    )
    text_tokens: int = field(default=100_000, metadata={"help": "at most so many of each --text file."})
    samples: int = field(default=0, metadata={"help": "texts of max_length tokens that the teacher writes first."})
    sample_temperature: float = field(default=1.0, metadata={"help": "divides the teacher's logits as it writes."})
    teacher_cache: str | None = field(
        default=None, metadata={"help": "a directory: the teacher is asked once, and not in memory while training."}
    )
    cache_top_k: int = field(default=64, metadata={"help": "tokens kept in the cache; a row takes 6 bytes each."})
    cache_gib: float = field(default=4.0, metadata={"help": "GiB that the cache may take."})


def distill_directory(recipe: Recipe, say: Callable[[str], None] = print) -> Path:
    """Train adapters as `recipe`, which `read_recipe` made with `also=DistillOptions`, says; see `finetune`.

    Raises:
        StageError: as of `finetune`, or the teacher, a text or a weight must be another.
    """
    options: DistillOptions = recipe.also
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise StageError("recover distill must run in one process, got a launcher's")
    loss = _loss(recipe, options)
    directories = options.teacher or [str(recipe.model.model_name_or_path)]
    if not options.teacher and getattr(_config(directories[0], recipe), "quantization_config", None) is not None:
        raise StageError(f"--teacher must be named for a model that is stored in 4 bits, got none for {directories[0]}")
    if options.teacher_weights is not None and len(options.teacher_weights) != len(directories):
        raise StageError(f"--teacher_weights must be one a teacher, {len(directories)}, got"
                         f" {len(options.teacher_weights)}")  # fmt: skip
    if not (recipe.sources or options.text or options.samples > 0):
        raise StageError("--data, --text or --samples must say what to learn on, got none")
    if options.teacher_cache is not None and (loss.layers or not options.soft):
        raise StageError("--teacher_cache must come with soft labels alone: hidden states are not kept")
    if options.teacher_cache is not None and (recipe.training.packing or recipe.training.padding_free):
        raise StageError("--packing and --padding_free must be left out with --teacher_cache, which keeps examples")
    if options.teacher_cache is not None and recipe.training.dataloader_drop_last:
        raise StageError("--dataloader_drop_last must be left out with --teacher_cache: it asks each example once")
    if options.teacher_cache is not None and loss.k is not None and loss.k > options.cache_top_k:
        raise StageError(f"--top_k must be at most --cache_top_k, {options.cache_top_k}, got {loss.k}")
    refuse_unused(options, (
        ("--teacher_cache", options.teacher_cache is not None, ("cache_top_k", "cache_gib")),
        ("--text", options.text is not None, ("text_tokens",)),
        ("--samples", options.samples > 0, ("sample_temperature",)),
    ))  # fmt: skip
    if options.samples < 0 or not options.sample_temperature > 0:
        raise StageError(f"--samples and --sample_temperature must be 0 or more, and above 0, got {options.samples} and"
                         f" {options.sample_temperature}")  # fmt: skip
    tokenizer = load_tokenizer(recipe)
    # Both are looked at before a text is written or drawn.
    models = [_load(directory, recipe) for directory in directories]
    for model in models:
        _check_alike(model, recipe)
    made = _made(recipe, options, tokenizer, models[0], say)
    recipe.sources += [Source(path) for path in made]
    try:
        teachers = [LiveTeacher(*models, weights=options.teacher_weights)]
    except ValueError as error:
        raise StageError(f"--teacher_weights: {in_one_line(error)}") from None
    say(f"teacher: {', '.join(directories)}")
    del models
    return finetune(recipe, say, method=_Distill(partial(_trainer, teachers, loss, options, say)))


class _Distill(Method):
    """Adapters, by a trainer that has a teacher."""

    card = Card(
        about="Trained by nf4kernels {version} to say what a teacher says, with TRL and PEFT.", verb="recover distill"
    )

    def __init__(self, trainer: Callable[..., Trainer]) -> None:
        self.trainer = trainer


def _loss(recipe: Recipe, options: DistillOptions) -> DistillLoss:
    weights = {name: getattr(options, name) for name in LAYERS}
    pairs = [pair.partition(":")[::2] for pair in options.layers or []]
    if any(weights.values()) != bool(pairs) or not all(student and teacher for student, teacher in pairs):
        raise StageError(f"--layers must be STUDENT:TEACHER for --cosine, --hint or --contrastive, got"
                         f" {options.layers or 'none'}")  # fmt: skip
    torch.manual_seed(recipe.training.seed)  # of the projections
    terms: list[LayerLoss] = []
    if pairs:
        directories = (recipe.model.model_name_or_path, (options.teacher or [recipe.model.model_name_or_path])[0])
        ours, theirs = (_config(str(directory), recipe).get_text_config().hidden_size for directory in directories)
        for student, teacher in pairs:
            for name, weight in weights.items():
                if name == "cosine" and weight and ours != theirs:
                    raise StageError(f"--cosine must be between layers of the same width, got {ours} and {theirs}:"
                                     " --hint projects one on the other")  # fmt: skip
                widths = [] if name == "cosine" else [(ours, theirs)]
                terms += [LAYERS[name](student, teacher, *widths, weight=weight)] if weight else []
    try:
        return DistillLoss(
            options.soft, options.temperature, options.top_k, hard=options.hard, layers=terms,
            labelled_only=options.answers_only,
        )  # fmt: skip
    except ValueError as error:
        raise StageError(f"--soft, --hard, --temperature, --top_k: {in_one_line(error)}") from None


def _config(directory: str, recipe: Recipe) -> Any:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=recipe.training.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"--teacher must be a directory with a model, got {directory}: {in_one_line(error)}") from None


def _load(directory: str, recipe: Recipe) -> Any:
    """A teacher as it is stored, in the dtype and on the device of the student's dense parts."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=recipe.dtype, trust_remote_code=recipe.training.trust_remote_code,
            attn_implementation=recipe.model.attn_implementation,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise StageError(f"--teacher must be a model that can be loaded, got {directory}: {in_one_line(error)}"
                         ) from None  # fmt: skip
    return model.to(recipe.training.device).eval().requires_grad_(False)


def _check_alike(teacher: Any, recipe: Recipe) -> None:
    ours = _config(str(recipe.model.model_name_or_path), recipe).get_text_config().vocab_size
    theirs = teacher.config.get_text_config().vocab_size
    if ours != theirs:
        raise StageError(f"--teacher must have the model's vocabulary of {ours}, got {theirs}")


def _made(
    recipe: Recipe, options: DistillOptions, tokenizer: Any, teacher: Any, say: Callable[[str], None]
) -> list[Path]:
    """Files of examples of plain text and of the teacher's, each written once."""
    length = recipe.training.max_length
    if (options.text or options.samples > 0) and not length:
        raise StageError("--max_length must be the tokens of a text, got none")
    directory, files = recipe.out / MADE, []
    for text in options.text or []:
        found = windows(
            read_documents(Path(text), LETTERS * options.text_tokens), tokenizer, length, options.text_tokens
        )
        rows = [{"text": tokenizer.decode(ids, skip_special_tokens=True)} for ids in found]
        rows = [row for row in rows if row["text"].strip()]
        if not rows:
            raise StageError(f"--text must hold text of two tokens or more, got {text}")
        name = f"text-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}.jsonl"
        say(f"{text}: {len(rows)} texts of at most {length} tokens; a full one has no room for the token that ends a"
            " text, and counts as cut")  # fmt: skip
        files.append(_written(directory / name, rows))
    if options.samples > 0:
        files += _sampled(recipe, options, tokenizer, teacher, directory)
        say(f"the teacher wrote {options.samples} texts of {length} tokens")
    return files


def _written(path: Path, rows: list[dict[str, str]]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial_file:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial_file.write_text(lines, encoding="utf-8")
    return path


@torch.no_grad()
def _sampled(recipe: Recipe, options: DistillOptions, tokenizer: Any, teacher: Any, directory: Path) -> list[Path]:
    """Texts from the teacher: a token drawn from the vocabulary, the likeliest few, then drawn ones.

    Liu et al., LLM-QAT, 2023, section 2.1. A file for some texts, so that what was stopped goes on.
    """
    length, seed = recipe.training.max_length, recipe.training.seed
    wanted = {"samples": options.samples, "length": length, "temperature": options.sample_temperature, "seed": seed,
              "teacher": options.teacher or recipe.model.model_name_or_path}  # fmt: skip
    stem = f"samples-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]}"
    special = set(tokenizer.all_special_ids)
    first = [token for token in range(len(tokenizer)) if token not in special]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = getattr(teacher.generation_config, "eos_token_id", None)
    files = []
    starts = range(0, options.samples, AT_A_TIME)
    for number, start in enumerate(tqdm(starts, desc="samples", unit="file")):
        path = directory / f"{stem}-{number:05d}.jsonl"
        files.append(path)
        if path.exists():
            continue
        with torch.random.fork_rng():
            torch.manual_seed(seed + start)
            count = min(AT_A_TIME, options.samples - start)
            ids = torch.tensor(first)[torch.randint(len(first), (count, 1))].to(teacher.device)
            for tokens, how in (
                (min(GREEDY, length - 1), {"do_sample": False}),
                (length - 1 - GREEDY, {"do_sample": True, "temperature": options.sample_temperature, "top_k": 0,
                                       "top_p": 1.0}),
            ):  # fmt: skip
                if tokens > 0:
                    own = GenerationConfig(max_new_tokens=tokens, pad_token_id=pad, eos_token_id=end, **how)
                    ids = teacher.generate(ids, attention_mask=torch.ones_like(ids), generation_config=own)
        rows = [{"text": text} for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        _written(path, [row for row in rows if row["text"].strip()])
    return files


def _trainer(
    teachers: list[LiveTeacher], loss: DistillLoss, options: DistillOptions, say: Callable[[str], None], *args: Any,
    **kwargs: Any,
) -> DistillFinetuneTrainer:  # fmt: skip
    """With a cache, one whose teacher has been asked every example; `teachers` had the only reference to it."""
    trainer = DistillFinetuneTrainer(*args, distill_loss=loss, teacher=teachers.pop(), **kwargs)
    for layer in loss.layers:
        for model, name in ((trainer.model, layer.student), (trainer.teacher.models[0], layer.teacher)):  # type: ignore[attr-defined]
            layer_named(model, str(name))
    if options.teacher_cache is None:
        return trainer
    loaders = [trainer.get_train_dataloader()]
    if trainer.eval_dataset is not None:
        loaders.append(trainer.get_eval_dataloader())
    batches: list[Any] = []
    for batch in (batch for loader in loaders for batch in loader):
        own: Any = moved(batch, torch.device("cpu"))
        batches.append({**own, "use_cache": False})
    try:
        cached = cache_teacher(
            trainer.teacher, batches, Path(options.teacher_cache), k=options.cache_top_k,
            temperature=loss.temperature, limit=int(options.cache_gib * 2**30), progress=True,
        )  # fmt: skip
    except ValueError as error:
        raise StageError(f"--teacher_cache: {in_one_line(error)}") from None
    say(f"teacher's {cached.note['k']} likeliest tokens of {len(cached)} examples: {cached.nbytes / 2**20:.1f} MiB")
    trainer.teacher = cached
    return trainer
