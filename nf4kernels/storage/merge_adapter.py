"""A PEFT LoRA adapter added into its base model, on disk, tensor by tensor."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..functional import dequantize, quantize
from ..model.heads import SKIP
from ..model.plan import is_conv1d, skips
from ..nn.casts import cast
from ..quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from .atomic import replacing_directory, write_json
from .convert import (
    CALLED,
    ConversionError,
    Words,
    check_outside,
    check_target,
    conversion_errors,
    convert_directory,
    copy_rest,
    read_model_config,
)  # fmt: skip
from .dense_tensors import DenseTensors
from .matrices import Header, units_of
from .model_directory import SIZE, quantization_of
from .names import fit_of_part
from .peft_format import CONFIG, StoredLora, adapter_weights, read_config, read_tensors, stored_lora
from .shards import Source, write_shards
from .tensor_files import TensorFiles, checkpoint_files

NOT_MERGED = "not merged, nothing was written"
INTO = ("base", "dequantized", "4bit")
ENDS_OF_MODELS = {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"}  # which models may tie
ModelOf = Callable[[Path, dict], tuple[nn.Module | None, str]]


@dataclass(frozen=True)
class Recipe:
    """How a dense base is quantized: the arguments of `nf4kernels.quantize`, and further layers to leave dense."""

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    scale_codebook: str = "e4m3"
    skip: tuple[str, ...] = ()

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        return quantize(weight, self.codebook, self.block_size, self.double_quant, self.scale_codebook)


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
        layers: how many layers had a LoRA merged.
        replaced: the tensors that were trained whole and took the place of base's (modules_to_save, biases).
        untied: the tensors that base ties to another one, and that differ from it now.
        nbytes: of all tensors as they were merged, dense.
        survival: of `into="4bit"`.
    """

    layers: int
    replaced: list[str]
    untied: list[str]
    nbytes: int
    survival: Survival | None = None


@dataclass(frozen=True)
class _Adapter:
    factors: dict[str, StoredLora]  # by the model's names of layers
    others: dict[str, Tensor]  # what was trained whole, by the model's names of tensors
    fan_in_fan_out: bool  # of layers that no model tells of
    is_kept_tied: bool


@dataclass
class _Plan:
    """How the tensors of a base become the merged ones, by their names in its files."""

    dense: DenseTensors
    loras: dict[str, StoredLora] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    conv1d: set[str] = field(default_factory=set)  # weights that files have as [in, out]
    untied: dict[str, str] = field(default_factory=dict)  # new tensor -> the one that it was tied to
    is_untied: bool = False
    repeated: set[str] = field(default_factory=set)  # what the adapter holds again under a tied name

    def sources(self) -> list[Source]:
        names = [*self.dense.names, *self.untied]
        return [(name, self.dense.on_meta(self._stored(name)), self.read) for name in names]

    def read(self, name: str) -> Tensor:
        """The merged tensor: the sum in fp32, rounded once, as PEFT does it."""
        stored = self._stored(name)
        dtype, packed = self.dense.on_meta(stored).dtype, stored in self.dense.packed
        if name in self.others and name not in self.loras:
            return cast(self.others[name], dtype, f"the adapter's {name}")
        if name not in self.loras:
            weight = self.dense.read(stored)
            return weight.t() if packed and name in self.conv1d else weight
        if name in self.others:  # PEFT stores the weight under an adapter of the output layer, too
            weight = cast(self.others[name], dtype, f"the adapter's {name}")
        else:
            weight = self.dense.read(stored, torch.float32)
        delta = self.delta(name)
        if name in self.conv1d and not packed:
            delta = delta.t()
        merged = cast(delta.add_(weight), dtype, f"the merged {name}")
        if not all(bound.isfinite() for bound in merged.aminmax()):
            raise ValueError(f"the merged {name} must be finite, got {'nan' if merged.isnan().any() else 'inf'}")
        return merged.t() if name in self.conv1d and packed else merged

    def delta(self, name: str) -> Tensor:
        """scaling * B @ A, fp32 [N, K]."""
        lora = self.loras[name]
        return (lora.B.float() @ lora.A.float()).mul_(lora.config.scaling)

    def _stored(self, name: str) -> str:
        return self.untied.get(name, name)


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
    fp32 and rounded once. Tokenizer, generation settings and the like are copied from base. `out_dir` appears when it
    is complete, or not at all.

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
        stored = _read_adapter(adapter, who)
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
            plan = _plan(DenseTensors(files, who), stored, model, config, words)
            survival = None
            if into == "4bit":
                recipe = recipe or (Recipe() if packed is None else _recipe_of(packed, plan.dense, who))
                survival = _survival(plan, recipe, progress)
                if confirm is not None and not confirm(survival):
                    raise ValueError(f"{who}: {NOT_MERGED}")
            with replacing_directory(out_dir) as staging:
                if into == "dequantized" and packed is None:
                    quantized = staging / "quantized"
                    _quantize(base, quantized, recipe or Recipe(), model_of, progress, words)
                    with TensorFiles(checkpoint_files(quantized, who), who) as decoded:
                        plan = _plan(DenseTensors(decoded, who), stored, model, config, words)
                        nbytes = _write(plan, config, base, staging, max_shard_size, progress)
                    shutil.rmtree(quantized)
                elif into == "4bit":
                    dense, quantized = staging / "dense", staging / "quantized"
                    dense.mkdir()
                    nbytes = _write(plan, config, base, dense, max_shard_size, progress)
                    _quantize(dense, quantized, recipe or Recipe(), model_of, progress, words)
                    shutil.rmtree(dense)
                    for entry in quantized.iterdir():
                        entry.rename(staging / entry.name)
                    quantized.rmdir()
                    if survival is not None and accept is not None and not accept(survival, staging):
                        raise ValueError(f"{who}: {NOT_MERGED}")
                else:
                    nbytes = _write(plan, config, base, staging, max_shard_size, progress)
    return Merged(len(plan.loras), sorted(plan.others), sorted(plan.untied), nbytes, survival)


