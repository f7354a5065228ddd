"""What transformers asks while it loads, trains and saves a model whose configuration is an Nf4Config."""

import copy
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ...codebook import DOUBLE_QUANT_CODEBOOKS, FORMATS, default_block_size
from ...model.merge import merge_model
from ...model.report import SkippedLayer
from ...model.walk import get_submodule
from ...nn.experts_layout import weight_names
from ...nn.quant_module import QuantModule
from ...quantized_weight import SUPERBLOCK, QuantizedExperts
from ...storage.bitsandbytes_format import weight_from_tensors
from ...storage.names import listed
from ...storage.published.files import PublishedFiles
from ...storage.tensor_files import TensorFiles
from . import tensor_parallel
from .awaited import awaits_weights, room_for, room_for_dense, without_values
from .config import METHOD, Nf4Config
from .operations import WEIGHT, OneExpertAtATime, QuantizeOnLoad, converts, is_stored_conversion, stored_conversions
from .published import check_not_on_disk, published_files, take_bytes_as_they_are
from .saving import (
    check_no_adapters,
    dense_modules,
    has_4_bit_layer,
    keep_4_bit_names,
    name_published_format,
    restore_conv1d,
    state_for_saving,
)
from .stored import check_experts, expect_stored
from .targets import (
    Target,
    dense_experts,
    needs_no_init,
    place_experts,
    place_weight,
    plan,
    quantized,
    quantized_experts,
)

logger = logging.getLogger(__name__)


