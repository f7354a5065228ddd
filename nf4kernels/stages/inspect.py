"""What each linear layer of a model directory is, or would be, in 4 bits: its error and its scales, a layer a time."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..functional import quantize, quantize_experts
from ..model.heads import SKIP
from ..model.plan import skips
from ..model.quantize import squared_error
from ..model.report import table
from ..nn.experts_layout import as_rows
from ..quantized_weight import SUPERBLOCK, WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight
from ..storage.bitsandbytes_format import stored_weights, weight_from_tensors
from ..storage.experts_format import experts_from_tensors, stored_experts
from ..storage.layer_choice import choose
from ..storage.matrices import Header, Unit, matrices_of, units_of
from ..storage.published.opening import open_published
from ..storage.tensor_files import TensorFiles, checkpoint_files
from .errors import StageError

WHO = "inspect"
AnyQuantized = QuantizedWeight | QuantizedExperts
ModelOf = Callable[[Path, dict[str, Any]], tuple[nn.Module | None, str]]


@dataclass(frozen=True)
class Scales:
    """The scales of a layer's blocks as they decode, in the units of the weights."""

    min: float
    p5: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True)
class InspectedLayer:
    """One weight in 4 bits.

    Attributes:
        name: the layer's, and of experts that of one of their two weights.
        shape: [N, K] or [E, N, K].
        codebook, scale_codebook: their names; scale_codebook is None where the scales are numbers.
        scale_kind: one of `quantized_weight.SCALES`; "double" is double quantization.
        bytes: of the packed weights, the scales and the codebooks.
        rms_error: |Ŵ - W| / |W|, None where the directory holds no W.
        zero_blocks: the share of blocks that decode to nothing but zeros, 0 to 1.
        clipped_blocks: the share of blocks with a weight beyond the outermost level times the scale, as a scale that
            was rounded down leaves it; None where the directory holds no W.
    """

    name: str
    shape: tuple[int, ...]
    codebook: str
    block_size: int
    scale_kind: str
    scale_codebook: str | None
    bytes: int
    scales: Scales
    zero_blocks: float
    rms_error: float | None = None
    clipped_blocks: float | None = None

    @property
    def kind(self) -> str:
        """The last component of the name: "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / math.prod(self.shape) if math.prod(self.shape) else 0.0


@dataclass(frozen=True)
class Inspection:
    """Attributes:
    path: the directory.
    dense: whether it holds dense weights, which were quantized in memory; else its own 4-bit weights were read.
    layers: by name, numbers in it by their value, so that those of one kind come from input to output.
    left_dense: name -> why, of the matrices that are not layers to quantize; "stored dense" in a 4-bit directory.
    rms_error: |Ŵ - W| / |W| over all layers together, None where the directory is in 4 bits.
    """

    path: Path
    dense: bool
    layers: list[InspectedLayer] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    rms_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = []
        for layer in self.layers:
            row = {name: value for name, value in vars(layer).items() if name != "scales"}
            layers.append(row | {"shape": list(layer.shape), "bits": layer.bits, "scales": vars(layer.scales)})
        return {
            "path": str(self.path), "dense": self.dense, "rms_error": self.rms_error, "bytes": _bytes(self.layers),
            "layers": layers, "left_dense": self.left_dense,
        }  # fmt: skip

    def __str__(self) -> str:
        heading = (
            "layer", "shape", "codebook", "block", "scales", "KiB", "bits/weight", "RMS error", "scale min", "median",
            "max", "zero blocks", "clipped",
        )  # fmt: skip
        rows: list[tuple[str, ...] | None] = [heading, *(_row(layer) for layer in self.layers), None]
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        size = _bytes(self.layers)
        total = (f"all {len(self.layers)} layers", "", "", "", "", f"{size / 1024:.1f}", f"{8 * size / weights:.3f}")
        error = "-" if self.rms_error is None else f"{self.rms_error:.4f}"
        rows.append((*total, error, "", "", "", "", ""))
        return table(rows)


def inspect_directory(
    path: str | Path,
    codebook: str = "nf4",
    block_size: int | None = None,
    double_quant: bool = True,
    scale_codebook: str = "e4m3",
    skip: Iterable[str] = (),
    model_of: ModelOf | None = None,
    progress: bool = True,
) -> Inspection:
    """The layers of the model in `path`: of a dense directory as quantizing it would make them, else as they are.

    A 4-bit directory may be ours, bitsandbytes', or in one of the published formats that `nf4kernels convert` reads.
    One layer is in memory at a time. Nothing is written.

    Args:
        path: a Hugging Face directory with config.json and safetensors files.
        codebook, block_size, double_quant, scale_codebook: as in `nf4kernels.quantize`; for a dense directory only.
        skip: further layers of a dense directory to leave out, as in `nf4kernels.quantize_model`.
        model_of: given `path` and its config, (the model on the meta device, its class) or (None, why not). The model
            says which matrices are linear layers; without one, their names do.
        progress: show a progress bar on stderr.

    Raises:
        StageError: `path` is not such a directory, has no layer to show, a file is damaged, a weight is not finite, or
            an option is out of its range.
    """
    path = Path(path)
    config = _config(path)
    options = (codebook, block_size, double_quant, scale_codebook)
    try:
        quantize(torch.empty(0, 4096), *options)
    except ValueError as error:
        raise StageError(_without_caller(error)) from None
    model, source = (None, "their names") if model_of is None else model_of(path, config)
    try:
        with ExitStack() as stack:
            published = stack.enter_context(open_published(path, model, WHO))
            files: Any = published or stack.enter_context(TensorFiles(checkpoint_files(path, WHO), WHO))
            linear, experts = stored_weights(files.names), stored_experts(files.names)
            if linear or experts:
                return _of_stored(path, files, linear, experts, progress)
            if config.get("quantization_config"):
                method = dict(config["quantization_config"]).get("quant_method")
                raise StageError(f"DIR must be dense or hold 4-bit weights, got none in {path}, quantized by {method}")
            return _of_dense(path, files, config, model, source, options, (*SKIP, *skip), progress)
    except StageError:
        raise
    except (ValueError, TypeError) as error:
        raise StageError(_without_caller(error)) from None


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(f"DIR must be a Hugging Face model directory, got {error}") from None
    except ValueError as error:
        raise StageError(f"{file} must hold JSON, got {error}") from None
    if not isinstance(config, dict):
        raise StageError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def _of_stored(path: Path, files: Any, linear: dict[str, list[str]], experts: list[str], progress: bool) -> Inspection:
    layers, own = [], set()
    for key in tqdm([*linear, *experts], desc="inspect", unit="layer", disable=not progress):
        names = linear.get(key) or [name for name in files.names if name.startswith(f"{key}.")]
        own.update(names)
        tensors = {name: files.read(name) for name in names}
        if key not in linear:
            E, N, half = tensors[f"{key}.weight"].shape
            layers.append(_inspected(key, experts_from_tensors(tensors, key, (E, N, 2 * half))))
        else:
            layers.append(_inspected(key.removesuffix(".weight"), weight_from_tensors(tensors, key)))
    dense = [name for name in files.names if name not in own and files.on_meta(name).dim() >= 2]
    layers.sort(key=_by_depth)
    return Inspection(path, False, layers, {name.removesuffix(".weight"): "stored dense" for name in dense})


def _of_dense(
    path: Path, files: Any, config: dict[str, Any], model: nn.Module | None, source: str, options: tuple[Any, ...],
    patterns: tuple[str, ...], progress: bool,
) -> Inspection:  # fmt: skip
    headers = []
    for name in files.names:
        like = files.on_meta(name)
        headers.append(Header(name, tuple(like.shape), like.dtype if like.dtype in WEIGHT_DTYPES else None))
    matrices = matrices_of(units_of(model, headers), experts=model is not None)
    for pattern in patterns[len(SKIP) :]:
        if not any(skips(pattern, name) for name in matrices):
            raise StageError(f"--skip must match a layer, got {pattern!r}")
    block_size = quantize(torch.empty(0, 4096), *options).block_size
    choice = choose(model, source, config, matrices, patterns, block_size)
    chosen = {name: matrices[name] for name in choice.layers if matrices[name].unit.can_be_quantized}
    if not chosen:
        raise StageError(f"DIR must have a linear layer to quantize, got none in {path} ({choice.source})")
    of_unit: dict[Unit, list[str]] = {}
    for name, matrix in chosen.items():
        of_unit.setdefault(matrix.unit, []).append(name)
    layers: list[InspectedLayer] = []
    error = total = 0.0
    with tqdm(total=len(chosen), desc="inspect", unit="layer", disable=not progress) as bar:
        for unit, names in of_unit.items():
            made = unit.group.convert(model, [files.read(header.name) for header in unit.headers])
            for name in names:
                weight = made.pop(chosen[name].name)
                if weight.dim() == 3 and model is not None:
                    weight = as_rows(model.get_submodule(name.rpartition(".")[0]), weight)
                try:
                    qweight = (quantize if weight.dim() == 2 else quantize_experts)(weight, *options)
                except ValueError as problem:
                    raise StageError(f"layer {name}: {_without_caller(problem)}") from None
                of_layer, of_weight = squared_error(qweight, weight)
                error, total = error + of_layer, total + of_weight
                layers.append(_inspected(name, qweight, weight, math.sqrt(of_layer / of_weight) if of_weight else 0.0))
                bar.update()
    layers.sort(key=_by_depth)
    left = {name: choice.reasons.get(name, "kept") for name in matrices if name not in chosen}
    return Inspection(path, True, layers, left, math.sqrt(error / total) if total else 0.0)


def _inspected(
    name: str, qweight: AnyQuantized, weight: Tensor | None = None, rms_error: float | None = None
) -> InspectedLayer:
    parts = [qweight] if isinstance(qweight, QuantizedWeight) else list(qweight)
    dense: Iterable[Any] = [None] * len(parts) if weight is None else [weight] if weight.dim() == 2 else weight
    scales, zeros, clipped = [], 0, 0
    for part, matrix in zip(parts, dense):
        own = decoded_scales(part)
        scales.append(own)
        zeros += int(_zero_blocks(part, own).sum())
        if matrix is not None:
            clipped += int(_clipped_blocks(part, own, matrix).sum())
    every = torch.cat(scales).sort().values
    blocks = max(every.numel(), 1)
    return InspectedLayer(
        name, qweight.shape, qweight.codebook, qweight.block_size, qweight.scales, qweight.scale_codebook,
        qweight.nbytes, _summary(every), zeros / blocks, rms_error, None if weight is None else clipped / blocks,
    )  # fmt: skip


def decoded_scales(qweight: QuantizedWeight) -> Tensor:
    """fp32 `[blocks]`: what a block's level is multiplied by."""
    absmax = qweight.absmax.reshape(-1)
    if qweight.scale_code is None:
        return absmax.float()
    scales = qweight.scale_code[absmax.long()]
    if qweight.scale_absmax is None or qweight.scale_offset is None:
        return scales
    return scales * qweight.scale_absmax.repeat_interleave(SUPERBLOCK)[: scales.numel()] + qweight.scale_offset


