"""A Hugging Face safetensors directory to 4 bits, in bitsandbytes' format, or to int8, one dense tensor at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..functional import quantize, quantize_experts
from ..model.heads import SKIP
from ..model.plan import skips
from ..model.quantize import squared_error
from ..model.report import QuantizedLayer, QuantizeReport, SkippedLayer
from ..model.targets import merged
from ..nn.casts import cast
from ..nn.experts_layout import as_rows
from ..quantized_weight import INT8, WEIGHT_DTYPES
from .atomic import TargetError, replacing_directory, write_json
from .bitsandbytes_format import weight_to_tensors
from .directory_checks import (
    CALLED,
    ConversionError,
    Words,
    check_outside,
    check_target,
    copy_rest,
    read_model_config,
)
from .experts_format import experts_to_tensors
from .layer_choice import Choice, choose
from .matrices import Header, Matrix, Unit, matrices_of, units_of
from .tensor_files import INDEX, check_index, checkpoint_files, write_tensors

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by the words of safetensors' headers
Plan = Mapping[str, Mapping[str, Any] | None]  # as of `nf4kernels.quantize_model`


@dataclass(frozen=True)
class Conversion:
    """What `convert_directory` did.

    Attributes:
        report: sizes and errors, layer by layer.
        choice: which layers, who chose them, and why the others stayed dense.
        uneven: the layers in which a row is not a whole number of blocks.
        experts: the weights of experts in 4 bits, for which bitsandbytes has no format.
    """

    report: QuantizeReport
    choice: Choice
    uneven: list[str]
    experts: list[str]


@dataclass(frozen=True)
class _Options:
    codebook: str
    block_size: int
    double_quant: bool
    scale_codebook: str
    dtype: torch.dtype | None
    plan: Plan = field(default_factory=dict)

    @property
    def is_for_bitsandbytes(self) -> bool:
        """Whether bitsandbytes is to read it: it has no plans, and its 8-bit formats are others than ours."""
        return self.codebook != INT8 and not self.plan

    def of(self, layer: str) -> dict[str, Any]:
        """The keyword arguments of `quantize` for a layer, or for one of the two weights of experts."""
        planned = self.plan.get(layer) or self.plan.get(layer.rpartition(".")[0]) or {}
        usual = {"codebook": self.codebook, "block_size": self.block_size, "double_quant": self.double_quant,
                 "scale_codebook": self.scale_codebook}  # fmt: skip
        return merged(usual, planned)

    def quantize(self, weight: Tensor, layer: str = "") -> Any:
        """A QuantizedWeight, or QuantizedExperts of a 3-D weight."""
        return (quantize if weight.dim() == 2 else quantize_experts)(weight, **self.of(layer))


def convert_directory(
    in_dir: str | Path,
    out_dir: str | Path,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    scale_codebook: str = "e4m3",
    dtype: torch.dtype | None = None,
    skip: Iterable[str] = (),
    overwrite: bool = False,
    model_of: Callable[[Path, dict], tuple[nn.Module | None, str]] | None = None,
    progress: bool = True,
    words: Words = CALLED,
    plan: Plan | None = None,
) -> Conversion:
    """Write the model in `in_dir` to `out_dir` with its linear layers in 4 bits, in bitsandbytes' format.

    transformers with bitsandbytes loads the result, and so does `nf4kernels.load_checkpoint`; with fused experts in 4
    bits, or in int8, for which bitsandbytes has no format, only the latter. One dense tensor is in memory at a time, or
    one layer's experts, beside the output file being filled. Tokenizer, generation settings and the like are copied.
    `out_dir` appears when it is complete, or not at all.

    Args:
        in_dir: with config.json, and model.safetensors or its shards and their index.
        out_dir: a directory outside `in_dir`, which must not exist unless `overwrite` is set.
        codebook: "nf4", "fp4" or "int8"; block_size, double_quant, scale_codebook: as in `nf4kernels.quantize`.
        dtype: of the tensors that stay dense and of the layers' arithmetic; None keeps what is stored. The stored
            values are quantized, not their roundings to `dtype`.
        skip: layers to leave dense, as in `nf4kernels.quantize_model`; they add to SKIP.
        overwrite: replace `out_dir` if it holds a model.
        model_of: given `in_dir` and its config, (the model without its weights, on the meta device, and its class), or
            (None, why not). The model says which matrices are linear layers; without one, their names do.
        progress: show a progress bar on stderr.
        words: what messages call all this.
        plan: as in `nf4kernels.quantize_model`: for layers by the model's names the options that are not as for all,
            None for dense; no adapters. The result says so in its configuration, which bitsandbytes does not read.

    Returns:
        What was done.

    Raises:
        ConversionError: an argument, the model or a weight is not as it must be (the message names it), or a finite
            value of a dense tensor does not fit `dtype`.
        TypeError, ValueError: a quantization option is out of its range.
        OSError: reading or writing failed.
    """
    given_in = in_dir
    in_dir, out_dir = Path(in_dir).resolve(), Path(out_dir).resolve()
    plan = _checked_plan(plan, words)
    options, skip = _Options(codebook, block_size, double_quant, scale_codebook, dtype, plan), tuple(skip)
    checked = options.quantize(torch.empty(0, block_size))
    weight_to_tensors(checked, bitsandbytes=options.is_for_bitsandbytes)  # every check of an option
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{words.who}: dtype must be float32, bfloat16, float16 or None, got {dtype}")
    config = _read_dense_config(in_dir, words)
    check_outside(in_dir, out_dir, words)
    shards = _read_headers(in_dir, words.who)
    model, source = (None, "their names") if model_of is None else model_of(in_dir, config)
    units = units_of(model, (header for shard in shards.values() for header in shard))
    matrices = matrices_of(units, experts=model is not None)
    patterns = _patterns(matrices, model, skip, words)
    patterns += tuple(name for name, planned in plan.items() if planned is None)
    try:
        choice = choose(model, source, config, matrices, patterns, block_size)
    except ValueError as error:
        raise ConversionError(f"{words.who}: {error}") from None
    quantized = _quantized(choice, matrices)
    known = {name.rpartition(".")[0] if matrix.is_experts else name for name, matrix in quantized.items()}
    for name in (name for name, planned in plan.items() if planned is not None and name not in known):
        reason = choice.reasons.get(name, f"no layer of {choice.source}")
        expected = f"{words.plan} must name layers that can be quantized"
        raise ConversionError(f"{words.who}: {expected}, got {name} ({reason})")
    if not quantized:
        expected = f"{given_in} must have a linear layer to quantize"
        raise ConversionError(f"{words.who}: {expected}, got none ({choice.source})")
    others = [name for name in choice.layers if name not in quantized and not matrices[name].is_experts]
    new_config = _new_config(config, options, quantized, [*choice.dense, *others])
    check_target(out_dir, overwrite, words)

    try:
        with replacing_directory(out_dir) as staging:
            report = _write_shards(in_dir, staging, shards, units, quantized, model, options, progress, words.who)
            write_json(staging / "config.json", new_config)
            copy_rest(in_dir, staging)
    except TargetError as error:
        raise ConversionError(f"{words.who}: {words.out_dir} {error}") from None
    uneven = [
        name for name, matrix in quantized.items()
        if not (plan or matrix.is_experts) and matrix.shape[-1] % block_size
    ]  # fmt: skip
    return Conversion(report, choice, uneven, [name for name, matrix in quantized.items() if matrix.is_experts])


def _patterns(
    matrices: Mapping[str, Matrix], model: nn.Module | None, skip: tuple[str, ...], words: Words
) -> tuple[str, ...]:
    """Every pattern that leaves a layer dense. `skip` may mean the model's names or the file's."""
    modules = [] if model is None else [name for name, _ in model.named_modules(remove_duplicate=False)]
    in_file = {}
    for pattern in skip:
        by_file = [
            name for name, matrix in matrices.items() if any(skips(pattern, n) for n in matrix.unit.layers_in_file)
        ]
        if not by_file and not any(skips(pattern, name) for name in (*matrices, *modules)):
            raise ConversionError(f"{words.who}: {words.skip} must match a layer, got {pattern!r}")
        in_file.update(dict.fromkeys(name for name in by_file if not skips(pattern, name)))
    return (*SKIP, *skip, *in_file)


def _checked_plan(plan: Plan | None, words: Words) -> Plan:
    """ConversionError for what a file has no place for, before anything is read."""
    for name, planned in (plan or {}).items():
        if planned is not None and "lora" in planned:
            expected = f"{words.plan} must have no adapters, which are files of their own"
            raise ConversionError(f"{words.who}: {expected}, got one on {name}")
        try:
            quantize(torch.empty(1, 1, device="meta"), **(planned or {}))
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{words.who}: {words.plan}: {name}: {error}") from None
    return plan or {}


def _quantized(choice: Choice, matrices: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """The chosen layers whose dtype can be quantized; of experts both weights or none."""
    found = {name: matrices[name] for name in choice.layers if matrices[name].unit.can_be_quantized}
    pairs = Counter(name.rpartition(".")[0] for name, matrix in found.items() if matrix.is_experts)
    return {n: matrix for n, matrix in found.items() if not matrix.is_experts or pairs[n.rpartition(".")[0]] == 2}


def _read_dense_config(in_dir: Path, words: Words) -> dict[str, Any]:
    config = read_model_config(in_dir, words)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConversionError(f"{words.who}: {words.in_dir} must hold a dense model, got one quantized by {method}")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        file = in_dir / "config.json"
        raise ConversionError(f"{words.who}: architectures in {file} must be a list of names, got {architectures!r}")
    return config


def _read_headers(in_dir: Path, who: str) -> dict[str, list[Header]]:
    """file name -> its tensors; every file is opened, so that a damaged one ends the run before anything is written."""
    try:
        files = checkpoint_files(in_dir, who)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    shards = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
                shards[file.name] = [
                    Header(name, tuple(s.get_shape()), STORED.get(str(s.get_dtype()))) for name, s in slices
                ]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{who}: {file} must be a whole safetensors file, got {error}") from None
    try:
        check_index(in_dir / INDEX, [header.name for shard in shards.values() for header in shard], who)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    return shards


def _new_config(
    config: Mapping[str, Any], options: _Options, quantized: Mapping[str, Matrix], dense: Iterable[str]
) -> dict[str, Any]:
    """config.json with what transformers needs to load the result through bitsandbytes, or to refuse it."""
    config = dict(config)
    if options.dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = _word(options.dtype)
    stored = Counter(matrix.unit.headers[0].dtype for matrix in quantized.values()).most_common(1)[0][0]
    if any(matrix.is_experts for matrix in quantized.values()) or not options.is_for_bitsandbytes:
        # transformers knows the method by integrations.transformers, and refuses the packed weights without; through
        # bitsandbytes it would find no experts, nor int8, and draw them at random
        config["quantization_config"] = {
            "quant_method": "nf4kernels",
            "codebook": options.codebook,
            "block_size": options.block_size,
            "double_quant": options.double_quant,
            "scale_codebook": options.scale_codebook,
            "modules_to_not_convert": sorted(set(dense)),
        }
        planned = {name: _plain(each) for name, each in options.plan.items() if each is not None}
        if planned:
            config["quantization_config"]["plan"] = planned
        return config
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options.codebook,
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or _word(stored),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(set(dense)),
    }
    return config


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON."""
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in options.items()}


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _write_shards(
    in_dir: Path, staging: Path, shards: Mapping[str, list[Header]], units: Iterable[Unit],
    quantized: Mapping[str, Matrix], model: nn.Module | None, options: _Options, progress: bool, who: str,
) -> QuantizeReport:  # fmt: skip
    """Every shard, and the index where there was one. What is made of several tensors goes where the first one was."""
    layers: list[QuantizedLayer] = []
    skipped: list[SkippedLayer] = []
    weight_map: dict[str, str] = {}
    before = after = 0
    of_unit: dict[Unit, dict[str, str]] = {}  # the model's tensors -> layers, of units that hold some
    for layer, matrix in quantized.items():
        of_unit.setdefault(matrix.unit, {})[matrix.name] = layer
    unit_of = {header.name: unit for unit in units if unit in of_unit for header in unit.headers}
    file_of = {header.name: file for file, headers in shards.items() for header in headers}
    done = set()
    with ExitStack() as stack, tqdm(total=len(file_of), desc="quantize", unit="tensor", disable=not progress) as bar:
        opened = {file: stack.enter_context(safe_open(in_dir / file, framework="pt")) for file in shards}
        for file, headers in shards.items():
            out: dict[str, Tensor] = {}
            for header in headers:
                unit = unit_of.get(header.name)
                if unit is None:
                    tensor = opened[file].get_tensor(header.name)
                    before += tensor.nbytes
                    out[header.name] = _cast(tensor, header.name, options, who)
                    if tensor.dim() >= 2:
                        skipped.append(SkippedLayer(header.name, tuple(tensor.shape), tensor.nbytes, "kept"))
                    del tensor
                elif unit not in done:
                    done.add(unit)
                    tensors = [opened[file_of[each.name]].get_tensor(each.name) for each in unit.headers]
                    before += sum(tensor.nbytes for tensor in tensors)
                    layers += _quantize_unit(unit, of_unit[unit], model, tensors, out, options, who)
                bar.update()
            metadata = opened[file].metadata() or {}
            weight_map.update(dict.fromkeys(out, file))
            after += sum(tensor.nbytes for tensor in out.values())
            write_tensors(out, staging / file, metadata)
    if (in_dir / INDEX).exists():
        write_json(staging / INDEX, {"metadata": {"total_size": after}, "weight_map": dict(sorted(weight_map.items()))})
    return QuantizeReport(layers, skipped, before, after)


