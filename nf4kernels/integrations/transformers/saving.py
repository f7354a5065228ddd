"""A 4-bit model of transformers as it is saved: names, configuration, and layers that are dense again."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.pytorch_utils import Conv1D

from ...codebook import FORMATS
from ...model.plan import is_conv1d, replace_module
from ...model.sharded import gathered_qweight
from ...model.walk import named_modules, state_dict
from ...nn.adapted_module import AdaptedModule
from ...nn.dtensors import is_dtensor
from ...nn.experts_layout import WEIGHTS
from ...nn.quant_linear import COLUMN_ORDER, OF_WEIGHT, QuantLinear
from ...nn.quant_module import SCALE_TENSORS, QuantModule
from ...nn.released import check_gathered
from ...quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from ...storage.bitsandbytes_format import weight_to_tensors
from .config import Nf4Config
from .operations import converts, is_converter


def has_4_bit_layer(model: nn.Module) -> bool:
    return any(isinstance(module, QuantModule) for module in model.modules())


def check_no_adapters(model: nn.Module) -> None:
    """ValueError for adapters of this package's own or PEFT's, which `from_pretrained` would not find again."""
    for name, module in named_modules(model):
        if name.rpartition(".")[2] == "base_layer":
            raise ValueError(
                "save_pretrained: the model must have no PEFT layers in it (the PeftModel's save_pretrained saves the"
                f" adapters; its unload() or merge_and_unload() gives a model without them), got {name}"
            )
        if isinstance(module, AdaptedModule) and module.adapter_names:
            raise ValueError(
                f"save_pretrained: the model must have no adapters on its 4-bit layers (nf4kernels.save_adapters saves"
                f" them, remove_adapter takes them off), got {module.adapter_names[0]!r} on {name}"
            )


def name_published_format(model: nn.Module, config: Nf4Config) -> None:
    """Make the configuration name a published format where one is in the model, also beside other codebooks.

    With such a name each stored weight says its own when it is loaded.
    """
    modules = [module for module in model.modules() if isinstance(module, QuantModule)]
    found = {(module.codebook, module.block_size) for module in modules if module.codebook in FORMATS}
    if found and config.codebook_name not in FORMATS:
        config.codebook, config.block_size = min(found)
        config.double_quant = False


def dense_modules(model: nn.Module) -> list[str]:
    """The names of the linear layers and experts that are dense."""
    return sorted(name for name, module in named_modules(model) if _could_be_4_bit(module))


def _could_be_4_bit(module: nn.Module) -> bool:
    if isinstance(module, QuantModule):
        return False
    experts = [module._parameters.get(leaf) for leaf in WEIGHTS]
    return isinstance(module, nn.Linear) or is_conv1d(module) or any(p is not None and p.dim() == 3 for p in experts)


def state_for_saving(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, each QuantLinear's weight by the names that bitsandbytes gives it on disk."""
    check_gathered(model.named_parameters(), "save_pretrained")
    state = {name: tensor.detach() for name, tensor in state_dict(model).items()}
    written: set[nn.Module] = set()
    for name, module in named_modules(model):
        if not isinstance(module, QuantLinear):
            if isinstance(module, QuantModule) and not module.weight.is_meta:
                module.checked_weight()  # a QuantLinear's is checked with its qweight
            continue
        for leaf in OF_WEIGHT:
            state.pop(f"{name}.{leaf}", None)
        if module not in written:
            written.add(module)
            state.update(_stored_tensors(model, name, module))
    return state


def _stored_tensors(model: Any, name: str, layer: QuantLinear) -> dict[str, Tensor]:
    """Of an offloaded layer the packed bytes stay where they are: save_pretrained fetches them, shard by shard.

    What ranks have cut is gathered on each of them, as transformers does with all else that it saves.
    """
    key = f"{name}.weight"
    if is_dtensor(layer.weight):
        return weight_to_tensors(gathered_qweight(layer), key)
    offloaded = [leaf for leaf, tensor in {**layer._parameters, **layer._buffers}.items() if _is_meta(tensor)]
    if not offloaded:
        return weight_to_tensors(layer.qweight, key)
    values: dict[str, Any] = {
        leaf: load_offloaded_parameter(model, f"{name}.{leaf}") if leaf in offloaded else getattr(layer, leaf)
        for leaf in ("weight", "source_dtype", *SCALE_TENSORS, COLUMN_ORDER)
    }
    packed, dtype = values.pop("weight").data, WEIGHT_DTYPES[int(values.pop("source_dtype"))]
    qweight = QuantizedWeight(
        packed, **values, shape=layer.weight_shape, dtype=dtype, block_size=layer.block_size, codebook=layer.codebook,
        scale_codebook=layer.scale_codebook,
    )  # fmt: skip
    stored = weight_to_tensors(qweight, key)
    if layer.weight.is_meta:
        stored[key] = layer.weight.detach()
    return stored


def _is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def keep_4_bit_names(model: Any) -> None:
    """Save in the model's own layout what a conversion back to the checkpoint's would take apart: codes, not numbers.

    transformers undoes on saving what it did on loading: it would cut experts into matrices again, put the parts of a
    fused layer together, and give a part of experts (Granite's) a name that does not tell what it is. It loads the
    model's own layout as well.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        return
    prefixes = [name for name, module in named_modules(model) if isinstance(module, QuantModule)]
    names = [f"{prefix}.weight" for prefix in prefixes]
    model._weight_conversions = [each for each in conversions if not _undone_on(each, names)]


def _undone_on(conversion: Any, names: Iterable[str]) -> bool:
    try:
        back = conversion.reverse_transform()
    except NotImplementedError:  # nothing undoes it
        return False
    if is_converter(conversion):
        return converts(back, names)
    ends = tuple(f".{leaf}.weight" for leaf in WEIGHTS)
    return any(name.endswith(ends) and not back.rename_source_key(name)[0].endswith(ends) for name in names)


def restore_conv1d(model: nn.Module, names: Iterable[str]) -> None:
    """Make a Conv1D again of every nn.Linear that stands in the place of one, after its 4-bit layer was merged."""
    modules = dict(named_modules(model))
    for name in names:
        linear = modules.get(name)
        if type(linear) is nn.Linear:
            conv = Conv1D(linear.out_features, linear.in_features)
            conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
            conv.bias = linear.bias
            replace_module(model, [name], linear, conv.train(linear.training))
