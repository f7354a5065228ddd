"""Which layout a checkpoint has, by the quantization_config of its config.json, and how a weight is read in it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...quantized_weight import QuantizedExperts, QuantizedWeight
from . import ggml_blocks, gptq, int4, mxfp4, nvfp4

Parts = Mapping[str, Tensor]  # the tensors of one weight, by the endings of their names
AnyWeight = QuantizedWeight | QuantizedExperts
# Of activations and caches, which the weights do not need.
OF_ACTIVATIONS = (
    ".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
    ".kv_scale",
)  # fmt: skip
METHODS = ("mxfp4", "modelopt", "compressed-tensors", "gptq", "auto-round")
OURS = ("nf4kernels", "bitsandbytes")  # read elsewhere
INSTEAD = "quantize the 16-bit model to NF4 instead (nf4kernels quantize)"
NO_ZERO_POINT = "which a level times a scale cannot hold"


@dataclass(frozen=True)
class Layout:
    """How the weights of a checkpoint are stored.

    Attributes:
        markers: the endings of which every 4-bit weight has one.
        parts: the endings of all its tensors.
        read: of the tensors and the dtype that a dense weight would have, the weight; on meta, what its shape is.
        leaf: what the model calls the weight, after the name without an ending.
    """

    markers: tuple[str, ...]
    parts: tuple[str, ...]
    read: Callable[[Parts, torch.dtype], AnyWeight]
    leaf: str = ".weight"


def layout_of(fields: Mapping[str, Any]) -> Layout:
    """The layout that a quantization_config tells; ValueError, without who raised it, for one that is not read here."""
    method = fields.get("quant_method")
    if method == "awq":
        raise ValueError(f"quant_method awq stores zero points (asymmetric), {NO_ZERO_POINT}: {INSTEAD}")
    if method not in METHODS:
        raise ValueError(f"quant_method must be one of {', '.join((*METHODS, *OURS))}, got {method!r}")
    read = {
        "mxfp4": _gpt_oss, "modelopt": _modelopt, "compressed-tensors": _compressed, "gptq": _gptq,
        "auto-round": _auto_round,
    }[method]  # fmt: skip
    try:
        return read(fields)
    except (AttributeError, TypeError) as error:  # a list in the place of an object, or the like
        raise ValueError(f"quantization_config must have its fields as {method} writes them, got {error}") from None


def _gpt_oss(fields: Mapping[str, Any]) -> Layout:
    def read(parts: Parts, dtype: torch.dtype) -> AnyWeight:
        return mxfp4.experts_from_blocks(_part(parts, "_blocks"), _part(parts, "_scales"), dtype)

    return Layout(("_blocks",), ("_blocks", "_scales"), read, leaf="")


def _modelopt(fields: Mapping[str, Any]) -> Layout:
    """Of config.json, or of the older hf_quant_config.json."""
    told = fields.get("quantization", fields)
    algorithm = told.get("quant_algo")
    algorithms = {algorithm}
    if algorithm == "MIXED_PRECISION":
        algorithms = {each.get("quant_algo") for each in (told.get("quantized_layers") or {}).values()}
    if not algorithms <= {"NVFP4", "W4A16_NVFP4"}:
        came = ", ".join(sorted(map(str, algorithms - {"NVFP4", "W4A16_NVFP4"})))
        raise ValueError(f"quant_algo of modelopt must be NVFP4 or W4A16_NVFP4, got {came}: {INSTEAD}")

    def read(parts: Parts, dtype: torch.dtype) -> AnyWeight:
        packed, scales = _part(parts, ".weight"), _part(parts, ".weight_scale")
        return nvfp4.weight_from_packed(packed, scales, _part(parts, ".weight_scale_2"), False, dtype)

    return Layout((".weight_scale_2",), (".weight", ".weight_scale", ".weight_scale_2"), read)


def _compressed(fields: Mapping[str, Any]) -> Layout:
    for name, group in (fields.get("config_groups") or {}).items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if weights is None:
            continue
        if weights.get("num_bits") != 4:
            raise ValueError(f"num_bits of {name} must be 4, got {weights.get('num_bits')}: {INSTEAD}")
        if not weights.get("symmetric", True):
            raise ValueError(f"the weights of {name} have zero points (asymmetric), {NO_ZERO_POINT}: {INSTEAD}")
        if weights.get("strategy") not in (None, "tensor", "channel", "group", "tensor_group"):
            raise ValueError(f"strategy of {name} must be of a row or a part of it, got {weights['strategy']!r}")
    if (fields.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config must be dense, got {fields['sparsity_config']['format']!r}: {INSTEAD}")
    if fields.get("transform_config"):
        raise ValueError(f"transform_config must be empty, got rotations that the model has to undo: {INSTEAD}")

    def read(parts: Parts, dtype: torch.dtype) -> AnyWeight:
        packed, scales = _part(parts, ".weight_packed"), _part(parts, ".weight_scale")
        if ".weight_zero_point" in parts:
            raise ValueError(f"weight_zero_point is there (asymmetric), {NO_ZERO_POINT}: {INSTEAD}")
        if packed.dtype == torch.int32:
            shape, g_idx = parts.get(".weight_shape"), parts.get(".weight_g_idx")
            return int4.weight_from_packed(packed, scales, shape, g_idx, dtype)
        if ".weight_global_scale" in parts:
            return nvfp4.weight_from_packed(packed, scales, parts[".weight_global_scale"], True, dtype)
        return mxfp4.weight_from_packed(packed, scales, dtype)

    leaves = ("packed", "scale", "global_scale", "shape", "zero_point", "g_idx")
    return Layout((".weight_packed",), tuple(f".weight_{leaf}" for leaf in leaves), read)


def _gptq(fields: Mapping[str, Any]) -> Layout:
    found = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    versions = {"gptq": 1, "gptq_v2": 2}
    if found not in versions or fields.get("is_marlin_format"):
        came = "marlin" if fields.get("is_marlin_format") else found
        raise ValueError(f"checkpoint_format must be gptq or gptq_v2, got {came}: {INSTEAD}")
    if fields.get("sym") is False:
        raise ValueError(f"sym=false stores zero points (asymmetric), {NO_ZERO_POINT}: {INSTEAD}")
    return _gptq_layout(fields, versions[found])


def _auto_round(fields: Mapping[str, Any]) -> Layout:
    found = fields.get("packing_format") or "auto_round:auto_gptq"
    versions = {"auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}
    if found not in versions or fields.get("data_type", "int") != "int":
        came = found if found not in versions else f"data_type {fields['data_type']}"
        raise ValueError(f"packing_format must be auto_round:auto_gptq or auto_round:gptqmodel, got {came}: {INSTEAD}")
    if fields.get("sym") is False:
        raise ValueError(f"sym=false stores zero points (asymmetric), {NO_ZERO_POINT}: {INSTEAD}")
    return _gptq_layout(fields, versions[found])


def _gptq_layout(fields: Mapping[str, Any], version: int) -> Layout:
    if fields.get("bits") != 4:
        raise ValueError(f"bits must be 4, got {fields.get('bits')}: {INSTEAD}")
    said = fields.get("group_size", -1)
    if not isinstance(said, int) or (said < 1 and said != -1):
        raise ValueError(f"group_size must be above 0, or -1 for a row, got {said!r}")

    def read(parts: Parts, dtype: torch.dtype) -> AnyWeight:
        qweight, scales = _part(parts, ".qweight"), _part(parts, ".scales")
        if fields.get("desc_act") and scales.shape[0] > 1:  # without it the columns would be taken as in order
            _part(parts, ".g_idx")
        qzeros, g_idx = _part(parts, ".qzeros"), parts.get(".g_idx")
        return gptq.weight_from_gptq(qweight, scales, qzeros, g_idx, said, version, dtype)

    return Layout((".qweight",), (".qweight", ".qzeros", ".scales", ".g_idx"), read)


def gguf_layout() -> Layout:
    """Of the names that `GgufTensors` gives a file's tensors."""
    endings = tuple(f".{codebook}" for codebook in ggml_blocks.IN_4_BITS.values())

    def read(parts: Parts, dtype: torch.dtype) -> AnyWeight:
        ((ending, rows),) = parts.items()
        return ggml_blocks.weight_from_rows(rows, ending[1:], dtype)

    return Layout(endings, endings, read)


def _part(parts: Parts, ending: str) -> Tensor:
    if ending not in parts:
        raise ValueError(f"*{ending} must be there beside {', '.join(f'*{each}' for each in parts)}, got none")
    return parts[ending]


def is_of_activations(name: str) -> bool:
    return name.endswith(OF_ACTIVATIONS)


def left_over(names: Iterable[str], layout: Layout) -> str | None:
    """One of the names that looks like a part of a 4-bit weight; None where there is none."""
    endings = tuple(each for each in layout.parts if each != ".weight")
    return next((name for name in names if name.endswith(endings)), None)
