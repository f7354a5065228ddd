"""QuantExperts: the fused experts of a mixture-of-experts layer, in 4 bits."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import quantize_experts
from ..modes import autocast_is_on, outside_inference_mode
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts
from ..routing import combine_experts, sort_by_expert
from .casts import check_cast
from .experts_layout import (
    GATED,
    NORM,
    UNGATED,
    bias_name,
    dense_weights,
    layout_problem,
    own_gate,
    weight_names,
)
from .grouped_quant_linear import ExpertsTerm, GroupedQuantLinear
from .lora import FROM_WEIGHT, LoraConfig, quantize_experts_with_start
from .quant_module import checked_compute_dtype


class QuantExperts(nn.Module):
    """y = sum over a token's experts e of w_e * (gate(x @ gate_up[e].T + b[e]) @ down[e].T + c[e]).

    Where it is made of two weights, gate(h) is act_fn(first half of h) * second half, or act_fn(h) with
    `has_gate=False`. It stands for the modules of transformers 5 that hold all experts of a layer in two 3-D parameters
    (`from_experts`), and is called as they are: then gate is what that module has, its weights may be transposed and
    its norm follows down. The weights are frozen, biases and the norm are the module's own parameters; gradients reach
    them, the tokens and the routing weights, so that a router trains through it. Each weight holds adapters of its own
    (`add_lora`), a pair of factors for each expert. `.to(dtype)` moves neither the weights nor their scales.

    Args:
        gate_up: `[E, 2 * I, H]`, each expert's gate rows first; `[E, I, H]` without a gate.
        down: `[E, H, I]`.
        act_fn: the activation, elementwise.
        compute_dtype: as in `QuantLinear`.
        has_gate: whether the first weight has rows of a gate.
        biases: name of a weight -> `[E, N]`, its bias, or no entry.

    Attributes:
        gate_up_proj (up_proj without a gate), down_proj: modules with `weight` and the buffers of QuantLinear, an
            expert dimension in front; rows are in the order that the gate takes them.
        gate_up_proj_bias, down_proj_bias: parameters, where there are biases.

    Raises:
        TypeError, ValueError: the weights are no QuantizedExperts or do not fit each other.
    """

    WHO = GroupedQuantLinear.WHO
    act_fn: Callable[[Tensor], Tensor]

    def __init__(
        self,
        gate_up: QuantizedExperts,
        down: QuantizedExperts,
        act_fn: Callable[[Tensor], Tensor],
        compute_dtype: torch.dtype | None = None,
        has_gate: bool = True,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            if not isinstance(weight, QuantizedExperts):
                raise TypeError(f"{self.WHO}: {name} must be a QuantizedExperts, got {type(weight).__name__}")
        (E, N, H), halves = gate_up.shape, 2 if has_gate else 1
        if N % halves or down.shape != (E, H, N // halves):
            given = f"gate_up [E, {'2 * I' if has_gate else 'I'}, H] = {list(gate_up.shape)}"
            expected = f"[{E}, {H}, {N // halves}] beside {given}"
            raise ValueError(f"{self.WHO}: down must have shape {expected}, got {list(down.shape)}")
        self.num_experts, self.intermediate_dim, self.hidden_dim = E, N // halves, H
        self.compute_dtype = checked_compute_dtype(compute_dtype, self.WHO)
        self.weights = GATED if has_gate else UNGATED
        for name, weight in zip(self.weights, (gate_up, down)):
            setattr(self, name, GroupedQuantLinear(weight))
            self._set_bias(bias_name(name), (biases or {}).get(bias_name(name)), weight)
        self.act_fn = act_fn
        self._emptied: tuple[nn.Module, ...] = ()
        self._has_own_gate = False

    def _set_bias(self, name: str, bias: Tensor | None, weight: QuantizedExperts) -> None:
        if bias is not None and bias.shape != weight.shape[:2]:
            expected = list(weight.shape[:2])
            raise ValueError(f"{self.WHO}: {name} must have shape {expected}, got {list(bias.shape)}")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter(name, bias)

    @classmethod
    def from_experts(
        cls,
        module: nn.Module,
        compute_dtype: torch.dtype | None = None,
        lora: LoraConfig | None = None,
        **quant_options,
    ) -> "QuantExperts":
        """The module that stands for `module`; act_fn, biases and norm are shared with it, training mode kept.

        `lora` is attached to both weights, for each expert.

        Raises as `nf4kernels.quantize_experts` does, and ValueError where `module` is of a layout that it cannot stand
        for (`experts_layout.layout_problem` says why).
        """
        problem = layout_problem(module, quant_options.get("block_size"))
        if problem is not None:
            raise ValueError(
                f"{cls.WHO}.from_experts: module must have a layout of transformers' fused experts, got {problem}"
            )
        weights = list(dense_weights(module).values())
        if lora is None or lora.init not in FROM_WEIGHT:
            gate_up, down = (quantize_experts(weight, **quant_options) for weight in weights)
            experts = cls.from_quantized(module, gate_up, down, compute_dtype)
            for name, weight in zip(experts.weights if lora is not None else (), weights):
                part: Any = experts._modules[name]
                part.attach_lora(lora, weight.dtype)  # which on meta the quantized weight does not say
            return experts
        started = [quantize_experts_with_start(weight, lora, weight.dtype, **quant_options) for weight in weights]
        experts = cls.from_quantized(module, started[0][0], started[1][0], compute_dtype)
        for name, (_, A, B) in zip(experts.weights, started):
            part = experts._modules[name]
            part.attach_lora(lora, A.dtype)
            part.set_start(A, B)
        return experts

    @classmethod
    def from_quantized(
        cls,
        module: nn.Module,
        gate_up: QuantizedExperts,
        down: QuantizedExperts,
        compute_dtype: torch.dtype | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> "QuantExperts":
        """As `from_experts`, of weights that are in 4 bits already; `module`, of such a layout, may be on meta.

        Args:
            gate_up: `[E, 2 * I, H]`, whatever way round `module` has it; its rows in the order of module's columns or
                rows, interleaved where they are so there. `[E, I, H]` of a module without a gate.
            down: `[E, H, I]`.
            biases: "gate_up_proj_bias" and "down_proj_bias" -> `[E, N]`, in the place of module's own. These are taken
                over as they are, on meta too, for a loader to find them by the names that `module` has for them.
        """
        parameters: Any = module._parameters
        names = [bias_name(name) for name in weight_names(module)]
        biases = {name: parameters.get(name) for name in names} | dict(biases or {})
        act_fn: Any = getattr(module, "act_fn", None)
        experts = cls(gate_up, down, act_fn, compute_dtype, weight_names(module) == GATED, biases)
        if getattr(module, "has_post_expert_norm", False):
            experts.add_module(NORM, module._modules[NORM])
        experts._emptied = (_without_weights(module),)  # in a tuple: its state is no part of this module's
        experts._has_own_gate = own_gate(module) and getattr(module, "has_gate", True)
        return experts.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        terms: Mapping[str, Sequence[ExpertsTerm]] | None = None,
    ) -> Tensor:
        """The experts' weighted sum for every token; deterministic, and nothing waits for a device.

        Args:
            hidden_states: `[tokens, H]`, float32, bfloat16 or float16.
            top_k_index: `[tokens, k]`, integers: each token's experts. `num_experts` stands for none, as in
                transformers where an expert lives on another process.
            top_k_weights: `[tokens, k]`, their weights.
            terms: name of a weight -> adapters `(A [E, r, K], B [E, N, r], scaling)` in the place of its own.

        Returns:
            `[tokens, H]` in hidden_states' dtype; the k products are weighted and summed in fp32, and rounded once.

        Raises:
            TypeError, ValueError: an argument's dtype or shape. RuntimeError: an index outside 0..num_experts; on a
            device when it gets there.
        """
        self._check(hidden_states, top_k_index, top_k_weights)
        x = hidden_states.to(self._dtype(hidden_states))
        x, expert_offsets, positions = sort_by_expert(x, top_k_index, self.num_experts)
        y = self._of_rows(x, expert_offsets, terms)
        return combine_experts(y, positions, top_k_weights, hidden_states.dtype)

    def _of_rows(self, x: Tensor, expert_offsets: Tensor, terms: Any = None) -> Tensor:
        """Each expert's output for its rows `[T, H]`."""
        first, second = self.weights
        x = self._gate(self._product(first, x, expert_offsets, terms))
        y = self._product(second, x, expert_offsets, terms)
        norm = self._modules.get(NORM)
        return y if norm is None else norm(y)

    def _gate(self, x: Tensor) -> Tensor:
        """What stands between the two products, by the function of the module that this one was made from."""
        if self._has_own_gate:
            made_from: Any = self._emptied[0]
            y: Tensor = made_from._apply_gate(x)
            return y
        if self.weights == UNGATED:
            return self.act_fn(x)
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate) * up

    def _product(self, name: str, x: Tensor, expert_offsets: Tensor, terms: Any) -> Tensor:
        bias, given = self._parameters.get(bias_name(name)), (terms or {}).get(name, ())
        y: Tensor = self._modules[name](x, expert_offsets, bias, given)  # type: ignore[misc]  # there is one
        return y

    def add_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """Attach a fresh adapter of each expert to both weights, as `QuantLinear.add_lora`; `[E, r, K]`, `[E, N, r]`.

        Args:
            dtype: of the factors; None takes the dtype that the weights were quantized from.
        """
        parts: list[Any] = [self._modules[each] for each in self.weights]
        for part in parts:
            part.check_new_adapter(config, name, f"{self.WHO}.add_lora")
        for part in parts:
            part.attach_lora(config, dtype, name)

    def set_adapter(self, name: str | None) -> None:
        """Make the adapters of that name active and trainable; see `QuantLinear.set_adapter`."""
        for each in self.weights:
            part: Any = self._modules[each]
            part.set_adapter(name)

    def remove_adapter(self, name: str = "default") -> None:
        """Detach the adapters of that name, active or not; ValueError where there is none."""
        parts: list[Any] = [self._modules[each] for each in self.weights]
        known = sorted({own for part in parts for own in part.adapter_names})
        if name not in known:
            raise ValueError(f"{self.WHO}.remove_adapter: name must be one of {known}, got {name!r}")
        for part in parts:
            if name in part.adapter_names:
                part.remove_adapter(name)

    def _check(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        if hidden_states.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"{self.WHO}: hidden_states must be float32, bfloat16 or float16, got {hidden_states.dtype}"
            )
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden_dim:
            expected = f"[tokens, {self.hidden_dim}]"
            raise ValueError(f"{self.WHO}: hidden_states must have shape {expected}, got {list(hidden_states.shape)}")
        if top_k_index.is_floating_point() or top_k_index.is_complex() or top_k_index.dtype == torch.bool:
            raise TypeError(f"{self.WHO}: top_k_index must be integers, got {top_k_index.dtype}")
        tokens = hidden_states.shape[0]
        for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
            if tensor.dim() != 2 or tensor.shape[0] != tokens or tensor.shape[1] != top_k_index.shape[1]:
                expected = f"[{tokens}, k], the same for both"
                raise ValueError(f"{self.WHO}: {name} must have shape {expected}, got {list(tensor.shape)}")

    def _dtype(self, x: Tensor) -> torch.dtype:
        if autocast_is_on(x.device):
            return torch.get_autocast_dtype(x.device.type)
        return self.compute_dtype or x.dtype

    @property
    def weight_names(self) -> list[str]:
        """Of the two weights, in the order of the parameters of what this module was made from."""
        made_from = self._emptied[0]._parameters if self._emptied else self.weights
        return [name for name in made_from if name in self.weights]

    @property
    def can_be_dense(self) -> bool:
        """Whether `to_experts` knows what to make: not of a QuantExperts that was not made by `from_experts`."""
        return bool(self._emptied)

    @property
    def is_transposed(self) -> bool:
        """Whether the module that this one was made from has its weights as `[E, K, N]`."""
        return self.can_be_dense and bool(getattr(self._emptied[0], "is_transposed", False))

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, as the module that this one was made from has it."""
        part: Any = self._modules[name]
        E, N, K = part.weight_shape
        return (E, K, N) if self.is_transposed else (E, N, K)

    @outside_inference_mode
    def to_experts(
        self,
        dtype: torch.dtype | None = None,
        base_weights: Sequence[Tensor] | None = None,
        merge_lora: bool = True,
    ) -> nn.Module:
        """A module of the class and layout that this one was made from, with Ŵ, trainable.

        With `merge_lora` plus the active adapters' products, in fp32 and rounded once. `base_weights`, two in its
        layout, take Ŵ's place. This module is left as it is. Copies the weights and biases; act_fn, the norm and
        configuration are shared. Without `dtype` each weight has its `dense_dtype`, a bias its own.

        Raises:
            ValueError: this module was not made by `from_experts`, or is on the meta device.
        """
        if not self.can_be_dense:
            raise ValueError(f"{self.WHO}.to_experts: the module must be from from_experts, got one that is not")
        dense: Any = _without_weights(self._emptied[0])
        for index, name in enumerate(self.weights):
            part: Any = self._modules[name]
            who, target = f"{self.WHO}.to_experts: {name}", dtype or part.dense_dtype
            base = None if base_weights is None else base_weights[index]
            if merge_lora and part.lora is not None:
                weight = part.merged_weight(part.active_term(base is not None), target, who, base, self.is_transposed)
            elif base is None:
                weight = part.dequantize(target, self.is_transposed)
                if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
                    check_cast(part.dequantize(torch.float32), target, who)  # Ŵ is finite in fp32
            else:
                check_cast(base, target, who)
                weight = base.detach().to(part.weight.device, target, copy=True)
            setattr(dense, name, nn.Parameter(weight))
            bias = self._parameters.get(bias_name(name))
            if bias is not None:
                check_cast(bias, dtype or bias.dtype, f"{self.WHO}.to_experts: {bias_name(name)}")
                copied = bias.detach().to(dtype or bias.dtype, copy=True)
                setattr(dense, bias_name(name), nn.Parameter(copied, bias.requires_grad))
        for name in ("act_fn", NORM):
            if name in self._modules or hasattr(dense, name):
                setattr(dense, name, getattr(self, name))
        return dense.train(self.training)


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of the module itself that shares what is in it, its parameters left out."""
    emptied = copy.copy(module)
    emptied._parameters = dict.fromkeys(module._parameters)
    emptied._modules = dict(module._modules)
    return emptied