def _write(plan: _Plan, config: dict[str, Any], base: Path, directory: Path, size: int, progress: bool) -> int:
    nbytes = write_shards(plan.sources(), directory, size, progress, "merge")
    write_json(directory / "config.json", _dense_config(config, plan.is_untied))
    copy_rest(base, directory)
    return nbytes


def _quantize(
    source: Path, target: Path, recipe: Recipe, model_of: ModelOf | None, progress: bool, words: Words
) -> None:
    convert_directory(
        source, target, recipe.codebook, recipe.block_size, recipe.double_quant, recipe.scale_codebook,
        skip=recipe.skip, model_of=model_of, progress=progress, words=words,
    )  # fmt: skip


def _read_adapter(directory: Path, who: str) -> _Adapter:
    weights = adapter_weights(directory, who)
    config = read_config(directory / CONFIG, who, ("fan_in_fan_out",))
    if config.get("target_parameters"):
        raise ValueError(
            f"{who}: ADAPTER must be of linear layers alone to be merged file by file, got one of experts"
            f" (target_parameters); nf4kernels.merge_model does these on the loaded model"
        )
    factors, others = read_tensors(weights, config, who)
    unknown = next((name for name in others if ".lora_" in f".{name}"), None)
    if unknown is not None:
        raise ValueError(f"{who}: ADAPTER must be of linear layers alone to be merged file by file, got {unknown}")
    loras = {name: stored_lora(config, name, A, B, directory / CONFIG, who) for name, (A, B) in factors.items()}
    tied = bool(config.get("ensure_weight_tying"))
    return _Adapter(loras, others, bool(config.get("fan_in_fan_out")), tied)


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
    stay = [n.removesuffix(".weight") for n in dense.names if n.endswith(".weight") and n not in dense.packed]
    two_d = tuple(n for n in stay if dense.on_meta(f"{n}.weight").dim() == 2)
    return Recipe(codebook, block_size, double_quant, scale_codebook, two_d)