@register_quantizer(METHOD)
class Nf4Quantizer(HfQuantizer):
    """Quantizes while a dense checkpoint is read, tensor by tensor, or reads a 4-bit one.

    The model that transformers builds on the meta device stays dense until a weight arrives. Then its module becomes a
    QuantLinear or QuantExperts. So what has no weight in the checkpoint is drawn as usual, and stays dense.

    Attributes:
        targets: name of a tensor of the dense model -> what it becomes.
        waiting: names of experts -> the one of their two weights that came, until the other comes.
        published: the files of a checkpoint that others have published in 4 bits, until it is loaded.
        error: the first that a tensor raised. The loader would only log it, so it is raised when the loader has ended.
        set_aside: transformers' rules of tensor parallel for what becomes 4-bit layers; None: it has not asked for any.
        is_awaiting: whether all values come later, from rank 0: nothing is read then, and nothing is quantized.
    """

    quantization_config: Nf4Config

    def __init__(self, quantization_config: Nf4Config, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # the caller's stays as it is
        self.targets: dict[str, Target] = {}
        self.checksums: dict[str, Tensor] = {}
        self.waiting: dict[tuple[str, ...], dict[str, QuantizedExperts]] = {}
        self.error: Exception | None = None
        self.published: PublishedFiles | None = None
        self.opened = ExitStack()
        self.set_aside: dict[str, str] | None = None
        self.is_awaiting = False

    # Loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if not self.pre_quantized and "disk" in devices:
            raise ValueError(
                "nf4kernels.Nf4Config: device_map must not offload to disk while a dense checkpoint is quantized: save"
                " it in 4 bits first (save_pretrained, or `nf4kernels quantize`), then load that, got a part on 'disk'"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files=None, **kwargs: Any) -> None:
        self.is_awaiting = awaits_weights()
        with ExitStack() as stack:
            opened = stack.enter_context(TensorFiles(checkpoint_files or (), "nf4kernels.Nf4Config"))
            published = published_files(opened, checkpoint_files, self.quantization_config, model)
            if published is not None:
                check_not_on_disk(kwargs.get("device_map"))
                self.pre_quantized, self.published = True, published
            if self.pre_quantized:
                expected = expect_stored(model, published or opened, self.quantization_config)
                self.targets, self.checksums = expected.targets, expected.checksums
            else:
                self.targets, skipped = plan(model, self.quantization_config)
                _report(model, skipped)
            if published is not None:
                self.opened = stack.pop_all()  # the loader reads on

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Cut 4-bit layers when they are loaded, not what is read; asked once for each kind of plan, the first tp's."""
        if self.set_aside is None and getattr(model.config, "distributed_config", None) is not None:
            self.set_aside = tensor_parallel.set_aside(model, plan, [name.rpartition(".")[0] for name in self.targets])

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and (self.is_awaiting or param_name in self.targets)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if self.pre_quantized or param_name not in self.targets:
            return param.element_size()
        options, fp32 = self.quantization_config.options_of(self.targets[param_name].names), torch.float32.itemsize
        codebook = options["codebook"]
        own = FORMATS.get(codebook) if isinstance(codebook, str) else None
        scale: float = 1 + fp32 / SUPERBLOCK if options["double_quant"] else fp32
        if own is not None:
            scale = 1 if own.scale_codebook is not None else torch.bfloat16.itemsize
        return (1 if codebook == "int8" else 0.5) + scale / (options["block_size"] or default_block_size(codebook))

    def get_quantize_ops(self) -> QuantizeOnLoad:
        return QuantizeOnLoad(self)

    def get_weight_conversions(self) -> list[Any]:
        return stored_conversions(self) if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's rules and ours; an older transformers does not ask, and goes by the model's as they are.

        Experts are merged one by one where they are quantized. Where they are stored in 4 bits, a conversion would take
        their codes for numbers.
        """
        if not self.pre_quantized:
            return [OneExpertAtATime.instead_of(each) for each in weight_conversions]
        parts = [f"{name}.weight" for name in self.checksums]
        kept = [each for each in weight_conversions if not converts(each, parts)]
        return kept + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """No cast before our own operation, which tells a dense tensor from a scale as an older loader does."""
        if not is_stored_conversion(converter):
            return super().get_new_dtype(converter, param, dtype)
        converter.operations[0].dense_dtype = dtype
        return None

    def take_dense(self, model: nn.Module, name: str, tensor: Tensor, missing_keys: Any) -> dict[str, Tensor]:
        """What the loader sets in the model instead of a dense tensor."""
        target, config = self.targets.get(name), self.quantization_config
        if target is None:
            return {name: room_for_dense(model, name) if self.is_awaiting else tensor}
        if self.is_awaiting:
            return self._take(model, name, lambda: room_for(target, tensor.dtype, config), missing_keys)
        return self._take(model, name, lambda: quantized(target, tensor, config), missing_keys)

    def take_experts(self, model: nn.Module, name: str, experts: Iterable[Tensor], missing_keys: Any) -> dict:
        """The same of a dense tensor that comes expert by expert."""
        target, config = self.targets[name], self.quantization_config
        if self.is_awaiting:
            return self._take(model, name, lambda: room_for(target, target.dtype, config), missing_keys)
        return self._take(model, name, lambda: quantized_experts(target, experts, config), missing_keys)

    def take_stored(self, model: nn.Module, name: str, tensors: dict[str, Tensor], missing_keys: Any) -> dict:
        """The same of the tensors that are stored for one weight."""

        def make() -> Any:
            qweight = weight_from_tensors(tensors)
            return without_values(qweight) if self.is_awaiting else qweight

        return self._take(model, name, make, missing_keys)

    def _take(self, model: nn.Module, name: str, make: Any, missing_keys: Any) -> dict[str, Tensor]:
        target, compute_dtype = self.targets[name], self.quantization_config.compute_dtype
        if missing_keys is not None:
            missing_keys.difference_update(target.keys)
        if self.error is None:
            try:
                tensor_parallel.check_asked(model, self.set_aside)
                qweight = make()
            except (TypeError, ValueError) as error:
                self.error = type(error)(f"nf4kernels.Nf4Config: {name}: {error}")
        if self.error is not None:  # the loader would draw it, which raises where it has the dtype of stored bytes
            needs_no_init(get_submodule(model, target.names[0]))
            return {}
        if target.leaf == WEIGHT:
            return place_weight(model, target, qweight, compute_dtype)
        waiting = self.waiting.setdefault(target.names, {})
        waiting[target.leaf] = qweight
        if len(waiting) == 2:
            place_experts(model, target, self.waiting.pop(target.names), compute_dtype)
        return {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        for names, found in self.waiting.items():
            both = weight_names(get_submodule(model, names[0]))
            expected = f"the checkpoint must have {' and '.join(both)} of {names[0]}"
            raise ValueError(f"nf4kernels.Nf4Config: {expected}, got {', '.join(found)} alone")
        if self.published is not None:
            take_bytes_as_they_are(model)
            self.opened.close()
            self.published = None
        if self.pre_quantized:
            if not self.is_awaiting:
                check_experts(model, self.checksums)
            self._read_scale_codebook(model)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [each for each in conversions if not is_stored_conversion(each)]
        if self.set_aside:
            tensor_parallel.cut(model, self.set_aside)
        return model

    def _read_scale_codebook(self, model: nn.Module) -> None:
        """A stored weight brings its scales' codebook, which bitsandbytes' configuration does not name."""
        for module in model.modules():
            if isinstance(module, QuantModule) and module.scale_codebook in DOUBLE_QUANT_CODEBOOKS:
                self.quantization_config.scale_codebook = module.scale_codebook
                return

    # Saving

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state by the names that it has on disk; config.json is made to fit it."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        check_no_adapters(model)
        restore_conv1d(model, self.transposed)
        if not has_4_bit_layer(model):
            self.forget(model)
            self.remove_quantization_config(model)
            return None, {}
        keep_4_bit_names(model)
        name_published_format(model, self.quantization_config)
        self.quantization_config.modules_to_not_convert = dense_modules(model)
        return state_for_saving(model), {}

    # Use

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        merge_model(model, dtype=dtype)
        self.forget(model)
        return model

    def forget(self, model: Any) -> None:
        """Leave a model that is dense again as transformers would have loaded it."""
        restore_conv1d(model, self.transposed)
        model.__dict__.pop("_weight_conversions", None)

    @property
    def transposed(self) -> set[str]:
        return {name for target in self.targets.values() if target.transposed for name in target.names}


def _report(model: nn.Module, skipped: list[SkippedLayer]) -> None:
    """What stays dense, and why: at the level of warnings where it is experts."""
    for entry in skipped:
        logger.info(f"nf4kernels: {entry.name} stays dense: {entry.reason}")
    experts = dense_experts(model, skipped)
    if experts:
        size = sum(entry.bytes for entry in experts) / 2**20
        names = listed([entry.name for entry in experts])
        logger.warning(f"nf4kernels: experts stay dense, {size:.1f} MiB: {names} ({experts[0].reason})")
