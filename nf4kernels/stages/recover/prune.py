"""Prune the model of a directory, with retraining between steps, and write what is left as a directory."""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from ...quantized_weight import BLOCK_SIZES
from ...recover.agreement import Agreement, agreement
from ...recover.pruning.prune import prunable, prune_model, share_of_zeros
from ...recover.pruning.schedule import pruning_schedule
from ...recover.pruning.shrink import prune_structure
from ...recover.pruning.structure import MULTIPLE, UNITS, Structure, find_structure, units_in
from ...recover.pruning.structure_scores import methods_of
from ...storage.atomic import replacing_directory, write_json
from ...storage.convert import convert_directory
from ...storage.directory_checks import ConversionError, Words, check_outside, check_target, copy_rest
from ...storage.model_directory import ModelOf
from ..causal_model import load_causal_model, load_tokenizer
from ..errors import StageError, first_line, refuse_unused
from .retraining import Retraining, Texts, Windows, retrain

WORDS = Words("recover prune", "--model", "--output_dir", "--skip", "--overwrite")
OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in a configuration
STATE = "prune.json"  # in the directory of a run that is under way: what was asked for, and the steps that are done
CHANNELS = ("intermediate_size", "ffn_dim", "n_inner")  # what configurations call the channels of an MLP
ALIASES = {"output": "output_dir"}


