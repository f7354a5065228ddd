"""The four places where transformers is made to know 4-bit models beyond what it lets one register.

All call what was there before, and change nothing for a model or a configuration that is not ours.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Any

from transformers import modeling_utils
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_bitsandbytes_available

from ...codebook import FORMATS
from ...nn.quant_module import QuantModule, elements_beyond_bytes
from ...storage.published.layouts import layout_of
from .config import METHOD, Nf4Config
from .published import slices

WHO = "nf4kernels.Nf4Config"
BARE = (
    "what save_pretrained writes of such a model loads into the same model alone, quantized alike, by load_state_dict:"
    " save it by nf4kernels.save_checkpoint, or merge it first (merge_model), or quantize the dense model by"
    " from_pretrained(quantization_config=Nf4Config()) instead of quantize_model"
)


def install() -> None:
    """Once, when the package is imported."""
    _choose_config()
    _count_parameters()
    _load_by_our_names()
    _warn_of_bare_states()


def _choose_config() -> None:
    """transformers takes no other class of configuration than the stored one's, and bitsandbytes' always by itself."""
    original = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]  # a classmethod

    @functools.wraps(original)
    def merge_quantization_configs(cls: Any, stored: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
        config = our_config(stored, asked)
        return original(cls, stored, asked, *args, **kwargs) if config is None else config

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)


def _count_parameters() -> None:
    """A packed byte is two parameters, or one in 8 bits. transformers knows that of bitsandbytes' class alone."""
    original = PreTrainedModel.num_parameters

    @functools.wraps(original)
    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count: int = original(self, only_trainable, exclude_embeddings)
        return count if only_trainable else count + elements_beyond_bytes(self)

    PreTrainedModel.num_parameters = num_parameters


def _load_by_our_names() -> None:
    """Give the loader what others publish in 4 bits by our names; it opens a checkpoint's files by itself."""
    original = modeling_utils.convert_and_load_state_dict_in_model

    @functools.wraps(original)
    def convert_and_load_state_dict_in_model(*args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(kwargs.get("load_config"), "hf_quantizer", None)
        published = getattr(quantizer, "published", None)
        is_said = getattr(getattr(kwargs.get("model"), "config", None), "quantization_config", None) is not None
        if not (is_said if quantizer is None else quantizer.pre_quantized):
            _check_no_bare_state(kwargs.get("state_dict") or ())
        if published is not None:
            kwargs["state_dict"] = slices(published)
        return original(*args, **kwargs)

    modeling_utils.convert_and_load_state_dict_in_model = convert_and_load_state_dict_in_model


def _warn_of_bare_states() -> None:
    """A model that quantize_model has changed has no quantizer that would write its layers so that they load again."""
    original = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "hf_quantizer", None) is None and kwargs.get("state_dict") is None:
            layer = next((name for name, each in self.named_modules() if isinstance(each, QuantModule)), None)
            if layer is not None:
                warnings.warn(f"{WHO}: {layer} is in 4 bits by quantize_model, and {BARE}", stacklevel=2)
        return original(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained


def _check_no_bare_state(names: Iterable[str]) -> None:
    """ValueError for what save_pretrained wrote of such a model: its bytes would be taken for numbers."""
    for name in names:
        if name.endswith(".source_dtype"):
            raise ValueError(f"{WHO}: {name.removesuffix('.source_dtype')} was in 4 bits by quantize_model, and {BARE}")


def our_config(stored: Any, asked: Any) -> Nf4Config | None:
    """What a 4-bit directory is loaded with; None where that is for transformers to say.

    Args:
        stored: the quantization_config of config.json, a dict or a configuration.
        asked: what `from_pretrained` was given, or None.

    Raises:
        TypeError, ValueError: the two contradict each other, or a field is unknown.
    """
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    ours = asked if isinstance(asked, Nf4Config) else None
    if fields.get("quant_method") == METHOD:
        config: Nf4Config = Nf4Config.from_dict(fields)
        if asked is not None and ours is None:
            return None
    elif fields.get("load_in_4bit") or fields.get("load_in_8bit") or fields.get("quant_method") == "bitsandbytes":
        if ours is None and (asked is not None or is_bitsandbytes_available()):
            return None
        if not fields.get("load_in_4bit"):
            if ours is None:
                return None
            raise ValueError(f"{WHO}: the checkpoint must be dense or in 4 bits, got bitsandbytes' 8 bits")
        config = from_bitsandbytes(fields)
    elif ours is None:
        return None
    else:  # published in 4 bits by others, who have classes of their own for those that ask for them
        try:
            layout_of(fields)
        except ValueError as error:
            raise ValueError(f"{WHO}: {error}") from None
        return ours
    if ours is not None:
        _check_asked(config, ours)
    return config


def from_bitsandbytes(fields: dict[str, Any]) -> Nf4Config:
    """Of the same weights as a BitsAndBytesConfig's fields, which do not say the block size: None until it is read.

    bitsandbytes' compute dtype, float32 where nobody chose one, is left behind: our layers compute in their input's.
    """
    config = Nf4Config(
        codebook=fields.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(fields.get("bnb_4bit_use_double_quant", False)),
        scale_codebook="dynamic8",
        modules_to_not_convert=fields.get("llm_int8_skip_modules") or (),
    )
    config.block_size = None
    return config


def _check_asked(config: Nf4Config, asked: Nf4Config) -> None:
    """Add to a stored configuration what may be chosen anew; ValueError for a choice that comes too late."""
    usual = Nf4Config()
    if config.block_size is None:
        config.block_size = asked.block_size  # compared with the weights when they are read
    for field in ("codebook", "block_size", "double_quant", "scale_codebook"):
        wanted, has = getattr(asked, field), getattr(config, field)
        can_be_unsaid = field in ("double_quant", "scale_codebook") or config.codebook in FORMATS
        is_unsaid = can_be_unsaid and wanted == getattr(usual, field)
        if wanted != has and not is_unsaid:
            raise ValueError(f"{WHO}: {field} must be {has!r} as the checkpoint has it, got {wanted!r}")
    if asked.plan and asked.plan != config.plan:
        raise ValueError(f"{WHO}: plan must be left out for a checkpoint that is in 4 bits already, got one")
    if not set(asked.skip) <= {*config.skip, *config.modules_to_not_convert}:
        raise ValueError(f"{WHO}: skip must be empty for a checkpoint that is in 4 bits already, got {asked.skip}")
    if asked.compute_dtype is not None:
        config.compute_dtype = asked.compute_dtype
