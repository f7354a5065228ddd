"""Quantizing on load: each rank its own rows of a dense matrix in a file, with the bits of the whole one."""

from typing import Any

import torch
from torch import Tensor, nn

from ..codebook import FORMATS
from ..functional import quantize, quantize_experts
from ..model.sharded import Ranks, by_rows, own_part
from ..nn.dtensors import from_local, is_dtensor, whole
from ..nn.grouped_quant_linear import GroupedQuantLinear
from ..nn.quant_module import SCALES
from ..quantized_weight import WEIGHT_DTYPES, shared_codebooks
from .file_parts import Source


def quantized_parts(model: nn.Module, layer: Any, source: Source, ranks: Ranks, transposed: bool) -> dict[str, Tensor]:
    """leaf -> this rank's part of it, on the CPU, of the layer's weight quantized as the layer is.

    `transposed`: the file has each expert's transpose. Every rank must call. The whole matrix is read, one at a time,
    where blocks straddle rows, where columns are cut, and for formats with a scale of the whole tensor.
    """
    if by_rows(layer.weight) and isinstance(layer, GroupedQuantLinear):
        return _experts(model, layer, source, ranks, transposed)
    if by_rows(layer.weight) and layer.codebook not in FORMATS and layer.in_features % layer.block_size == 0:
        return _rows(model, layer, source, ranks)
    with ranks.together():
        everything = tuple(slice(0, size) for size in source.on_meta.shape)
        dense = source.read(model, everything, ranks.who)
        qweight = _quantized(layer, dense.mT if transposed else dense, source.target)
    return {name: value[own_part(getattr(layer, name))] for name, value in _leaves(qweight).items()}


def _rows(model: nn.Module, layer: Any, source: Source, ranks: Ranks) -> dict[str, Tensor]:
    """Blocks of this rank's rows; the double quantization is of all blocks' scales, which all ranks gather."""
    own = own_part(layer.weight)[0]
    (N, K), options = layer.weight_shape, layer.quant_options
    with ranks.together():
        rows = source.read(model, (own, slice(0, K)), ranks.who)
        where = f"{source.target}, of rows {own.start} on" if own.start else source.target
        qweight = _named(where, quantize, rows, **{**options, "double_quant": False})
    values = _leaves(qweight)
    shape = (N, K // layer.block_size)
    absmax = (
        whole(from_local(qweight.absmax, layer.weight, shape)).cpu() if is_dtensor(layer.weight) else qweight.absmax
    )
    if not options["double_quant"]:
        values["absmax"] = absmax[own_part(layer.absmax)]
        return values
    scale_code = quantize(rows[:0], **options).scale_code
    codes, scale_absmax, scale_offset = torch.ops.nf4kernels.quantize_absmax(
        absmax, scale_code, layer.scale_codebook == "e4m3"
    )
    scales = {"scale_absmax": scale_absmax, "scale_offset": scale_offset, "scale_code": scale_code}
    return {**values, **scales, "absmax": codes[own_part(layer.absmax)]}


def _experts(model: nn.Module, layer: Any, source: Source, ranks: Ranks, transposed: bool) -> dict[str, Tensor]:
    """This rank's experts, each a weight of its own; what is whole on every rank is gathered."""
    own = own_part(layer.weight)[0]
    sizes = source.on_meta.shape
    with ranks.together():
        dense = source.read(model, (own, slice(0, sizes[1]), slice(0, sizes[2])), ranks.who)
        qweight = _quantized(layer, dense.mT if transposed else dense, source.target)
    values = _leaves(qweight)
    specs = layer.QUANTIZED.specs(*layer.weight_shape, layer.block_size, layer.scales, layer.code.numel())
    of_experts = [name for name in ("absmax", *SCALES) if name in values and name not in shared_codebooks(layer.scales)]
    for name in of_experts if is_dtensor(layer.weight) else ():
        if not is_dtensor(getattr(layer, name)):
            values[name] = whole(from_local(values[name], layer.weight, specs[name][1])).cpu()
    return values


def _quantized(layer: Any, dense: Tensor, where: str) -> Any:
    function: Any = quantize_experts if isinstance(layer, GroupedQuantLinear) else quantize
    return _named(where, function, dense, **layer.quant_options)


def _named(where: str, function: Any, dense: Tensor, **options: Any) -> Any:
    """What the function makes, whose errors then say of which tensor."""
    try:
        return function(dense, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _leaves(qweight: Any) -> dict[str, Tensor]:
    """By the names that a module has."""
    source = torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8)
    values = {"weight": qweight.packed, **{name: getattr(qweight, name) for name in ("absmax", *SCALES)}}
    return {name: value for name, value in (*values.items(), ("source_dtype", source)) if value is not None}
