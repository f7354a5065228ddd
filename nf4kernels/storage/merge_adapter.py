"""A PEFT LoRA adapter added into its base model, on disk, tensor by tensor."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..functional import dequantize, quantize
from ..model.heads import SKIP
from ..model.plan import skips
from ..quantized_weight import QuantizedWeight
from .atomic import replacing_directory, write_json
from .convert import convert_directory
from .dense_tensors import DenseTensors
from .directory_checks import (
    CALLED,
    TEMPLATES,
    ConversionError,
    Words,
    check_outside,
    check_target,
    conversion_errors,
    copy_rest,
    copy_tokenizer,
    has_template,
    read_model_config,
)
from .merge_experts import AdaptedExperts
from .merge_plan import Plan, layer_of, make_plan, read_adapter
from .model_directory import SIZE, ModelOf, quantization_of
from .shards import write_shards
from .tensor_files import TensorFiles, checkpoint_files

NOT_MERGED = "not merged, nothing was written"
INTO = ("base", "dequantized", "4bit")


@dataclass(frozen=True)
class Recipe:
    """How a dense base is quantized: the arguments of `nf4kernels.quantize`, and further layers to leave dense."""

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    scale_codebook: str = "e4m3"
    skip: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `nf4kernels.quantize`."""
        return {name: value for name, value in vars(self).items() if name != "skip"}

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        return quantize(weight, **self.options)


@dataclass(frozen=True)
class Survival:
    """What rounding to 4 bits again does to what the adapter adds.

    Attributes:
        layers: layer -> |(Ŵ' - Ŵ) - D| / |D|, D the adapter's product, Ŵ the layer in 4 bits before and Ŵ' after. 0
            keeps the fine-tuning, 1 is as far from it as to have merged nothing.
        error: the same over all of these layers together.
        unmeasured: the adapted layers that stay dense, which keep it.
    """

    layers: dict[str, float]
    error: float
    unmeasured: list[str]


@dataclass(frozen=True)
class Merged:
    """What `merge_adapter` wrote.

    Attributes:
        layers: how many linear layers had a LoRA merged.
        experts: how many weights of fused experts had one merged; a layer has two.
        replaced: the tensors that were trained whole and took the place of base's (modules_to_save, biases).
        untied: the tensors that base ties to another one, and that differ from it now.
        nbytes: of all tensors as they were merged, dense.
        survival: of `into="4bit"`.
        tokenizer: the files of the tokenizer and its chat template that are the adapter's.
    """

    layers: int
    experts: int
    replaced: list[str]
    untied: list[str]
    nbytes: int
    survival: Survival | None = None
    tokenizer: list[str] = field(default_factory=list)


