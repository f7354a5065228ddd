"""What a fine-tune is to do: fields of TRL's SFTConfig and ModelConfig, of PEFT's LoraConfig, and ours.

TRL's parser, which is argparse on dataclasses, knows every field's type; a recipe's YAML goes through it as flags do.
"""

import json
import math
import warnings
from argparse import SUPPRESS
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, TaskType
from trl import ModelConfig, SFTConfig, TrlParser

from ...codebook import CODEBOOKS
from ...integrations.transformers import Nf4Config
from ...model.training import training_dtype
from ...storage.peft_format import INITS
from ..data.reading import Source
from ..errors import StageError
from ..plan_file import read_plan
from ..recipe_file import read_yaml
from .processes import in_time, meet, sharing

LEARNING_RATE = 2e-4  # QLoRA's; TRL's 2e-5 is for training all weights
DENSE = "dense"  # beside the codebooks: the weights stay as they are stored
CHECKPOINTS = 2  # kept, so that one is whole at every moment
ALIASES = {"model": "model_name_or_path", "attn": "attn_implementation", "out": "output_dir"}
PLAIN = (int, float, bool, str)
# What our own loading decides, and names that mean the same as others.
LEFT_OUT = {
    "load_in_8bit": "the weights are in 4 bits",
    "load_in_4bit": "the weights are in 4 bits always",
    "bnb_4bit_quant_type": "say codebook",
    "use_bnb_nested_quant": "say double_quant",
    "bnb_4bit_quant_storage": "nf4kernels has its own storage",
    "use_peft": "the adapters are what is trained",
    "task_type": "it is a causal language model's",
    "lora_task_type": "it is a causal language model's",
    "peft_type": "it is LoRA",
    "model_init_kwargs": "say dtype, attn_implementation, trust_remote_code or model_revision",
    "resume_from_checkpoint": "the same command resumes by itself",
    "save_only_model": "a run could not go on from such a checkpoint",
    "bf16_full_eval": "it would round the adapters before the first step",
    "fp16_full_eval": "it would round the adapters before the first step",
    "dataset_text_field": "it is text",
    "dataset_kwargs": "examples are always prepared",
    "overwrite_output_dir": "give another output_dir",
}
LORA_OF_TRL = [each.name for each in fields(ModelConfig) if each.name.startswith(("lora_", "use_rslora", "use_dora"))]
OF_PEFT_ITSELF = ("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


@dataclass
class DataOptions:
    """What TRL and PEFT have no field for."""

    data: list[str] | None = field(
        default=None,
        metadata={"help": "files of examples: JSONL, Parquet or a datasets directory, in one of the four forms."},
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "how often each of the files is drawn from, one number a file."}
    )
    held_out: float = field(
        default=0.1, metadata={"help": "examples kept out of the training: a share below 1, or a count."}
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "draws the examples that are held out; the same as seed where it is not said."}
    )
    codebook: str = field(
        default="nf4",
        metadata={"help": f"of the 4-bit weights: one of {', '.join(CODEBOOKS)}; or dense, for LoRA without 4 bits."},
    )
    block_size: int | None = field(default=None, metadata={"help": "weights that share a scale; the codebook's own."})
    double_quant: bool = field(default=True, metadata={"help": "quantize the scales, too."})
    scale_codebook: str = field(default="e4m3", metadata={"help": "of the scales: e4m3 or dynamic8."})
    skip: list[str] | None = field(default=None, metadata={"help": "layers to leave dense."})
    plan: str | None = field(
        default=None, metadata={"help": "a file of nf4kernels recover plan: options layer by layer, over those above."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "a directory with a LoRA adapter of PEFT to go on from, at its own rank and alpha; as a"
            " flag it wins over what the file of a recipe says of LoRA."
        },
    )


def _flag_type(annotation: Any) -> Any:
    """What the parser makes of a field of LoraConfig's: itself, a list of words, or text that is YAML."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if annotation in PLAIN or get_origin(annotation) is Literal:
        return annotation
    if list[str] in kinds:
        return list[str] | None
    return str | None


def _lora_options() -> tuple[type, dict[str, Any]]:
    """A dataclass of the fields of LoraConfig's that ModelConfig lacks, None where they are not said; their types."""
    hints = get_type_hints(LoraConfig)
    taken = {each.name for each in fields(ModelConfig)} | set(LEFT_OUT) | set(OF_PEFT_ITSELF)
    own = {each.name: hints[each.name] for each in fields(LoraConfig) if each.init and each.name not in taken}
    made = [
        (name, _flag_type(hint), field(default=None, metadata={"help": "a field of peft.LoraConfig."}))
        for name, hint in own.items()
    ]
    return make_dataclass("LoraOptions", made), own


