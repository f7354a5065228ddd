"""PEFT's `target_parameters` on QuantExperts: a LoRA adapter for every expert, in PEFT's layout."""

import copy
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...functional import quantize_experts
from ...modes import outside_inference_mode
from ...nn.experts_layout import as_rows
from ...nn.grouped_quant_linear import ExpertsTerm, GroupedQuantLinear
from ...nn.quant_experts import QuantExperts
from .merge import base_weights, check_not_offloaded, into_4_bits, merge_dtype


class QuantExpertsWrapper(ParamWrapper):
    """PEFT's ParamWrapper around QuantExperts, for one of their two weights; two wrappers are nested, as PEFT nests.

    The factors are PEFT's own: `lora_A` and `lora_B` are layers that hold all experts' factors in one matrix each.
    While merged, the innermost wrapper's base layer is the dense module that the experts were made from.
    """

    _packed: tuple[QuantExperts, ...] = ()  # of the innermost wrapper, while a wrapper around it is merged
    _merged_weights: frozenset[str] = frozenset()

    def get_param(self) -> Tensor:
        """The wrapped parameter; for a weight in 4 bits, a tensor of its dense shape and dtype, without its bytes."""
        part = getattr(self.get_base_layer(), self.parameter_name)
        if not isinstance(part, GroupedQuantLinear):
            return part  # type: ignore[no-any-return]
        dtype = torch.float32 if part.weight.is_meta else part.dense_dtype
        experts: Any = self.get_base_layer()
        shape = experts.dense_shape(self.parameter_name)
        return part.weight.new_empty(1, dtype=dtype).expand(shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_packed = isinstance(self.get_base_layer(), QuantExperts)
        if not is_packed or self.merged or self.disable_adapters or "adapter_names" in kwargs:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        own = self._own_terms(self.get_base_layer())
        terms = [*own, *(self._term(name) for name in self.active_adapters if name in self.lora_A)]
        given = kwargs.pop("terms", None) or {}
        result: Tensor = self.base_layer(x, *args, **kwargs, terms={**given, self.parameter_name: terms})
        return result

    def _term(self, name: str) -> ExpertsTerm:
        """(A [E, r, K], B [E, N, r], scaling) of an adapter."""
        E = self.num_experts
        A: Any = self.lora_A[name].weight
        B: Any = self.lora_B[name].weight
        A, B = A.view(E, -1, A.shape[-1]), B.view(B.shape[0], -1, E)
        # PEFT 0.18 takes the two dimensions of a weight for (in, out), as they are where it is transposed.
        is_ours = self._has_out_first or self.get_base_layer().is_transposed
        down, up = (A, B.permute(2, 0, 1)) if is_ours else (B.permute(2, 1, 0), A.transpose(1, 2))
        return down, up, self.scaling[name]

    def _own_terms(self, packed: QuantExperts, over_original: bool = False) -> list[ExpertsTerm]:
        """An adapter of our own, below PEFT's, on this weight."""
        part: GroupedQuantLinear = getattr(packed, self.parameter_name)
        return [] if part.adapters_off else part.active_term(over_original)

    @property
    def _has_out_first(self) -> bool:
        return getattr(self, "_did_swap_in_out_features", False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the experts dense, this weight with the adapters' products; see LoraQuantLinear.merge."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        holder = self._holder()
        if not holder._packed and not isinstance(holder.base_layer, QuantExperts):
            super().merge(safe_merge, adapter_names)
            return
        if not names:
            return
        packed: QuantExperts = holder._packed[0] if holder._packed else holder.base_layer
        for part in packed.modules():
            check_not_offloaded(part)
        merged = self.merged_weight(packed, [*self.merged_adapters, *names], safe_merge)
        if not holder._packed:
            holder.base_layer, holder._packed = _unpacked(packed, self), (packed,)
        self._set_weight(holder.base_layer, packed, merged)
        holder._merged_weights |= {self.parameter_name}
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take the adapters out again; after the last weight, the experts in 4 bits are back, their bits unchanged."""
        holder = self._holder()
        if not holder._packed:
            super().unmerge()
            return
        if not self.merged_adapters:
            return
        packed = holder._packed[0]
        self.merged_adapters.clear()
        holder._merged_weights -= {self.parameter_name}
        if holder._merged_weights:
            self._set_weight(holder.base_layer, packed, self.merged_weight(packed, []))
        else:
            packed.to(next(holder.base_layer.parameters()).device)
            packed.train(holder.base_layer.training)
            holder.base_layer, holder._packed = packed, ()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        unloaded: nn.Module = self.get_base_layer()  # asked for before the merge, it would be what it was
        return unloaded

    @outside_inference_mode
    @torch.no_grad()
    def merged_weight(self, packed: QuantExperts, names: list[str], safe: bool = False) -> Tensor:
        """This weight, as the dense module has it, with these adapters; by expert in fp32, each rounded once."""
        part = getattr(packed, self.parameter_name)
        who = f"nf4kernels.integrations.peft: the merged {self.parameter_name}"
        dtype = merge_dtype() or part.dense_dtype
        found = base_weights(self)
        given = None if found is None else found[packed.weights.index(self.parameter_name)]
        terms = [self._term(name) for name in names]
        own = self._own_terms(packed, over_original=found is not None)
        out: Tensor = part.merged_weight([*own, *terms], dtype, who, given, packed.is_transposed)
        if safe and not out.isfinite().all():
            broken = [name for name, term in zip(names, terms) if not all(f.isfinite().all() for f in term[:2])]
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {[*broken, names[-1]][0]} seems to be broken"
            )
        return out

    def _set_weight(self, base: Any, packed: QuantExperts, weight: Tensor) -> None:
        if isinstance(base, QuantExperts):
            options = getattr(packed, self.parameter_name).quant_options
            setattr(base, self.parameter_name, GroupedQuantLinear(quantize_experts(as_rows(packed, weight), **options)))
        else:
            setattr(base, self.parameter_name, nn.Parameter(weight, requires_grad=False))

    def _holder(self) -> Any:
        """The innermost wrapper, whose base layer is the experts."""
        holder: Any = self
        while isinstance(holder.base_layer, ParamWrapper):
            holder = holder.base_layer
        return holder

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantExpertsWrapper":
        super()._apply(fn, recurse)
        for packed in self._packed:
            packed._apply(fn, recurse)
        return self


def _unpacked(packed: QuantExperts, layer: nn.Module) -> nn.Module:
    """What the merged weights are put into: the dense module, or, where they are rounded again, other QuantExperts."""
    if not into_4_bits():
        return packed.to_experts(merge_dtype(), base_weights(layer)).requires_grad_(False)
    unpacked = copy.copy(packed)
    unpacked._modules = dict(packed._modules)
    return unpacked