def merge_adapter(
    adapter: str | Path,
    base: str | Path,
    out_dir: str | Path,
    into: str = "base",
    max_shard_size: int = SIZE,
    recipe: Recipe | None = None,
    confirm: Callable[[Survival], bool] | None = None,
    accept: Callable[[Survival, Path], bool] | None = None,
    model_of: ModelOf | None = None,
    progress: bool = True,
    words: Words = CALLED,
) -> Merged:
    """Write base plus the adapter's products to `out_dir`, a model directory without an adapter.

    The adapter is read whole; of base one tensor at a time, beside the output file being filled. The sum is taken in
    fp32 and rounded once. The tokenizer and the chat template are the adapter's where it has them; all else, as
    generation settings, is copied from base. `out_dir` appears when it is complete, or not at all.

    Args:
        adapter: a directory of PEFT's with a LoRA, in safetensors or `.bin`.
        base: the model's directory, dense or in 4 bits (of `nf4kernels quantize`, bitsandbytes or `save_pretrained`).
        out_dir: a directory outside of the two, which must not exist.
        into: "base", which must be dense; "dequantized": what base is in 4 bits, which a dense one is quantized for; or
            "4bit": that sum is rounded to 4 bits, of a dense base the sum with the dense weights.
        max_shard_size: bytes of an output file, at most, unless one tensor is larger.
        recipe: how a dense base is quantized; None is as `nf4kernels.quantize` has it, and of a base in 4 bits its own.
        confirm: with "4bit", asked before anything is written.
        accept: with "4bit", asked when all is written, given a directory beside `out_dir` that holds it, and that
            `out_dir` becomes or that is removed.
        model_of: given a directory and its config, (the model without its weights, on the meta device, and its class),
            or (None, why not). The model tells which of its tensors are tied, renamed or transposed in the file.
        progress: show progress bars on stderr.
        words: what messages call all this; its `in_dir` is base.

    Raises:
        ConversionError: an argument, the adapter or base is not as it must be, the two do not fit, or `confirm` or
            `accept` said no; nothing was written.
        OSError: reading or writing failed.
    """
    adapter, base, out_dir = Path(adapter).resolve(), Path(base).resolve(), Path(out_dir).resolve()
    who = words.who
    if into not in INTO:
        raise ConversionError(f"{who}: into must be one of {', '.join(INTO)}, got {into!r}")
    with conversion_errors(words):
        stored = read_adapter(adapter, who)
        config = read_model_config(base, words)
        packed = quantization_of(config, words)
        if packed is not None and into == "base":
            raise ValueError(
                f"{who}: {words.in_dir} must be the 16-bit model that was quantized, got a 4-bit one, {base};"
                f" into=dequantized merges into its decoded weights"
            )
        check_outside(base, out_dir, words)
        check_outside(adapter, out_dir, Words(who, "ADAPTER", words.out_dir))
        check_target(out_dir, False, words)
        model, _ = (None, "") if model_of is None else model_of(base, config)
        with TensorFiles(checkpoint_files(base, who), who) as files:
            plan = make_plan(DenseTensors(files, who, model), stored, model, config, words)
            survival = None
            if into == "4bit":
                recipe = recipe or (Recipe() if packed is None else _recipe_of(packed, plan.dense, who))
                survival = _survival(plan, recipe, progress)
                if confirm is not None and not confirm(survival):
                    raise ValueError(f"{who}: {NOT_MERGED}")
            with replacing_directory(out_dir) as staging:
                tokenizer = copy_tokenizer(adapter, staging)
                copy_rest(base, staging, TEMPLATES if has_template(adapter) else ())
                if into == "dequantized" and packed is None:
                    quantized = staging / "quantized"
                    _quantize(base, quantized, recipe or Recipe(), model_of, progress, words)
                    with TensorFiles(checkpoint_files(quantized, who), who) as decoded:
                        plan = make_plan(DenseTensors(decoded, who, model), stored, model, config, words)
                        nbytes = _write(plan, config, staging, max_shard_size, progress)
                    shutil.rmtree(quantized)
                elif into == "4bit":
                    dense, quantized = staging / "dense", staging / "quantized"
                    dense.mkdir()
                    nbytes = _write(plan, config, dense, max_shard_size, progress)
                    _quantize(dense, quantized, recipe or Recipe(), model_of, progress, words)
                    shutil.rmtree(dense)
                    for entry in quantized.iterdir():
                        entry.rename(staging / entry.name)
                    quantized.rmdir()
                    if survival is not None and accept is not None and not accept(survival, staging):
                        raise ValueError(f"{who}: {NOT_MERGED}")
                else:
                    nbytes = _write(plan, config, staging, max_shard_size, progress)
    replaced, untied = sorted(plan.others), sorted(plan.untied)
    return Merged(len(plan.loras), len(plan.experts), replaced, untied, nbytes, survival, tokenizer)


def _write(plan: Plan, config: dict[str, Any], directory: Path, size: int, progress: bool) -> int:
    nbytes = write_shards(plan.sources(), directory, size, progress, "merge")
    write_json(directory / "config.json", _dense_config(config, plan.is_untied))
    return nbytes


def _quantize(
    source: Path, target: Path, recipe: Recipe, model_of: ModelOf | None, progress: bool, words: Words
) -> None:
    convert_directory(
        source, target, recipe.codebook, recipe.block_size, recipe.double_quant, recipe.scale_codebook,
        skip=recipe.skip, model_of=model_of, progress=progress, words=words,
    )  # fmt: skip