LoraOptions, LORA_TYPES = _lora_options()


class _Parser(TrlParser):
    def error(self, message: str):  # argparse would print its usage, a page here, and exit
        raise StageError(message.removeprefix("argument "))


@dataclass
class Recipe:
    """What is to be done, checked, and `given`: what of it differs from the defaults, by name.

    `quantization` is None where the weights stay dense.
    """

    training: SFTConfig
    model: ModelConfig
    lora: LoraConfig
    quantization: Nf4Config | None
    sources: list[Source]
    held_out: float | int
    split_seed: int
    dtype: torch.dtype
    given: dict[str, Any]
    is_answers_only: bool | None  # None: where the data has answers
    adapter: Path | None = None  # what to go on from, of which `lora` is
    said: frozenset[str] = frozenset()  # names in the file and in flags, also with a default's value
    flagged: frozenset[str] = frozenset()  # those in flags
    also: Any = None  # what a verb beside finetune asked for, of the dataclass that it gave

    @property
    def out(self) -> Path:
        return Path(self.training.output_dir)


def field_help(also: type | None = None) -> str:
    """Every field with its type's form, its default and what it does."""
    return _parser(also).format_help()


def read_recipe(config: Path | None, flags: Sequence[str], also: type | None = None, needs_data: bool = True) -> Recipe:
    """The recipe of a YAML file, if any, and of flags as `--learning_rate 2e-4`, which win over it.

    Args:
        also: a dataclass of more fields, of another verb; the recipe's `also` is one of it.
        needs_data: whether `data` must be there; not for a verb that may make its examples itself.

    Raises:
        StageError: the file is not a mapping, a name is unknown, or a value is none of its field's.
    """
    stored = {} if config is None else read_yaml(config)
    settings = {ALIASES.get(name) or name: value for name, value in stored.items()}
    parser = _parser(also)
    names = {action.dest for action in parser._actions if action.dest != SUPPRESS}
    where = f"--config {config}: "
    for name in settings:
        _check_name(name, names, where)
    flagged = set()
    for flag in flags:
        if flag.startswith("--"):
            name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
            _check_name(name, names, "--", flag)
            name = name if name in names else name.removeprefix("no_")
            flagged.add(ALIASES.get(name) or name)
    defaults = vars(parser.parse_args([]))
    try:
        parser.parse_args(_as_flags(settings, defaults))
    except StageError as error:
        raise StageError(where + str(error)) from None
    values = vars(parser.parse_args(_as_flags(settings, defaults) + list(flags)))
    said = flagged | {name for name, value in settings.items() if value is not None}
    if values["adapter"] is not None:
        values = _without_lora(values, flagged if "adapter" in flagged else said, defaults)
    given = {name: value for name, value in values.items() if value != defaults[name]}
    recipe = _recipe(values, given, needs_data)
    recipe.said, recipe.flagged = frozenset(said), frozenset(flagged)
    recipe.also = None if also is None else also(**_of(also, values))
    return recipe


def _parser(also: type | None = None) -> _Parser:
    kinds: list[Any] = [DataOptions, ModelConfig, LoraOptions, SFTConfig]
    parser = _Parser(
        kinds if also is None else [*kinds, also], allow_abbrev=False, add_help=False,
        prog="nf4kernels finetune", usage="nf4kernels finetune [--config FILE] [--FIELD VALUE ...]",
    )  # fmt: skip
    parser.set_defaults_with_config(
        learning_rate=LEARNING_RATE, output_dir=None, report_to="none", assistant_only_loss=None, bf16=None, dtype=None,
        save_total_limit=CHECKPOINTS, lora_target_modules=["all-linear"],
    )  # fmt: skip
    for alias, name in ALIASES.items():
        parser.add_argument(f"--{alias}", dest=name, default=SUPPRESS, help=f"the same as --{name}")
    return parser


