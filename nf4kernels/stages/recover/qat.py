"""Quantization-aware training of a causal language model, from its recipe to a directory in 4 bits."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ...integrations.transformers import Nf4Config
from ...model.quantize import quantize_model
from ...nn.lora import LoraConfig
from ...recover.qat import prepare_qat, remove_qat
from ...storage.convert import convert_directory
from ...storage.directory_checks import ConversionError, Words
from ...storage.model_directory import ModelOf
from ..errors import StageError, first_line
from ..finetune.loading import in_one_line
from ..finetune.method import Method
from ..finetune.outputs import Card
from ..finetune.processes import is_main
from ..finetune.recipe import LORA_OF_TRL, LORA_TYPES, Recipe
from ..finetune.run import finetune
from ..finetune.trainer import Trainer

CODEBOOKS = ("nf4", "fp4")  # those of bitsandbytes' format, in which `nf4kernels quantize` writes
MERGED = (  # what of LoRA an adapter that is merged has
    "lora_r", "r", "lora_alpha", "lora_dropout", "use_rslora", "lora_target_modules", "target_modules",
)  # fmt: skip
LEARNING_RATE = 2e-5  # of all weights, TRL's own
MODEL, DENSE = "model", ".dense"  # in output_dir: what is written, and what it is made of
PREPARING = "nf4kernels.recover.prepare_qat: "
CARD = Card(
    "In 4 bits:", "Trained by nf4kernels {version} through the rounding to 4 bits, with TRL.", "transformers",
    ("4-bit", "quantization-aware-training", "nf4kernels"), "recover qat",
)  # fmt: skip


@dataclass
class QatOptions:
    """What a recipe of `nf4kernels recover qat` has beside those of `finetune`."""

    train: Literal["full", "lora"] = field(
        default="full",
        metadata={"help": "full: all weights; lora: adapters that are merged before each rounding, on frozen weights."},
    )
    clip: bool = field(
        default=False, metadata={"help": "no gradient for weights beyond the outermost level of their block."}
    )


def qat(recipe: Recipe, model_of: ModelOf, say: Callable[[str], None] = print) -> Path:
    """Train as `recipe`, of `read_recipe(also=QatOptions)`, says, weights rounded in each step; write them in 4 bits.

    As `finetune`: resumed by the same call, log.csv, loss.png, README.md and recipe.yaml in output_dir. The model is
    in `model` inside of it, as `nf4kernels quantize` writes one.

    Args:
        model_of: as in `convert_directory`.

    Raises:
        StageError: as `finetune`, or the recipe asks for what cannot be trained this way.
    """
    given, config = recipe.given, recipe.quantization
    if config is None or config.codebook_name not in CODEBOOKS:
        raise StageError(f"--codebook must be one of {', '.join(CODEBOOKS)}, got {given.get('codebook')}")
    if recipe.adapter is not None:
        raise StageError(f"--adapter must be left out, since what is trained here begins at zero, got {recipe.adapter}")
    if given.get("plan") is not None:
        raise StageError(f"--plan must be left out, since all layers are rounded alike here, got {given['plan']}")
    if recipe.training.world_size > 1 or recipe.training.deepspeed or recipe.training.fsdp:
        raise StageError("--output_dir must be written by one process, got several, or FSDP or DeepSpeed")
    is_full = recipe.also.train == "full"
    known = () if is_full else MERGED
    for name in sorted(recipe.flagged if is_full else given):
        if name in (*LORA_OF_TRL, *LORA_TYPES) and name not in known:
            raise StageError(f"--{name} must be left out with --train {recipe.also.train}, got {given.get(name)}")
    if is_full and "learning_rate" not in recipe.said:
        recipe.training.learning_rate = LEARNING_RATE
    if is_full and "dtype" not in given:
        recipe.dtype = torch.float32  # of the weights: steps of 2e-5 are less than bf16's rounding
    return finetune(recipe, say, method=_Qat(config, None if is_full else _lora(recipe), model_of))


def _lora(recipe: Recipe) -> LoraConfig:
    """Of PEFT's configuration what an adapter that is merged in each step can be."""
    peft, given = recipe.lora, recipe.given
    if given.get("lora_dropout"):
        raise StageError(f"--lora_dropout must be 0, since the adapter is merged, got {given['lora_dropout']}")
    if peft.target_modules not in ("all-linear", {"all-linear"}):
        raise StageError("--lora_target_modules must be left out: it is every layer in 4 bits (--skip leaves some)")
    return LoraConfig(peft.r, peft.lora_alpha, use_rslora=peft.use_rslora)