def _dense_config(config: Mapping[str, Any], is_untied: bool) -> dict[str, Any]:
    new = {name: value for name, value in config.items() if name != "quantization_config"}
    if is_untied:
        new["tie_word_embeddings"] = False
        if isinstance(new.get("text_config"), dict) and "tie_word_embeddings" in new["text_config"]:
            new["text_config"] = {**new["text_config"], "tie_word_embeddings": False}
    return new


def _recipe_of(quantization: Mapping[str, Any], dense: DenseTensors, who: str) -> Recipe:
    """How the weights of a directory in 4 bits were quantized; ValueError where `convert_directory` cannot write it."""
    kinds = {(s.codebook, s.block_size, s.double_quant) for s in dense.packed.values()}
    if len(kinds) != 1 or next(iter(kinds))[0] not in ("nf4", "fp4"):
        raise ValueError(
            f"{who}: base must be in nf4 or fp4, all of it alike, to be rounded again, got {sorted(kinds)}"
        )
    codebook, block_size, double_quant = kinds.pop()
    scale_codebook = dense.read_packed(next(iter(dense.packed))).scale_codebook or "e4m3"
    packed = {*dense.packed, *dense.experts}
    stay = [n.removesuffix(".weight") for n in dense.names if n.endswith(".weight") and n not in packed]
    two_d = tuple(n for n in stay if dense.on_meta(f"{n}.weight").dim() == 2)
    return Recipe(codebook, block_size, double_quant, scale_codebook, two_d)


def _survival(plan: Plan, recipe: Recipe, progress: bool) -> Survival:
    """Every adapted layer before and after, one at a time; nothing is written."""
    errors: dict[str, float] = {}
    unmeasured = []
    error = total = 0.0
    layers = {layer_of(key): _changes(plan, key, recipe) for key in plan.loras}
    layers |= {each.name: _changes_of_experts(plan, each, recipe) for each in plan.experts}
    for name, changes in tqdm(layers.items(), desc="measure", unit="layer", disable=not progress):
        if changes is None:
            unmeasured.append(name)
            continue
        lost = norm = 0.0
        for change, delta in changes:
            lost += torch.linalg.vector_norm(change.sub_(delta), dtype=torch.float64).item() ** 2
            norm += torch.linalg.vector_norm(delta, dtype=torch.float64).item() ** 2
        errors[name] = math.sqrt(lost / norm) if norm else 0.0
        error, total = error + lost, total + norm
    return Survival(errors, math.sqrt(error / total) if total else 0.0, unmeasured)


def _changes(plan: Plan, key: str, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]] | None:
    """(Ŵ' - Ŵ, the adapter's product) of a linear layer; None of one that stays dense."""
    stays = plan.dense.packed and key not in plan.dense.packed
    if stays or key in plan.conv1d or any(skips(pattern, layer_of(key)) for pattern in (*SKIP, *recipe.skip)):
        return None
    return _changes_of_layer(plan, key, recipe)


def _changes_of_layer(plan: Plan, key: str, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    before = plan.dense.read_packed(key) if key in plan.dense.packed else recipe.quantize(plan.dense.read(key))
    after = recipe.quantize(plan.read(key))
    yield dequantize(after, torch.float32).sub_(dequantize(before, torch.float32)), plan.delta(key)


def _changes_of_experts(plan: Plan, experts: AdaptedExperts, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]] | None:
    """The same of one weight of experts, expert by expert."""
    names = [experts.name, *map(layer_of, experts.names)]
    is_skipped = any(skips(pattern, name) for pattern in (*SKIP, *recipe.skip) for name in names)
    stays = (plan.dense.packed or plan.dense.experts) and not experts.is_packed(plan.dense)
    if stays or is_skipped or experts.stays_dense(recipe.block_size):
        return None
    return experts.changes(plan.dense, recipe.options)