def _plan(
    dense: DenseTensors, adapter: _Adapter, model: nn.Module | None, config: Mapping[str, Any], words: Words
) -> _Plan:
    """What becomes of each tensor; ValueError where the adapter has what base has not, or in another shape."""
    who, base = words.who, words.in_dir
    in_file = _names_in_file(model, dense)
    fit = fit_of_part([*adapter.factors, *adapter.others], {*in_file, *(_layer(name) for name in in_file)})
    plan = _Plan(dense)
    touched = {f"{fit(name) or name}.weight": lora for name, lora in adapter.factors.items()}
    whole = {fit(name) or name: tensor for name, tensor in adapter.others.items()}
    _untie(plan, in_file, {*touched, *whole}, model, adapter.is_kept_tied, who)
    modules = {} if model is None else dict(model.named_modules(remove_duplicate=False))
    for name in sorted({*touched, *whole} - plan.repeated):
        key = in_file.get(name, name if name in plan.untied else None)
        if key is None:
            raise ValueError(f"{who}: {base} must have the tensor {name}, which the adapter is for, got none")
        stored = plan.untied.get(key, key)
        meta = dense.on_meta(stored)
        shape = tuple(meta.shape)
        if name in whole:
            plan.others[key] = whole[name]
            _check_shape(tuple(whole[name].shape), shape, name, words)
        if name in touched:
            if meta.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{who}: {name} in {base} must be float32, bfloat16 or float16, got {meta.dtype}")
            transposed = is_conv1d(modules[_layer(name)]) if _layer(name) in modules else adapter.fan_in_fan_out
            plan.loras[key] = touched[name]
            came = (touched[name].B.shape[0], touched[name].A.shape[1])
            _check_shape(came, shape[::-1] if transposed and stored not in dense.packed else shape, name, words)
    named = {in_file[f"{n}.weight"] for n, m in modules.items() if is_conv1d(m) and f"{n}.weight" in in_file}
    of_adapter = set(plan.loras) if model is None and adapter.fan_in_fan_out else set()
    plan.conv1d = named | of_adapter
    return plan


def _check_shape(came: tuple[int, ...], shape: tuple[int, ...], name: str, words: Words) -> None:
    if came != shape:
        raise ValueError(
            f"{words.who}: {name} must have shape {list(shape)} as in {words.in_dir}, the adapter's is {list(came)}"
        )


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _names_in_file(model: nn.Module | None, dense: DenseTensors) -> dict[str, str]:
    """The model's name -> the file's, of tensors that are the same in both."""
    if model is None:
        return {name: name for name in dense.names}
    metas = {name: dense.on_meta(name) for name in dense.names}
    headers = [Header(name, tuple(meta.shape), meta.dtype) for name, meta in metas.items()]
    return {u.group.target: u.headers[0].name for u in units_of(model, headers) if u.group.converter is None}


def _untie(
    plan: _Plan, in_file: Mapping[str, str], touched: set[str], model: nn.Module | None, is_kept: bool, who: str
) -> None:
    """Give each of several names that the model ties its own tensor where the adapter changes one of them.

    Written into `plan.untied`; a name of the model that the file has not is written under that name.
    """
    if model is None:
        missing = ENDS_OF_MODELS - {_layer(name).rpartition(".")[2] for name in in_file}
        ends = sorted(name for name in touched if _layer(name).rpartition(".")[2] in ENDS_OF_MODELS)
        if ends and "lm_head" in missing:
            raise ValueError(
                f"{who}: transformers must be installed and know the model to tell whether {ends[0]} is tied"
            )
        return
    groups: dict[int, list[str]] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        changed = touched.intersection(names)
        stored = [name for name in names if name in in_file]
        if len(names) < 2 or not changed or not stored:
            continue
        if not is_kept:
            plan.is_untied = True
            plan.untied |= {name: in_file[stored[0]] for name in names if name not in in_file}
        elif stored[0] in changed:
            plan.repeated |= changed - {stored[0]}
        else:
            raise ValueError(f"{who}: the adapter must hold {stored[0]}, to which the model ties {min(changed)}")


def _survival(plan: _Plan, recipe: Recipe, progress: bool) -> Survival:
    """Every adapted layer before and after, one at a time; nothing is written."""
    errors: dict[str, float] = {}
    unmeasured = []
    error = total = 0.0
    for key in tqdm(plan.loras, desc="measure", unit="layer", disable=not progress):
        stays = plan.dense.packed and key not in plan.dense.packed
        if stays or key in plan.conv1d or any(skips(pattern, _layer(key)) for pattern in (*SKIP, *recipe.skip)):
            unmeasured.append(_layer(key))
            continue
        before = plan.dense.read_packed(key) if key in plan.dense.packed else recipe.quantize(plan.dense.read(key))
        after = recipe.quantize(plan.read(key))
        change = dequantize(after, torch.float32).sub_(dequantize(before, torch.float32))
        delta = plan.delta(key)
        lost = torch.linalg.vector_norm(change.sub_(delta), dtype=torch.float64).item()
        norm = torch.linalg.vector_norm(delta, dtype=torch.float64).item()
        errors[_layer(key)] = lost / norm if norm else 0.0
        error, total = error + lost**2, total + norm**2
    return Survival(errors, math.sqrt(error / total) if total else 0.0, unmeasured)