def _quantize_unit(
    unit: Unit, layers: Mapping[str, str], model: nn.Module | None, tensors: list[Tensor], out: dict[str, Tensor],
    options: _Options, who: str,
) -> Iterator[QuantizedLayer]:  # fmt: skip
    """Add to `out` what becomes of a unit; its tensors leave the list. Where only a name changes, the file's stays."""
    made = unit.group.convert(model, tensors)
    tensors.clear()
    for name in list(made):
        key = unit.headers[0].name if unit.group.converter is None else name
        if name in layers:
            weight = made.pop(name)
            if weight.dim() == 3 and model is not None:
                weight = as_rows(model.get_submodule(name.rpartition(".")[0]), weight)
            parts, line = _quantize_tensor(weight, layers[name], key, options, who)
            del weight
            out.update(parts)
            yield line
        else:
            out[key] = _cast(made.pop(name), key, options, who)


def _quantize_tensor(
    tensor: Tensor, layer: str, key: str, options: _Options, who: str
) -> tuple[dict[str, Tensor], QuantizedLayer]:
    try:
        qweight = options.quantize(tensor, layer)
    except ValueError as error:
        raise ConversionError(f"{who}: layer {layer}: {error}") from None
    errors = squared_error(qweight, tensor)
    if options.dtype is not None:
        qweight = replace(qweight, dtype=options.dtype)
    if tensor.dim() == 3:
        parts = experts_to_tensors(qweight, layer)
    else:
        parts = weight_to_tensors(qweight, key, bitsandbytes=options.is_for_bitsandbytes)
    after = sum(part.nbytes for part in parts.values())
    return parts, QuantizedLayer(layer, tuple(tensor.shape), tensor.nbytes, after, *errors)


def _cast(tensor: Tensor, name: str, options: _Options, who: str) -> Tensor:
    if options.dtype is None or not tensor.is_floating_point():
        return tensor
    try:
        return cast(tensor, options.dtype, name)
    except ValueError as error:
        raise ConversionError(f"{who}: {error}") from None