@dataclass
class PruneOptions:
    """The fields of `nf4kernels recover prune`."""

    model: str | None = field(default=None, metadata={"help": "a dense Hugging Face directory with its tokenizer."})
    output_dir: str | None = field(default=None, metadata={"help": "the directory to write."})
    pattern: str = field(
        default="unstructured",
        metadata={"help": "unstructured or n:m as 2:4, which leave zeros; heads, channels or layers, which are cut."},
    )
    method: str = field(
        default="magnitude", metadata={"help": "magnitude, wanda, gradient; of layers influence or kl, not wanda."}
    )
    share: float | None = field(default=None, metadata={"help": "to prune, in [0, 1); of n:m it is 1 - n/m."})
    text: str | None = field(
        default=None, metadata={"help": ".txt or .jsonl (`text` of each line): what scores and retraining run on."}
    )
    held_out: str | None = field(default=None, metadata={"help": "such a file to measure the result on."})
    tokens: int = field(default=2048, metadata={"help": "of text for the scores, and of held_out."})
    length: int = field(default=64, metadata={"help": "tokens of a window."})
    scope: str | None = field(default=None, metadata={"help": "where the smallest are looked for: row, layer, model."})
    skip: list[str] | None = field(default=None, metadata={"help": "layers that unstructured and n:m leave alone."})
    multiple: int = field(default=MULTIPLE, metadata={"help": "the channels that stay are a multiple of it."})
    steps: int = field(default=1, metadata={"help": "in which the share is reached, along a cubic schedule."})
    retrain: int = field(default=0, metadata={"help": "optimizer steps after each: LoRA, KL to the model as it was."})
    batch: int = field(default=8, metadata={"help": "windows of an optimizer step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the retraining."})
    lora_r: int = field(default=16, metadata={"help": "rank of the retraining's adapters, which are merged."})
    seed: int = field(default=0, metadata={"help": "draws windows and adapters."})
    quantize: bool = field(default=False, metadata={"help": "write 4 bits, as nf4kernels quantize does."})
    codebook: str = field(default="nf4", metadata={"help": "of quantize: nf4 or fp4."})
    block_size: int = field(default=64, metadata={"help": "of quantize: weights that share a scale."})
    overwrite: bool = field(default=False, metadata={"help": "replace output_dir if it holds a model."})


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        out: the directory.
        zeros: the share of the layers' weights that are zero; None where something was cut.
        left, of: heads, channels of a block or layers that are left, and that there were; None of masks.
        bytes_before, bytes_after: of the tensors' files.
        measured: of the pruned model in 16 bits beside the model as it was, where a text was held out.
    """

    out: Path
    zeros: float | None
    left: int | None
    of: int | None
    bytes_before: int
    bytes_after: int
    measured: Agreement | None


def prune(options: PruneOptions, model_of: ModelOf | None = None) -> Pruned:
    """Prune the model of a directory as `options` say; an interrupted run of several steps goes on after the last one.

    Args:
        model_of: for `quantize`, as in `convert_directory`.

    Raises:
        StageError: an option, the model or a text is not as it must be; nothing is written.
    """
    source, out = _checked(options)
    model = _load(_begun(options, out) or source)
    done = _steps_done(options, out)
    tokenizer = load_tokenizer([source])
    structure = _structure(options, _original_config(source, model), model)
    how = Windows(options.tokens, options.length, options.batch)
    texts = Texts(options.text, options.held_out, how, options.retrain, tokenizer, model.device)
    teacher = _load(source) if options.retrain or texts.held_out else None
    training = Retraining(options.retrain, options.learning_rate, options.lora_r)
    try:
        final = _final_share(options)
        schedule = pruning_schedule(final, options.steps)[done:]
        total = len(schedule) * (1 + options.retrain)
        several = options.steps > 1 or options.retrain > 0
        with tqdm(total=total, desc="prune", unit="step", disable=not several) as bar:
            for step, share in enumerate(schedule, done):
                masks = _pruned(model, options, structure, share, texts, not several)
                bar.update()
                if options.retrain:
                    torch.manual_seed(options.seed + step)  # adapters are drawn
                    batches = list(texts.drawn(options.retrain, options.batch, options.seed + step))
                    retrain(model, teacher, masks, training, batches, bar)
                if step + 1 < options.steps:
                    _keep(model, options, source, out, step + 1)
        measured = agreement(model, teacher, texts.held_out) if texts.held_out and teacher is not None else None
        zeros = None if structure else share_of_zeros(model, prunable(model, options.skip or ()))
        left = None if structure is None else units_in(model, structure, options.pattern)
    except ValueError as error:
        raise StageError(_said(error)) from None
    del teacher
    _write(model, options, structure, source, out, model_of)
    shutil.rmtree(_partial(out), ignore_errors=True)
    of = None if structure is None else _whole(structure, options.pattern)
    before, after = (sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (source, out))
    return Pruned(out, zeros, left, of, before, after, measured)


def _checked(options: PruneOptions) -> tuple[Path, Path]:
    """(the model's directory, the output's) of options that can be right."""
    for name, what in (("model", "a model's directory"), ("output_dir", "a directory to write")):
        if not getattr(options, name):
            raise StageError(f"--{name} must be {what}, got none")
    known = methods_of(options.pattern)
    if options.method not in known:
        raise StageError(f"--method must be one of {', '.join(known)} for {options.pattern}, got {options.method}")
    if options.share is not None and not 0 <= options.share < 1:
        raise StageError(f"--share must be in [0, 1), got {options.share}")
    if options.share is None and ":" not in options.pattern:
        raise StageError(f"--share must be given with --pattern {options.pattern}, got none")
    if ":" in options.pattern and options.steps > 1:
        raise StageError(
            f"--steps must be 1 with --pattern {options.pattern}, which has one share, got {options.steps}"
        )
    if options.text is None and (options.retrain or options.method != "magnitude"):
        reason = "--retrain" if options.retrain else f"--method {options.method}"
        raise StageError(f"--text must be a file for {reason}, got none")
    for name in ("tokens", "steps", "batch", "lora_r", "multiple", "length"):
        if getattr(options, name) < (2 if name == "length" else 1):
            raise StageError(f"--{name} must be at least {2 if name == 'length' else 1}, got {getattr(options, name)}")
    if options.retrain < 0 or not options.learning_rate > 0:
        raise StageError(f"--retrain and --learning_rate must be 0 or more, and above 0, got {options.retrain} and"
                         f" {options.learning_rate}")  # fmt: skip
    if options.quantize and (options.codebook not in ("nf4", "fp4") or options.block_size not in BLOCK_SIZES[1:]):
        raise StageError(
            f"--codebook and --block_size must be nf4 or fp4, and one of {', '.join(map(str, BLOCK_SIZES[1:]))}, with"
            f" --quantize, got {options.codebook} and {options.block_size}"
        )
    is_cut = options.pattern in UNITS
    refuse_unused(options, (
        ("--pattern unstructured or n:m", not is_cut, ("skip",)),
        ("--pattern unstructured", options.pattern == "unstructured", ("scope",)),
        ("--pattern channels", options.pattern == "channels", ("multiple",)),
        ("--quantize", options.quantize, ("codebook", "block_size")),
    ))  # fmt: skip
    source, out = Path(str(options.model)).resolve(), Path(str(options.output_dir)).resolve()
    try:
        quantization = json.loads((source / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise StageError(f"--model must be a Hugging Face model directory, got {source}: {first_line(error)}") from None
    if quantization:
        raise StageError("--model must be dense, got one in 4 bits: prune first, then quantize (--quantize)")
    try:
        check_outside(source, out, WORDS)
        check_target(out, options.overwrite, WORDS)
    except ConversionError as error:
        raise StageError(str(error).removeprefix("recover prune: ")) from None
    return source, out


def _load(directory: Path) -> Any:
    model = load_causal_model(directory, dense=True).eval()
    model.config.use_cache = False
    return model


def _final_share(options: PruneOptions) -> float:
    if options.share is not None:
        return options.share
    n, _, m = options.pattern.partition(":")
    return 1 - int(n) / int(m) if n.isdecimal() and m.isdecimal() and int(m) else 0.0  # which prune_model refuses


def _structure(options: PruneOptions, config: Any, model: nn.Module) -> Structure | None:
    """With the counts of the model as it was, which shares are of."""
    if options.pattern not in UNITS:
        return None
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise StageError(f"--model must have num_attention_heads in its config.json for {options.pattern}, got {heads}")
    own = model.config.get_text_config()  # type: ignore[operator,union-attr]
    try:
        found = find_structure(model, own.num_attention_heads, getattr(own, "num_key_value_heads", None))
    except ValueError as error:
        raise StageError(f"--model: {_said(error)}") from None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    channels = getattr(config, _channels_field(config), found.channels)
    return Structure(
        found.stack, found.names, heads, kv_heads, found.width, channels, config.num_hidden_layers, found.counts
    )


def _channels_field(config: Any) -> str:
    return next((name for name in CHANNELS if hasattr(config, name)), CHANNELS[0])


def _original_config(source: Path, model: Any) -> Any:
    return type(model.config).from_pretrained(source).get_text_config()


def _whole(structure: Structure, unit: str) -> int:
    return {"heads": structure.kv_heads, "channels": structure.channels, "layers": structure.blocks}[unit]


def _pruned(
    model: Any, options: PruneOptions, structure: Structure | None, share: float, texts: Texts, progress: bool
) -> dict[str, Tensor | None]:
    """Layers with the masks that hold of them now, None of those without one."""
    if structure is None:
        masks = prune_model(
            model, share, options.pattern, options.method, texts.scored, options.scope, options.skip or (),
            progress=progress,
        )  # fmt: skip
        return dict(masks)
    kept = prune_structure(
        model, structure, options.pattern, share, options.method, texts.scored, options.multiple, progress
    )
    _tell_config(model, structure, options.pattern, kept)
    return dict.fromkeys(prunable(model))


def _tell_config(model: Any, structure: Structure, unit: str, kept: list[Tensor]) -> None:
    """Write into the model's configuration what was cut out, and into its blocks their new numbers."""
    config = model.config.get_text_config()
    count = len(kept[0])
    if unit == "channels":
        setattr(config, _channels_field(config), count)
    elif unit == "heads":
        config.head_dim = structure.width  # else it is hidden_size / num_attention_heads
        config.num_attention_heads, config.num_key_value_heads = count * structure.group, count
    else:
        for name, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == config.num_hidden_layers and name in OF_EACH_LAYER:
                setattr(config, name, [value[int(index)] for index in kept[0]])
        config.num_hidden_layers = count
        for index, block in enumerate(structure.stack_of(model)):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index  # type: ignore[assignment]  # a number of transformers'


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.steps")


