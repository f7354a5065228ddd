"""PEFT's LoRA on a QuantLinear: the layer's product and the adapter's term in one op; merged, a dense layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...functional import quantize
from ...modes import autocast_is_on, outside_inference_mode, without_autocast
from ...nn import casts
from ...nn.lora import plain_weight
from ...nn.quant_linear import LoraTerm, QuantLinear
from .dora import QuantDoraLayer, QuantDoraVariant, row_norms
from .merge import base_weights, check_not_offloaded, into_4_bits, merge_dtype, with_hook_of

WHO = "nf4kernels.integrations.peft"
# The starts that neither read nor change the base weight.
PLAIN_STARTS = (True, False, "gaussian", "eva")
# Those that have no meaning where the dense weight is gone, and what to do instead.
NEEDS_DENSE_WEIGHT = {
    "loftq": "start with init_lora_weights=True and call nf4kernels.integrations.peft.replace_lora_weights_loftq("
    "model, base), where base is the dense model or its directory",
    "corda": "start it on the dense model",
    "lora_ga": "start it on the dense model",
}


class LoraQuantLinear(lora.Linear):
    """PEFT's lora.Linear whose base layer is a QuantLinear.

    With one active adapter of plain LoRA, the forward is one fused op, and so is the backward; with DoRA, too, where
    nothing is dropped out. Whatever asks for more (several active adapters at once, `adapter_names`, a bias in lora_B,
    hooks on the factors, PEFT's other variants) is PEFT's own forward on top of the fused base layer.

    While merged the base layer is a dense nn.Linear, and the layer in 4 bits is kept beside it, out of `state_dict()`,
    so that `unmerge` gives back the same bits. See `merge_into` for what is merged into what.
    """

    _packed: tuple[QuantLinear, ...] = ()  # the one layer, while merged; in a tuple it is no module of this one
    _changed_base_for: tuple[str, ...] = ()  # adapters whose start took a part of the base weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self._disable_adapters:
            return super().forward(x, *args, **kwargs)
        base: Any = self._modules["base_layer"]
        if self.merged_adapters:
            return _in_dtype_of(base, x)
        active = [name for name in self.active_adapters if name in self.lora_A._modules]
        term = self._fused_term(base, active[0]) if len(active) == 1 else None
        if term is None:
            return super().forward(x)
        y: Tensor = base(x, term)
        if active[0] not in self.lora_variant:
            return y
        A, B, scaling, _ = term
        magnitudes: Any = self.lora_magnitude_vector[active[0]]
        factors = magnitudes.factors(base, A, B, scaling, active[0])
        return (factors * y if base.bias is None else factors * (y - base.bias) + base.bias).to(y.dtype)

    def _fused_term(self, base: Any, name: str) -> LoraTerm | None:
        """The adapter's term, None where the forward is more than one product with its factors."""
        if not _takes_a_term(base):
            return None
        factors = [plain_weight(cast(nn.Linear, pair._modules[name])) for pair in (self.lora_A, self.lora_B)]
        dropout_p = _dropout_p(self.lora_dropout._modules[name])
        variant = self.lora_variant.get(name)
        if variant is not None and (type(variant) is not QuantDoraVariant or dropout_p):
            return None
        if factors[0] is None or factors[1] is None or dropout_p is None:
            return None
        if not isinstance(self.scaling[name], float | int):  # a tensor, of prepare_model_for_compiled_hotswap
            return None
        return factors[0], factors[1], self.scaling[name], dropout_p

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(**kwargs)
        return QuantDoraVariant() if type(variant) is DoraLinearVariant else variant

    @classmethod
    def adopt(cls, layer: Any) -> None:
        """Make a layer of PEFT's own one of this class, its DoRA too."""
        layer.__class__ = cls
        for name, variant in layer.lora_variant.items():
            if type(variant) is DoraLinearVariant:
                layer.lora_variant[name] = QuantDoraVariant()
                layer.lora_magnitude_vector[name].__class__ = QuantDoraLayer

    @outside_inference_mode
    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; a start that reads the base weight reads Ŵ, and what it writes is rounded to 4 bits."""
        start = kwargs["config"].init_lora_weights if "config" in kwargs else kwargs["init_lora_weights"]
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().update_layer(adapter_name, *args, **kwargs)
            return
        for refused, remedy in NEEDS_DENSE_WEIGHT.items():
            if isinstance(start, str) and start.startswith(refused):
                raise ValueError(
                    f"{WHO}: init_lora_weights must not need the dense weight of a layer in 4"
                    f" bits, got {start!r}: {remedy}"
                )
        variant = self.resolve_lora_variant(config=kwargs["config"]) if "config" in kwargs else None
        if start in PLAIN_STARTS and (variant is None or isinstance(variant, QuantDoraVariant)):
            super().update_layer(adapter_name, *args, **kwargs)
            return
        start_weight = base.dequantize(torch.float32)
        with self._standing_in(start_weight.clone()) as dense:
            super().update_layer(adapter_name, *args, **kwargs)
            self._truncate_now(adapter_name)
        self._cast_adapter(adapter_name, base)
        if not torch.equal(dense.weight, start_weight):
            left = casts.cast(dense.weight.data, base.dense_dtype, f"{WHO}: the weight without the adapter's start")
            self._changed_base_for = (*self._changed_base_for, adapter_name)
            qweight = quantize(left, **base.quant_options)
            base.set_qweight(qweight)
            held = {"weight": qweight.packed, "absmax": qweight.absmax}
            on_meta = [leaf for leaf in held if leaf in base._parameters and getattr(base, leaf).is_meta]
            for leaf in on_meta:  # inside accelerate's init_empty_weights, which is meant for the adapter
                base._parameters[leaf] = nn.Parameter(held[leaf], requires_grad=False)
            if on_meta:
                base.record_bytes()

    def _truncate_now(self, adapter_name: str) -> None:
        """What KaSA puts off until the first forward where the adapter is on meta: by then the base is in 4 bits."""
        put_off: set[str] = getattr(self, "_lora_kasa_truncation_deferred", set())
        if adapter_name in put_off:
            variant: Any = self.lora_variant[adapter_name]
            variant._truncate_base_weight(self, self.r[adapter_name])
            put_off.discard(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, which takes the dtype of a dense base weight as well."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        base = self.get_base_layer()
        if isinstance(base, QuantLinear) and not base.weight.is_meta:
            self._cast_adapter(adapter_name, base)

    def _cast_adapter(self, adapter_name: str, base: QuantLinear) -> None:
        dtype = base.compute_dtype or base.dense_dtype
        for name in self.adapter_layer_names:
            parts = getattr(self, name, None)
            if isinstance(parts, nn.ModuleDict | nn.ParameterDict) and adapter_name in parts:
                part: Any = parts[adapter_name]
                for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                    if parameter.is_floating_point() and not parameter.is_meta:
                        parameter.data = parameter.data.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a layer of the sum in the place of the base layer; `merge_into` says which.

        The sum is taken in fp32, over all adapters that are merged then, and rounded once. Nothing is changed where
        that fails.

        Raises:
            ValueError: a finite value does not fit the dtype, or, with `safe_merge`, the sum is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        holder = self._holder()
        if not self._packed and not isinstance(holder.base_layer, QuantLinear):
            super().merge(safe_merge, adapter_names)  # it was dense when the adapter came
        elif names:
            packed = self._packed or (holder.base_layer,)
            check_not_offloaded(packed[0])
            holder.base_layer = self.merged_layer(packed[0], names, safe_merge)
            self._packed = packed
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the layer in 4 bits back; what was merged is forgotten, so its bits are those from before."""
        if not self._packed:
            super().unmerge()
            return
        (packed,) = self._packed
        holder = self._holder()
        packed.to(holder.base_layer.weight.device)
        packed.train(holder.base_layer.training)
        holder.base_layer, self._packed = packed, ()
        self.merged_adapters.clear()

    @outside_inference_mode
    @torch.no_grad()
    def merged_layer(self, packed: QuantLinear, names: list[str], safe: bool = False) -> nn.Linear:
        """The layer that `merge` puts into the place of `packed`, `names` merged after what is merged already."""
        found = base_weights(self)
        if found is not None and self._changed_base_for:
            raise ValueError(
                f"{WHO}.merge_into: an adapter that took its start from the base weight"
                f" ({', '.join(self._changed_base_for)}) must be merged into 'dequantized': what it began as is in it"
            )
        weight = packed.dequantize(torch.float32) if found is None else found[0].to(packed.weight.device, torch.float32)
        if packed.lora is not None and not packed.adapters_off:  # an adapter of our own below PEFT's
            weight = weight + (packed.lora_delta() if found is None else packed.delta_over_original())
        bias: Any = None if packed.bias is None else packed.bias.detach()
        start = weight
        for name in (*self.merged_adapters, *names):
            weight = self._with_adapter(weight, start, name)
            if self.lora_bias.get(name):
                bias = self._with_lora_bias(bias, name)
            if safe and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        dtype = merge_dtype() or (packed.dense_dtype if bias is None else packed.bias.dtype)
        if into_4_bits():
            qweight = quantize(
                casts.cast(weight, packed.dense_dtype, f"{WHO}: the merged weight"), **packed.quant_options
            )
            merged: nn.Linear = QuantLinear.from_quantized(qweight, None, packed.compute_dtype)
        else:
            merged = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            merged.weight = nn.Parameter(casts.cast(weight, dtype, f"{WHO}: the merged weight"), requires_grad=False)
        if packed.bias is not None:
            is_same = bias.dtype == dtype and not any(map(self.lora_bias.get, (*self.merged_adapters, *names)))
            new = nn.Parameter(
                casts.cast(bias, dtype, f"{WHO}: the merged bias"), requires_grad=packed.bias.requires_grad
            )
            merged.bias = packed.bias if is_same else new
        return with_hook_of(packed, merged.train(packed.training))

    def _with_adapter(self, weight: Tensor, start: Tensor, name: str) -> Tensor:
        """`weight` and an adapter, as the forward adds it up; `start` is the weight without any."""
        A, B = (cast(Tensor, factors[name].weight).float() for factors in (self.lora_A, self.lora_B))
        variant = self.lora_variant.get(name)
        if variant is None:
            with without_autocast(weight.device):
                return torch.addmm(weight, B, A, alpha=self.scaling[name])
        if isinstance(variant, QuantDoraVariant):
            dense = _dense_layer(start)
            magnitudes = cast(Tensor, self.lora_magnitude_vector[name].weight).float()
            factors = magnitudes / row_norms(dense, A, B, self.scaling[name])
            with without_autocast(weight.device):
                return factors[:, None] * torch.addmm(weight, B, A, alpha=self.scaling[name])
        with self._standing_in(weight):
            merged: Tensor = variant.merge_safe(self, name, weight)
        return merged

    def _with_lora_bias(self, bias: Tensor | None, name: str) -> Tensor:
        if bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        return bias + self.lora_B[name].bias.to(bias.dtype) * self.scaling[name]

    def _holder(self) -> Any:
        """The module whose child `base_layer` is the layer in 4 bits: this one, or a tuner's layer inside it."""
        holder: Any = self
        while hasattr(holder.base_layer, "base_layer"):
            holder = holder.base_layer
        return holder

    @contextmanager
    def _standing_in(self, weight: Tensor) -> Iterator[nn.Linear]:
        """A dense layer of that weight in the place of the base layer, for code of PEFT's that reads it."""
        holder = self._holder()
        base, dense = holder.base_layer, _dense_layer(weight)
        holder.base_layer = dense
        dense.bias = base.bias
        try:
            yield dense
        finally:
            holder.base_layer = base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraQuantLinear":
        """The layer that waits for `unmerge` goes along."""
        super()._apply(fn, recurse)
        for packed in self._packed:
            packed._apply(fn, recurse)
        return self


class ParamWrapper(LoraQuantLinear):
    """The same where `target_parameters` names the layer's weight; PEFT knows such a layer by the name of its class."""

    parameter_name = "weight"

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(\n  parameter_name={self.parameter_name!r},", 1)


def _dense_layer(weight: Tensor) -> nn.Linear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense._parameters["weight"] = nn.Parameter(weight, requires_grad=False)  # accelerate would put it on meta
    return dense


def _in_dtype_of(base: nn.Linear, x: Tensor) -> Tensor:
    """The merged layer's output; a layer in 4 bits takes x in any dtype, and so does what takes its place."""
    dtype = base.weight.dtype
    if x.dtype == dtype or not dtype.is_floating_point or autocast_is_on(x.device):
        y: Tensor = base(x)
        return y
    return base(x.to(dtype)).to(x.dtype)


def _takes_a_term(base: Any) -> bool:
    """Whether calling the layer with a term is calling it without, the term added: nobody looks at its output.

    accelerate's hook, which replaces `forward` on the instance, only moves tensors.
    """
    own = base.__dict__
    return (
        isinstance(base, QuantLinear)
        and (base.lora is None or base.adapters_off)
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and ("forward" not in own or "_hf_hook" in own)
        and not _has_any_global_hook()
    )


def _dropout_p(dropout: Any) -> float | None:
    """The probability that a module of `lora_dropout` drops an element with, None for a module of another kind."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout._forward_hooks or dropout._forward_pre_hooks:
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1 else None