class _QatTrainer(Trainer):
    """Saves what is trained alone: the base is in its own directory."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = self.model.state_dict(keep_vars=True)
        trained = {name: tensor.detach() for name, tensor in state.items() if tensor.requires_grad}
        self._save(output_dir or self.args.output_dir, state_dict=trained)


class _Qat(Method):
    trainer = _QatTrainer
    card = CARD
    has_forecast = False

    def __init__(self, config: Nf4Config, lora: LoraConfig | None, model_of: ModelOf) -> None:
        self.config, self.lora, self.model_of = config, lora, model_of
        self.stored_dtype: torch.dtype | None = None
        self.options: dict[str, Any] = {
            "codebook": config.codebook_name, "block_size": config.block_size, "double_quant": config.double_quant,
            "scale_codebook": config.scale_codebook,
        }  # fmt: skip

    def rank(self, recipe: Recipe) -> int | None:
        return None if self.lora is None else self.lora.r

    def load(self, recipe: Recipe, has_images: bool) -> Any:
        if has_images:
            raise StageError("--data must be text for recover qat, got images")
        where = recipe.model.model_name_or_path
        options = {
            "revision": recipe.model.model_revision, "trust_remote_code": recipe.training.trust_remote_code,
        }  # fmt: skip
        try:
            stored = AutoConfig.from_pretrained(where, **options)
            if getattr(stored, "quantization_config", None) is not None:
                raise ValueError("its weights are quantized already")
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=recipe.dtype, attn_implementation=recipe.model.attn_implementation, **options
            )
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise StageError(
                f"--model_name_or_path must be a dense model that can be loaded, got {where}: {in_one_line(error)}"
            ) from None
        self.stored_dtype = stored.dtype
        if self.lora is not None:
            model.requires_grad_(False)
        try:
            prepare_qat(model, self.config.skip, self.lora, recipe.also.clip, **self.options)
        except (TypeError, ValueError) as error:
            said = in_one_line(error).removeprefix(PREPARING)
            raise StageError(f"--{said}" if said.startswith("skip ") else said) from None
        return model.to(recipe.training.device)

    def peft_config(self, recipe: Recipe) -> None:
        return None

    def parameters(self, model: Any) -> tuple[int, int]:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def take(self, trainer: Any, checkpoint: Path) -> None:
        trainer._load_from_checkpoint(str(checkpoint))

    def write(self, trainer: Any, recipe: Recipe) -> None:
        """Through a dense directory of the values that were rounded, so that the file's bits are those trained with."""
        if not is_main():
            return
        model, dense, skip = trainer.model, recipe.out / DENSE, self.config.skip
        shutil.rmtree(dense, ignore_errors=True)
        layers = remove_qat(model)
        model.save_pretrained(dense)
        trainer.processing_class.save_pretrained(dense)
        words = Words("recover qat", "--model_name_or_path", str(recipe.out / MODEL), "--skip", "a new --output_dir")
        try:
            made = convert_directory(
                dense, recipe.out / MODEL, skip=skip, dtype=self.stored_dtype, overwrite=True,
                model_of=self.model_of, progress=False, words=words,
                **{**self.options, "block_size": self.options["block_size"] or 64},
            )  # fmt: skip
        except (ConversionError, OSError) as error:
            raise StageError(first_line(error)) from None
        finally:
            shutil.rmtree(dense, ignore_errors=True)
        written = {layer.name for layer in made.report.layers}
        if written != set(layers):
            raise StageError(f"{recipe.out / MODEL} must have the layers that were trained in 4 bits, got others:"
                             f" {', '.join(sorted(written ^ set(layers)))}")  # fmt: skip
        quantize_model(model, skip, progress=False, **self.options)