def _without_lora(values: dict[str, Any], said: Collection[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values where LoRA's own are an adapter's; StageError where one was said by what is to win over that."""
    own = [*LORA_OF_TRL, *LORA_TYPES]
    for name in own:
        if name in said:
            raise StageError(f"--{name} must be left out with --adapter, which has its own, got {values[name]}")
    return {**values, **{name: defaults[name] for name in own}}


def _check_name(name: str, names: set[str], where: str, shown: str | None = None) -> None:
    if name in LEFT_OUT:
        raise StageError(f"{where if shown is None else ''}{shown or name} must be left out: {LEFT_OUT[name]}")
    stem = name.removeprefix("no_")
    if name in names or name in ALIASES or (shown is not None and stem in names):
        return
    close = get_close_matches(name, names, 1)
    hint = f"; did you mean {'--' if shown else ''}{close[0]}?" if close else ""
    raise StageError(
        f"{where if shown is None else ''}{shown or name} must be a field of SFTConfig, ModelConfig or LoraConfig, or"
        f" one of ours, got an unknown name{hint}"
    )


def _as_flags(settings: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """YAML's values as a person would type them. YAML takes 2e-4 for text, argparse takes it for the number."""
    flags = []
    for name, value in settings.items():
        as_json = name in LORA_TYPES and _flag_type(LORA_TYPES[name]) == str | None
        if isinstance(value, dict) or (isinstance(value, list) and as_json):
            flags.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None or defaults[name] is not None:
            flags.append(f"--{name}={'none' if value is None else value}")
    return flags


def _recipe(values: dict[str, Any], given: dict[str, Any], needs_data: bool) -> Recipe:
    values = {**values, "data": values["data"] or []}
    for name, what in (("model_name_or_path", "a model's directory"), ("data", "a file of examples")):
        if not values[name] and (needs_data or name != "data"):
            raise StageError(f"--{name} must be {what}, got none")
    if values["output_dir"] is None:
        raise StageError("--output_dir must be a directory to write, got none")
    if values["save_total_limit"] is not None and values["save_total_limit"] < CHECKPOINTS:
        raise StageError(f"--save_total_limit must be {CHECKPOINTS} or more, so that one checkpoint is always whole,"
                         f" got {values['save_total_limit']}")  # fmt: skip
    weights = values["weights"] or [1.0] * len(values["data"])
    if len(weights) != len(values["data"]):
        raise StageError(f"--weights must be one a file of --data, {len(values['data'])}, got {len(weights)}")
    if values["plan"] is not None and values["codebook"] == DENSE:
        raise StageError(f"--plan must be left out with --codebook {DENSE}, got both")
    held_out = values["held_out"]
    if not math.isfinite(held_out) or held_out < 0 or (held_out >= 1 and held_out != int(held_out)):
        raise StageError(f"--held_out must be a share below 1 or a count, got {held_out}")
    held_out = int(held_out) if held_out >= 1 else held_out
    if values["max_length"] is not None and values["max_length"] < 1:
        raise StageError(f"--max_length must be 1 or more, or none for no limit, got {values['max_length']}")
    if values["seed"] < 0:
        raise StageError(f"--seed must be 0 or more, got {values['seed']}")
    adapter = None if values["adapter"] is None else Path(values["adapter"])
    dtype = _dtype(values["dtype"] or ("float16" if values["fp16"] else None), values["use_cpu"])
    is_answers_only, on_cpu = values["assistant_only_loss"], values["use_cpu"] or not torch.accelerator.is_available()
    filled = {
        **values, "assistant_only_loss": bool(is_answers_only),
        "bf16": dtype == torch.bfloat16 if values["bf16"] is None else values["bf16"],
        # it scales the loss, whose gradients are less than fp16 holds
        "fp16": values["fp16"] or (dtype == torch.float16 and not on_cpu and not values["bf16"]),
        "use_cpu": on_cpu,
        "ddp_broadcast_buffers": bool(values["ddp_broadcast_buffers"]),  # they are scales, which are frozen
        **sharing(values["deepspeed"], values["fsdp"], values["fsdp_config"], values["use_cpu"]),
    }  # fmt: skip
    meet(filled["use_cpu"], values["ddp_backend"], values["ddp_timeout"])
    try:
        quantization = None if values["codebook"] == DENSE else Nf4Config(
            values["codebook"], values["block_size"], values["double_quant"], values["scale_codebook"],
            skip=values["skip"] or (), plan=read_plan(values["plan"]),
        )  # fmt: skip
        model = ModelConfig(**_of(ModelConfig, values))
        with (
            in_time(values["ddp_timeout"]),
            warnings.catch_warnings(),
        ):  # of TRL's own default, which transformers renamed
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            training = SFTConfig(**_of(SFTConfig, filled))
        lora = _lora(values) if adapter is None else _lora_of(adapter)
    except (TypeError, ValueError) as error:
        raise StageError(" ".join(str(error).split())) from None
    package = _package_of(training.optim.value)
    if package is not None and find_spec(package) is None:
        raise StageError(f"--optim {training.optim.value} needs {package}, run: pip install {package}, or say"
                         " adamw_torch")  # fmt: skip
    if training.activation_offloading and training.use_cpu:
        raise StageError("--activation_offloading must be left out on a CPU, whose memory the activations are in")
    sources = [Source(Path(path), weight) for path, weight in zip(values["data"], weights)]
    split_seed = training.seed if values["split_seed"] is None else values["split_seed"]
    return Recipe(
        training, model, lora, quantization, sources, held_out, split_seed, dtype, given, is_answers_only, adapter
    )


def _package_of(optimizer: str) -> str | None:
    """What computes it, where that is neither torch nor ours nor what transformers itself tells of."""
    if optimizer == "paged_adamw_32bit":
        return None  # nf4kernels.optim.PagedAdamW
    if optimizer.startswith("adamw_torch_") and optimizer.endswith("bit"):
        return "torchao"
    of_bitsandbytes = "torch" not in optimizer and any(mark in optimizer for mark in ("paged", "8bit", "bnb"))
    return "bitsandbytes" if of_bitsandbytes else None


def _of(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {each.name: values[each.name] for each in fields(kind) if each.init and each.name in values}


def _dtype(name: str | None, use_cpu: bool) -> torch.dtype:
    if name in (None, "auto"):
        return training_dtype("cpu" if use_cpu else torch.accelerator.current_accelerator(True) or "cpu")
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise StageError(f"--dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return dtype


def _lora(values: dict[str, Any]) -> LoraConfig:
    """TRL's lora_ names first, then PEFT's own, which win."""
    options = {
        "r": values["lora_r"], "lora_alpha": values["lora_alpha"], "lora_dropout": values["lora_dropout"],
        "target_modules": _one_or_more(values["lora_target_modules"]),
        "target_parameters": values["lora_target_parameters"], "modules_to_save": values["lora_modules_to_save"],
        "use_rslora": values["use_rslora"], "use_dora": values["use_dora"],
        "revision": values["model_revision"],  # of the base, which PEFT loads it on
    }  # fmt: skip
    for name, hint in LORA_TYPES.items():
        value = values[name]
        if value is None:
            continue
        kind = _flag_type(hint)
        if kind == str | None:
            value = yaml.safe_load(value)
            try:
                type_validator(name, value, hint)
            except StrictDataclassError as error:
                raise StageError(f"--{name}: {' '.join(str(error).split())}") from None
        elif kind == list[str] | None:
            value = _one_or_more(value) if str in get_args(hint) else value
        options[name] = value
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **options)


def _lora_of(adapter: Path) -> LoraConfig:
    """The configuration of an adapter that is there; StageError where its base is not the model as it is."""
    if not adapter.is_dir():
        raise StageError(f"--adapter must be a directory with an adapter of PEFT, got {adapter}")
    try:
        lora = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(f"--adapter must be a directory with an adapter of PEFT, got {adapter}:"
                         f" {' '.join(str(error).split())}") from None  # fmt: skip
    if not isinstance(lora, LoraConfig):
        raise StageError(f"--adapter must be a LoRA adapter, got {lora.peft_type} in {adapter}")
    if lora.task_type not in (None, TaskType.CAUSAL_LM):
        raise StageError(f"--adapter must be of a causal language model, got task_type {lora.task_type} in {adapter}")
    if lora.init_lora_weights not in INITS:
        raise StageError(f"--adapter must have begun beside the base weight, by init_lora_weights one of"
                         f" {', '.join(map(str, INITS))}, got {lora.init_lora_weights!r} in {adapter}")  # fmt: skip
    return lora


def _one_or_more(words: list[str] | None) -> list[str] | str | None:
    """One word is a pattern, or all-linear, which PEFT takes as text."""
    return words[0] if words and len(words) == 1 else words