def _summary(ascending: Tensor) -> Scales:
    if not ascending.numel():
        return Scales(*[math.nan] * 5)
    at = [round(share * (ascending.numel() - 1)) for share in (0, 0.05, 0.5, 0.95, 1)]
    return Scales(*ascending[at].tolist())


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """`[blocks, block_size]`; the last one is filled up with its first element, which changes no minimum or maximum."""
    missing = -flat.numel() % block_size
    if missing:
        flat = torch.cat([flat, flat[flat.numel() // block_size * block_size].expand(missing)])
    return flat.view(-1, block_size)


def _zero_blocks(qweight: QuantizedWeight, scales: Tensor) -> Tensor:
    """bool `[blocks]`: the scale is 0, or every code stands for 0."""
    N, K = qweight.shape
    codes = qweight.packed.reshape(-1)
    if qweight.bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], 1).view(-1)[: N * K]
    is_zero = (qweight.code == 0)[codes.long()]
    return (scales == 0) | _blocks(is_zero, qweight.block_size).all(1)


def _clipped_blocks(qweight: QuantizedWeight, scales: Tensor, weight: Tensor) -> Tensor:
    """bool `[blocks]`: a weight is beyond what the block's outermost levels reach.

    Products are compared, both in fp32 and rounded once, so that a scale which is exact clips nothing. int8's scale is
    a quotient: its product may miss by a rounding of each.
    """
    flat = weight.reshape(-1)
    lowest, highest = _blocks(flat, qweight.block_size).aminmax(dim=1)
    reach = torch.stack([scales * qweight.code.min(), scales * qweight.code.max()])
    reach = reach * (1 + 2.0**-22) if qweight.bits == 8 else reach
    low, high = reach.amin(0), reach.amax(0)
    return (lowest.float() < low) | (highest.float() > high)


def _row(layer: InspectedLayer) -> tuple[str, ...]:
    scales = layer.scales
    kind = {"double": f"8-bit {layer.scale_codebook}, double", "codes": str(layer.scale_codebook)}
    return (
        layer.name, " x ".join(map(str, layer.shape)), layer.codebook, str(layer.block_size),
        kind.get(layer.scale_kind, layer.scale_kind), f"{layer.bytes / 1024:.1f}", f"{layer.bits:.3f}",
        "-" if layer.rms_error is None else f"{layer.rms_error:.4f}",
        f"{scales.min:.3g}", f"{scales.median:.3g}", f"{scales.max:.3g}", f"{100 * layer.zero_blocks:.2f} %",
        "-" if layer.clipped_blocks is None else f"{100 * layer.clipped_blocks:.1f} %",
    )  # fmt: skip


def _by_depth(layer: InspectedLayer) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", layer.name)]


def _bytes(layers: Iterable[InspectedLayer]) -> int:
    return sum(layer.bytes for layer in layers)


def _without_caller(error: Exception) -> str:
    """The message of an error of ours, without the function that it names first."""
    text = str(error)
    for caller in ("nf4kernels.quantize: ", "nf4kernels.quantize_experts: ", f"{WHO}: "):
        text = text.removeprefix(caller)
    return text


def kinds_of(layers: Iterable[InspectedLayer]) -> Iterator[tuple[str, list[InspectedLayer]]]:
    """(kind, its layers), in the order of the first of each."""
    found: dict[str, list[InspectedLayer]] = {}
    for layer in layers:
        found.setdefault(layer.kind, []).append(layer)
    yield from found.items()
