"""Nf4Config: what `from_pretrained` is told, and what config.json says of a 4-bit model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...codebook import FORMATS, default_block_size
from ...functional import quantize
from ...model.targets import merged
from ...nn.quant_linear import QuantLinear
from ...published_formats import WRITERS

METHOD = "nf4kernels"
EACH_ITS_OWN = [name for name, own in FORMATS.items() if own.block_size is None]  # formats with blocks of any size


@register_quantization_config(METHOD)
class Nf4Config(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a dense model, and what a saved 4-bit model is.

    Args:
        codebook: "nf4", "fp4", "int4", "af4", "mxfp4", "nvfp4", "int4_symmetric", or 16 ascending levels in [-1, 1], as
            in `nf4kernels.quantize`. Left alone where the checkpoint is one that others publish in 4 bits.
        block_size, double_quant, scale_codebook: as in `nf4kernels.quantize`.
        compute_dtype: as in `QuantLinear`: a dtype, its name, or None for the dtype of the layer's input.
        skip: further layers to leave dense, as in `nf4kernels.quantize_model`.
        plan: for layers by their full names the options that are not as for all, as `quantize_model` has it, None for
            dense; without adapters. A saved model's names the layers with options of their own.
        modules_to_not_convert: the linear layers and experts that are dense in a saved model, by their full names;
            written by `save_pretrained`.

    Raises:
        TypeError, ValueError: a field is unknown or out of its range.
    """

    quant_method = METHOD

    def __init__(
        self,
        codebook: str | Iterable[float] | Tensor = "nf4",
        block_size: int | None = None,
        double_quant: bool = True,
        scale_codebook: str = "e4m3",
        compute_dtype: torch.dtype | str | None = None,
        skip: Iterable[str] = (),
        modules_to_not_convert: Iterable[str] | None = None,
        plan: Mapping[str, Mapping[str, Any] | None] | None = None,
        **unknown: Any,
    ) -> None:
        who = "nf4kernels.Nf4Config"
        unknown.pop("quant_method", None)
        if unknown:
            known = "codebook, block_size, double_quant, scale_codebook, compute_dtype, skip, modules_to_not_convert"
            raise TypeError(f"{who}: fields must be among {known} and plan, got {', '.join(sorted(unknown))}")
        self.quant_method = METHOD
        self.codebook = codebook if isinstance(codebook, str) else _levels(codebook, who)
        self.block_size: Any = block_size  # None: of each stored weight its own
        self.double_quant = double_quant
        self.scale_codebook = scale_codebook
        self.compute_dtype = _dtype(compute_dtype, who)
        self.skip = _names("skip", skip, who)
        self.modules_to_not_convert = _names("modules_to_not_convert", modules_to_not_convert or (), who)
        self.plan = _plan(plan, who)
        if block_size is None and self.codebook_name not in EACH_ITS_OWN:
            self.block_size = default_block_size(self.codebook_name)
        if self.codebook_name in FORMATS and self.codebook_name not in WRITERS:
            return  # a model that was read from a file says so, and nothing is quantized with it
        try:  # on meta every option is checked and nothing is computed
            QuantLinear.from_linear(
                nn.Linear(1, 1, device="meta"), compute_dtype=self.compute_dtype, **self.quant_options
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{who}: {error}") from None

    def options_of(self, names: Iterable[str]) -> dict[str, Any]:
        """The keyword arguments of `nf4kernels.quantize` for the layer of these names."""
        own = next((self.plan[name] or {} for name in names if name in self.plan), {})
        options = merged(self.quant_options, own)
        codebook = options["codebook"]
        if isinstance(codebook, list):
            options["codebook"] = _tensor(codebook)
        if options["block_size"] is None and "codebook" in own and codebook not in EACH_ITS_OWN:
            options["block_size"] = default_block_size(codebook)
        return options

    @property
    def quant_options(self) -> dict[str, Any]:
        """The keyword arguments of `nf4kernels.quantize`."""
        codebook = self.codebook if isinstance(self.codebook, str) else _tensor(self.codebook)
        return {
            "codebook": codebook, "block_size": self.block_size, "double_quant": self.double_quant,
            "scale_codebook": self.scale_codebook,
        }  # fmt: skip

    @property
    def codebook_name(self) -> str:
        return self.codebook if isinstance(self.codebook, str) else "custom"

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        fields = super().to_dict()
        if not self.plan:
            fields.pop("plan")  # which releases before it do not know
        if self.compute_dtype is not None:
            fields["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return fields

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As the constructor, of what `to_dict` gave; TypeError for a field that is not one."""
        config = cls(**{**config_dict, **kwargs})
        return (config, {}) if return_unused_kwargs else config


def _levels(codebook: Any, who: str) -> list[float]:
    """As fp32 has them, so that they compare with those of a file."""
    try:
        return torch.tensor([float(level) for level in codebook], dtype=torch.float32).tolist()
    except (TypeError, ValueError):
        raise TypeError(f"{who}: codebook must be a name or 16 levels, got {codebook!r}") from None


def _tensor(levels: list[float]) -> Tensor:
    """On the CPU, in fp32, whatever the loader has made the default of both."""
    return torch.tensor(levels, dtype=torch.float32, device="cpu")


def _dtype(dtype: Any, who: str) -> Any:
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise TypeError(f"{who}: compute_dtype must be float32, bfloat16 or float16, got {dtype!r}")
        return found
    return dtype


def _plan(plan: Any, who: str) -> dict[str, dict[str, Any] | None]:
    """Of what JSON knows; checked on meta."""
    if plan is not None and not isinstance(plan, Mapping):
        raise TypeError(f"{who}: plan must be a mapping from names of layers, got {type(plan).__name__}")
    made: dict[str, dict[str, Any] | None] = {}
    for name, options in (plan or {}).items():
        if options is None:
            made[name] = None
            continue
        own = dict(options)
        if not isinstance(own.get("codebook", ""), str):
            own["codebook"] = _levels(own["codebook"], who)
        checked = own | ({"codebook": _tensor(own["codebook"])} if isinstance(own.get("codebook"), list) else {})
        try:
            quantize(torch.empty(1, 1, device="meta"), **checked)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{who}: plan: {name}: {error}") from None
        made[name] = own
    return made


def _names(field: str, names: Any, who: str) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{who}: {field} must be a sequence of names, got {names!r}")
    return list(names)