def _keep(model: Any, options: PruneOptions, source: Path, out: Path, done: int) -> None:
    """The model after a step, for a run that goes on."""
    with replacing_directory(_partial(out)) as staging:
        model.save_pretrained(staging)
        copy_rest(source, staging)
        write_json(staging / STATE, {"options": asdict(options), "done": done})


def _begun(options: PruneOptions, out: Path) -> Path | None:
    """The directory of an interrupted run with the same options."""
    return _partial(out) if _steps_done(options, out) else None


def _steps_done(options: PruneOptions, out: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        state = json.loads((_partial(out) / STATE).read_text(encoding="utf-8"))
        if state["options"] == asdict(options):
            return int(state["done"])
    return 0


def _write(
    model: Any, options: PruneOptions, structure: Structure | None, source: Path, out: Path, model_of: ModelOf | None
) -> None:
    """The directory, in 16 bits or 4; of a shrunk model only when transformers makes the same of it."""
    dense = out if not options.quantize else out.with_name(f".{out.name}.dense")
    model.config.use_cache = True
    try:
        with replacing_directory(dense) as staging:
            model.save_pretrained(staging)
            copy_rest(source, staging)
            if structure is not None:
                _check_loads(staging, model)
        if options.quantize:
            convert_directory(
                dense, out, options.codebook, options.block_size, skip=options.skip or (), model_of=model_of,
                overwrite=options.overwrite, words=WORDS,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        raise StageError(str(error).removeprefix("recover prune: ")) from None
    finally:
        if options.quantize:
            shutil.rmtree(dense, ignore_errors=True)


@torch.no_grad()
def _check_loads(directory: Path, model: Any) -> None:
    """StageError where the configuration does not say all that was cut."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(model.device).eval()
        same = torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-2, atol=1e-2)
    except (RuntimeError, ValueError, OSError) as error:
        raise StageError(f"--model must load with what was cut, got {first_line(error)}") from None
    if not same:
        raise StageError("--model must load with what was cut, got another output: its config.json cannot say it")


def _said(error: Exception) -> str:
    """A message of nf4kernels.recover in the words of the command line."""
    text = str(error)
    return text.partition(": ")[2] if text.startswith("nf4kernels.recover.") else text
