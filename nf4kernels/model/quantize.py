"""quantize_model and merge_model: from nn.Linear to QuantLinear, from experts to QuantExperts and back, in a model."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from ..functional import dequantize
from ..nn.lora import LoraConfig
from ..nn.quant_experts import WEIGHTS, QuantExperts, layout_problem
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import QuantModule
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight

PANELS = 8  # in which a weight's error is measured: fp32 Ŵ then takes a quarter of a bf16 weight's bytes
QUANTIZED = (QuantLinear, QuantExperts)
SMALLEST_PANEL = 1 << 20  # elements
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedLayer:
    """One replaced weight: its bytes before and after, and the sums behind its relative RMS error.

    `name` is the layer's, and of experts that of one of their two weights; `shape` is [N, K] or [E, N, K].
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    squared_error: float
    squared_weight: float

    @property
    def kind(self) -> str:
        """The last component of the name: "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def rms_error(self) -> float:
        """|Ŵ - W| / |W|; 0 for an all-zero weight, NaN on the meta device."""
        return _rms([self])


@dataclass(frozen=True)
class SkippedLayer:
    """One matrix that was left alone, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_model` did; `str()` of it is a table.

    Attributes:
        layers: the replaced layers, in the model's order.
        skipped: the matrices left alone.
        model_bytes_before, model_bytes_after: all parameters and buffers of the model, shared ones counted once.
    """

    layers: list[QuantizedLayer] = field(default_factory=list)
    skipped: list[SkippedLayer] = field(default_factory=list)
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def rms_error(self) -> float:
        """|Ŵ - W| / |W| over all replaced weights together."""
        return _rms(self.layers)

    def by_kind(self) -> dict[str, list[QuantizedLayer]]:
        """The replaced layers grouped by the last component of their names."""
        kinds = defaultdict(list)
        for layer in self.layers:
            kinds[layer.kind].append(layer)
        return dict(kinds)

    def summary(self) -> str:
        """The table without its rows for single layers."""
        return self._text([])

    def __str__(self) -> str:
        return self._text([*(_row(layer.name, _shape(layer.shape), [layer]) for layer in self.layers), None])

    def _text(self, layer_rows: list) -> str:
        rows = [("layer", "shape", "before", "after", "bits/weight", "RMS error"), *layer_rows]
        for kind, layers in self.by_kind().items():
            shapes = {_shape(layer.shape) for layer in layers}
            rows.append(_row(f"all {kind} ({len(layers)})", shapes.pop() if len(shapes) == 1 else "", layers))
        rows.append(_row(f"all quantized ({len(self.layers)})", "", self.layers))
        rows.append(("whole model", "", _size(self.model_bytes_before), _size(self.model_bytes_after), "", ""))
        text = table(rows)
        if self.skipped:
            skipped = [("left alone", "shape", "bytes", "reason")]
            skipped += [(s.name, _shape(s.shape), _size(s.bytes), s.reason) for s in self.skipped]
            text += "\n\n" + table(skipped, left=(0, 3))
        return text


def _rms(layers: Iterable[QuantizedLayer]) -> float:
    layers = list(layers)
    weight = sum(layer.squared_weight for layer in layers)
    error = sum(layer.squared_error for layer in layers)
    return math.sqrt(error / weight) if weight else error


def _row(name: str, shape: str, layers: list[QuantizedLayer]) -> tuple[str, ...]:
    before = sum(layer.bytes_before for layer in layers)
    after = sum(layer.bytes_after for layer in layers)
    weights = sum(math.prod(layer.shape) for layer in layers)
    bits = f"{8 * after / weights:.3f}" if weights else "-"
    return name, shape, _size(before), _size(after), bits, f"{_rms(layers):.4f}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.2f} KiB"


def table(rows: list[tuple[str, ...] | None], left: tuple[int, ...] = (0,)) -> str:
    """Columns padded to their widest cell; a None row is a rule."""
    cells = [row for row in rows if row is not None]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [
        rule if row is None
        else "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], rule, *lines[1:]])


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    lora: LoraConfig | None = None,
    progress: bool = True,
    **quant_options,
) -> QuantizeReport:
    """Replace every nn.Linear of `model` by a QuantLinear, and fused 3-D experts by QuantExperts, in place.

    Left alone, each with its reason in the report: what `skip` names, subclasses of nn.Linear, tied and parametrized
    weights, adapters, experts of a layout that QuantExperts does not take, and every other matrix (embeddings, Conv1D).
    Layers in 4 bits stay as they are, so a second call changes nothing. Training modes, hooks, biases and every
    `requires_grad` but the experts' are kept; a module registered under two names is replaced under both.

    Weights are quantized one by one on their device and freed as it goes: the extra memory at the peak is about the
    bytes of the largest one. Every weight is checked for NaN and inf before the first one is replaced.

    Args:
        model: any module that contains layers.
        skip: names of layers or of modules around them, in full or a run of whole components ("lm_head",
            "layers.0.mlp"), or fnmatch patterns over the full name ("*.mlp.gate"). Experts are skipped together, by
            their name or that of one of their weights.
        lora: an adapter for every replaced nn.Linear; there are none on experts.
        progress: show a progress bar on stderr.
        quant_options: codebook, block_size, double_quant, scale_codebook, nonfinite as in `nf4kernels.quantize`;
            compute_dtype as in `QuantLinear`.

    Returns:
        What was replaced, with bytes and relative RMS errors, and what was not.

    Raises:
        TypeError, ValueError: an argument is wrong, or a layer's weight is not float32, bfloat16 or float16 or not
            finite (the message names the layer); the model is then unchanged.
        RuntimeError: quantizing a layer failed for another reason (out of memory); the layers before it are replaced,
            that one and those after it are not, and another call goes on from there.
    """
    who = "nf4kernels.quantize_model"
    patterns = _check_arguments(model, skip, lora, quant_options, who)
    targets, skipped = plan_layers(model, patterns, quant_options.get("block_size", 64))
    for names in targets:
        for name, weight in _weights(model.get_submodule(names[0]), names[0]):
            _check_dtype(name, weight, who)
            if quant_options.get("nonfinite", "raise") == "raise":
                _check_finite(name, weight, who)

    before = _model_bytes(model)
    layers = []
    with tqdm(total=len(targets), desc="quantize", unit="layer", disable=not progress) as bar:
        for names in targets:
            layers += _quantize_layer(model, names, lora, quant_options, who)
            bar.update()
    return QuantizeReport(layers, skipped, before, _model_bytes(model))


def merge_model(model: nn.Module, base: nn.Module | None = None, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Replace every QuantLinear of `model` by an nn.Linear of Ŵ + scaling * lora_B @ lora_A, in place.

    QuantExperts become what they were made from, a module of the same class and configuration, of Ŵ.

    With `base` the original weight W takes the place of Ŵ, which also undoes the quantization error. The sum is taken
    in fp32 and rounded once to `dtype`. Merging into 4 bits is not offered: rounding to 4 bits takes most of the
    fine-tuning away.

    Args:
        model: any module that contains layers. Its layers in 4 bits are replaced; their biases are rounded to
            `dtype` and nothing else is cast. Merged weights require gradients as any nn.Linear's do, a bias as before.
        base: the model before quantization, with the same names. It is read only.
        dtype: of the merged weights and biases; float32, bfloat16 or float16.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError, ValueError: an argument is wrong, `base` lacks a layer, has it in another shape, or not in floating
            point, or QuantExperts were not made from a module (the message names the layer). The model is then
            unchanged.
    """
    who = "nf4kernels.merge_model"
    model = unwrapped(model, "model", who)
    _check_container(model, "model", who)
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: dtype must be float32, bfloat16 or float16, got {dtype}")
    if base is not None:
        base = unwrapped(base, "base", who)
    targets = [names for module, names in _names(model).items() if isinstance(module, QUANTIZED)]
    for names in targets:
        layer = model.get_submodule(names[0])
        if any(part.weight.is_meta for part in _parts(layer)):
            raise ValueError(f"{who}: model must be loaded, got layer {names[0]} on the meta device")
        if isinstance(layer, QuantExperts) and not layer.can_be_dense:
            raise ValueError(
                f"{who}: {names[0]} must have been made by QuantExperts.from_experts, got one that was not"
            )
        if base is not None:
            _base_weights(base, names[0], layer, who)

    for names in targets:
        layer = model.get_submodule(names[0])
        base_weights = None if base is None else _base_weights(base, names[0], layer, who)
        if isinstance(layer, QuantExperts):
            dense = layer.to_experts(dtype, base_weights)
        else:
            dense = layer.to_linear(dtype, base_weight=None if base is None else base_weights[0])
            if dense.bias is not None:
                dense.bias.requires_grad_(layer.bias.requires_grad)
        replace_module(model, names, layer, dense)
    return [names[0] for names in targets]


def replace_module(model: nn.Module, names: Iterable[str], old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every one of `names`, with old's hooks."""
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def unwrapped(model: nn.Module, argument: str, who: str) -> nn.Module:
    """The module inside torch.compile's; TypeError for what is no module, ValueError for one inside DDP."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: {argument} must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"{who}: {argument} must be the module inside, pass .module, got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def _check_container(model: nn.Module, argument: str, who: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: {argument} must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"{who}: {argument} must contain its layers, got a {type(model).__name__} itself"
            " (QuantLinear.from_linear and QuantLinear.to_linear convert one)"
        )
    if isinstance(model, QuantExperts) or layout_problem(model) is None:
        raise ValueError(
            f"{who}: {argument} must contain its layers, got a {type(model).__name__} itself"
            " (QuantExperts.from_experts and QuantExperts.to_experts convert one)"
        )


def _check_arguments(model, skip, lora, quant_options, who: str) -> tuple[str, ...]:
    _check_container(model, "model", who)
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"{who}: skip must be a sequence of names, got {skip!r}")
    skip = tuple(skip)
    if not all(isinstance(entry, str) for entry in skip):
        raise TypeError(f"{who}: skip must be a sequence of names, got {skip!r}")
    if lora is not None and not isinstance(lora, LoraConfig):
        raise TypeError(f"{who}: lora must be a LoraConfig or None, got {type(lora).__name__}")
    try:  # on meta every option is checked and nothing is computed
        QuantLinear.from_linear(nn.Linear(1, 1, device="meta"), lora, **quant_options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {error}") from None
    return skip


def _parts(layer: QuantLinear | QuantExperts) -> list[QuantModule]:
    return [layer] if isinstance(layer, QuantLinear) else [getattr(layer, name) for name in WEIGHTS]


def _weights(module: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """(name, dense weight) of an nn.Linear or of experts, each with the name that messages and reports use."""
    if isinstance(module, nn.Linear):
        return [(name, module.weight)]
    return [(f"{name}.{leaf}", getattr(module, leaf)) for leaf in WEIGHTS]


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """module -> all its names; nothing below a layer in 4 bits."""
    names, inside = defaultdict(list), ()
    for name, module in model.named_modules(remove_duplicate=False):
        if inside and name.startswith(inside):
            continue
        names[module].append(name)
        if isinstance(module, QUANTIZED):
            inside = f"{name}."
    return names


def plan_layers(
    model: nn.Module, patterns: Iterable[str], block_size: int = 64
) -> tuple[list[list[str]], list[SkippedLayer]]:
    """(all names of each layer to replace, the matrices to leave alone); works on the meta device."""
    names = _names(model)
    users = defaultdict(set)  # address of a parameter -> names of the parameters there
    for module, (name, *_) in names.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                users[_address(parameter)].add(f"{name}.{leaf}" if name else leaf)
    fused = {id(child) for module in names if isinstance(module, nn.TransformerEncoderLayer)
             for child in (module.linear1, module.linear2)}  # fmt: skip

    targets, skipped = [], []
    for module, aliases in names.items():
        reason = _reason(module, aliases, patterns, users, fused, block_size)
        if reason is None:
            targets.append(aliases)
        elif isinstance(module, QUANTIZED):
            for part, leaf in zip(_parts(module), [""] if isinstance(module, QuantLinear) else WEIGHTS):
                name = f"{aliases[0]}.{leaf}".strip(".")
                skipped.append(SkippedLayer(name, part.weight_shape, part.weight.nbytes, reason))
        else:
            for leaf, matrix in module._parameters.items():
                if matrix is not None and matrix.dim() >= 2:
                    name = aliases[0] if leaf == "weight" else f"{aliases[0]}.{leaf}".lstrip(".")
                    skipped.append(SkippedLayer(name, tuple(matrix.shape), matrix.nbytes, reason))
    return targets, skipped


def skips(pattern: str, name: str) -> bool:
    """Whether an entry of `quantize_model`'s skip stands for the layer of that full name."""
    return f".{pattern}." in f".{name}." or fnmatchcase(name, pattern)


def _reason(module: nn.Module, aliases: list[str], patterns, users, fused, block_size: int) -> str | None:
    """Why a module is left alone; None for a layer to replace."""
    if isinstance(module, QUANTIZED):
        return f"already a {type(module).__name__}"
    if parametrize.is_parametrized(module):
        return "parametrized"
    if type(module) is not nn.Linear:
        reason = _reason_for_other(module, block_size)
        if reason is not None:
            return reason
    leaves = ("weight",) if isinstance(module, nn.Linear) else WEIGHTS
    for name in aliases:
        known_as = [name] if isinstance(module, nn.Linear) else [name, *(f"{name}.{leaf}" for leaf in WEIGHTS)]
        for pattern in patterns:
            if any(skips(pattern, each) for each in known_as):
                return f"skip={pattern!r}"
        if {"lora_A", "lora_B"} & set(name.split(".")):
            return "a LoRA factor"
    if module._parameters.get(leaves[0]) is None:
        return "its weight is computed by a hook"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if id(module) in fused:
        return "nn.TransformerEncoderLayer's fused path reads it as a dense matrix"
    for leaf in leaves:
        others = users[_address(module._parameters[leaf])] - {f"{name}.{leaf}".lstrip(".") for name in aliases}
        if others:
            return f"tied to {min(others)}"
    return None


def _reason_for_other(module: nn.Module, block_size: int) -> str | None:
    """Why a module that is no nn.Linear is left alone; None for experts to replace."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if kind == "Conv1D":
        return "Conv1D keeps its weight as [in, out]"
    if isinstance(module, nn.Linear):
        return f"{kind}, a subclass of nn.Linear"
    if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
        return layout_problem(module, block_size)
    return f"{kind}, not an nn.Linear"


def _address(parameter: Tensor) -> int:
    # The address, not the storage: a loader may hand out all weights as views of one mapped file.
    return parameter.data_ptr() or id(parameter)


def _check_dtype(name: str, weight: Tensor, who: str) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: the weight of {name} must be float32, bfloat16 or float16, got {weight.dtype}")


def _check_finite(name: str, weight: Tensor, who: str) -> None:
    if weight.is_meta or not weight.numel() or all(bound.isfinite() for bound in weight.detach().aminmax()):
        return
    index = tuple((~weight.isfinite()).nonzero()[0].tolist())
    where = ", ".join(f"{axis} {i}" for axis, i in zip(("expert", "row", "column")[-len(index) :], index))
    raise ValueError(f"{who}: the weight of {name} must be finite, got {weight[index].item()} at {where}")


def _quantize_layer(model, names: list[str], lora, quant_options, who: str) -> list[QuantizedLayer]:
    dense = model.get_submodule(names[0])
    layers = []
    try:
        if isinstance(dense, nn.Linear):
            layer = QuantLinear.from_linear(dense, lora, **quant_options)
        else:
            layer = QuantExperts.from_experts(dense, **quant_options)
        for part, (name, weight) in zip(_parts(layer), _weights(dense, names[0])):
            errors = (math.nan, math.nan) if weight.is_meta else squared_error(part.qweight, weight.detach())
            after = part.weight.nbytes + sum(buffer.nbytes for buffer in part.buffers())
            layers.append(QuantizedLayer(name, tuple(weight.shape), weight.nbytes, after, *errors))
    except Exception as error:
        raise RuntimeError(f"{who}: layer {names[0]} failed, those before it are replaced: {error}") from error
    replace_module(model, names, dense, layer)
    return layers


def squared_error(qweight: QuantizedWeight | QuantizedExperts, weight: Tensor) -> tuple[float, float]:
    """(|Ŵ - W|², |W|²), the differences in fp32, summed in fp64, a panel of rows at a time."""
    if isinstance(qweight, QuantizedExperts):
        errors, totals = zip(*map(squared_error, qweight, weight))
        return sum(errors), sum(totals)
    N, K = weight.shape
    rows = max(-(-N // PANELS), SMALLEST_PANEL // max(K, 1), 1)
    error = total = 0.0
    for begin in range(0, N, rows):
        panel = weight[begin : begin + rows]
        decoded = dequantize(qweight, torch.float32, rows=(begin, begin + panel.shape[0]))
        total += torch.linalg.vector_norm(panel, dtype=torch.float64).item() ** 2
        error += torch.linalg.vector_norm(decoded.sub_(panel), dtype=torch.float64).item() ** 2
    return error, total


def _model_bytes(model: nn.Module) -> int:
    tensors = {_address(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def _base_weights(base: nn.Module, name: str, layer: QuantLinear | QuantExperts, who: str) -> list[Tensor]:
    """base's dense weights of that name, one or the experts' two; ValueError where they do not fit the layer."""
    try:
        module = base.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{who}: base must have a layer {name}, got none") from None
    is_linear = isinstance(layer, QuantLinear)
    leaves, what = (("weight",), "an nn.Linear") if is_linear else (WEIGHTS, "experts")
    weights = [getattr(module, leaf, None) for leaf in leaves]
    is_dense = isinstance(module, nn.Linear) == is_linear and not isinstance(module, QUANTIZED)
    if not is_dense or not all(isinstance(weight, Tensor) and weight.is_floating_point() for weight in weights):
        raise ValueError(f"{who}: base must have {what} in floating point as {name}, got {module}")
    for part, leaf, weight in zip(_parts(layer), leaves, weights):
        key = name if is_linear else f"{name}.{leaf}"
        if tuple(weight.shape) != part.weight_shape:
            raise ValueError(
                f"{who}: base must have {key} in shape {list(part.weight_shape)}, got {list(weight.shape)}"
            )
        if weight.is_meta:
            raise ValueError(f"{who}: base must be loaded, got {key} on the meta device")
    return [weight.detach() for weight in weights]
