"""QuantExperts: the fused experts of a mixture-of-experts layer, in 4 bits."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import autocast_is_on, is_transformed, outside_inference_mode
from ..functional import dequantize, grouped_linear_from_args, quantize_experts
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts, expert_columns
from .casts import check_cast
from .quant_module import QuantModule, checked_compute_dtype

WEIGHTS = ("gate_up_proj", "down_proj")
# down [E, r, K], up [E, N, r], scaling, of one adapter on one of the two weights.
ExpertsTerm = tuple[Tensor, Tensor, float]
FORWARD = ["hidden_states", "top_k_index", "top_k_weights"]
# What transformers says of a module with fused experts: attribute, what it must be, and what another value means. Older
# versions say only the first two.
LAYOUT = (
    ("is_transposed", False, "transposed weights"),
    ("has_bias", False, "biases"),
    ("has_gate", True, "no gate"),
    ("is_concatenated", True, "gate and up interleaved"),
    ("has_post_expert_norm", False, "a norm of their own"),
    ("_is_expert_parallel", False, "a share on each process"),
)


def layout_problem(module: nn.Module, block_size: int = 64) -> str | None:
    """Why QuantExperts cannot stand for `module`, None where it can; by its attributes, without knowing its class.

    It can where the module computes, for each token and each of its top k experts,
    `w * (act_fn(gate) * up) @ down_proj[e].T` with `gate, up = (x @ gate_up_proj[e].T).chunk(2)`.
    """
    kind = type(module).__name__
    gate_up, down = (module._parameters.get(name) for name in WEIGHTS)
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return f"a 3-D parameter of {kind}"
    if not all(hasattr(module, name) for name, *_ in LAYOUT[:2]):
        return f"{kind}, which does not say how its experts are laid out (is_transposed, has_bias)"
    found = [meaning for name, value, meaning in LAYOUT if getattr(module, name, value) != value]
    if found:
        return f"{kind}, experts with {', '.join(found)}"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return f"{kind}, experts with a gate of their own"
    held = {*module._parameters, *module._buffers, *module._modules} - {*WEIGHTS, "act_fn"}
    if held:
        return f"{kind}, which also holds {', '.join(sorted(held))}"
    if not callable(getattr(module, "act_fn", None)):
        return f"{kind}, which has no act_fn"
    if list(inspect.signature(module.forward).parameters) != FORWARD:
        return f"{kind}, whose forward does not take {', '.join(FORWARD)}"
    E, twice_I, H = gate_up.shape
    if twice_I % 2 or tuple(down.shape) != (E, H, twice_I // 2):
        return f"{kind}, whose down_proj {list(down.shape)} does not fit its gate_up_proj {list(gate_up.shape)}"
    step = expert_columns(block_size)
    uneven = [name for name, weight in zip(WEIGHTS, (gate_up, down)) if weight.shape[2] % step]
    return f"{kind}, where {' and '.join(uneven)} have rows that are no multiple of {step}" if uneven else None


class GroupedQuantLinear(QuantModule):
    """y = x[rows of e] @ Ŵ[e].T for every expert e, as `nf4kernels.grouped_linear`; one weight of QuantExperts."""

    WHO = "nf4kernels.QuantExperts"
    QUANTIZED = QuantizedExperts
    qweight: QuantizedExperts

    def __init__(self, qweights: QuantizedExperts) -> None:
        super().__init__()
        self.num_experts = qweights.shape[0]
        self.set_qweight(qweights)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Of Ŵ."""
        return self.num_experts, self.out_features, self.in_features

    def forward(self, x: Tensor, expert_offsets: Tensor) -> Tensor:
        return grouped_linear_from_args(x, expert_offsets, self._weight_args(), self.WHO)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Ŵ `[num_experts, out_features, in_features]`."""
        qweights = self.qweight
        out = torch.empty(self.weight_shape, dtype=dtype, device=self.weight.device)
        for expert, qweight in enumerate(qweights):
            dequantize(qweight, out=out[expert])
        return out

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"codebook={self.codebook}, block_size={self.block_size}, scale_codebook={self.scale_codebook}"
        )


class QuantExperts(nn.Module):
    """y = sum over a token's experts e of w_e * (act_fn(gate) * up) @ down[e].T, with gate, up = x @ gate_up[e].T.

    Stands for the modules of transformers 5 that hold all experts of a layer in two 3-D parameters, and is called as
    they are. The weights are frozen; gradients reach the tokens and the routing weights, so that a router trains
    through it. They hold no adapters, but `forward` takes some along. `.to(dtype)` moves neither the weights nor their
    scales.

    Args:
        gate_up: `[E, 2 * I, H]`, each expert's gate rows first.
        down: `[E, H, I]`.
        act_fn: the activation, elementwise.
        compute_dtype: as in `QuantLinear`.

    Attributes:
        gate_up_proj, down_proj: modules with `weight` and the buffers of QuantLinear, an expert dimension in front.

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
    ) -> None:
        super().__init__()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            if not isinstance(weight, QuantizedExperts):
                raise TypeError(f"{self.WHO}: {name} must be a QuantizedExperts, got {type(weight).__name__}")
        E, twice_I, H = gate_up.shape
        if twice_I % 2 or down.shape != (E, H, twice_I // 2):
            expected = f"[{E}, {H}, {twice_I // 2}] beside gate_up [E, 2 * I, H] = {list(gate_up.shape)}"
            raise ValueError(f"{self.WHO}: down must have shape {expected}, got {list(down.shape)}")
        self.num_experts, self.intermediate_dim, self.hidden_dim = E, twice_I // 2, H
        self.compute_dtype = checked_compute_dtype(compute_dtype, self.WHO)
        self.gate_up_proj, self.down_proj = GroupedQuantLinear(gate_up), GroupedQuantLinear(down)
        self.act_fn = act_fn
        self._emptied: tuple[nn.Module, ...] = ()

    @classmethod
    def from_experts(
        cls, module: nn.Module, compute_dtype: torch.dtype | None = None, **quant_options
    ) -> "QuantExperts":
        """The module that stands for `module`; act_fn is shared with it, training mode kept.

        Raises as `nf4kernels.quantize_experts` does, and ValueError where `module` is of another layout: transposed
        weights, biases, interleaved gates, a gate function of its own, and whatever does not say what it is.
        """
        problem = layout_problem(module, quant_options.get("block_size", 64))
        if problem is not None:
            raise ValueError(f"{cls.WHO}.from_experts: module must have the layout of Mixtral's experts, got {problem}")
        gate_up, down = (quantize_experts(getattr(module, name), **quant_options) for name in WEIGHTS)
        return cls.from_quantized(module, gate_up, down, compute_dtype)

    @classmethod
    def from_quantized(
        cls,
        module: nn.Module,
        gate_up: QuantizedExperts,
        down: QuantizedExperts,
        compute_dtype: torch.dtype | None = None,
    ) -> "QuantExperts":
        """As `from_experts`, of weights that are in 4 bits already; `module`, of that layout, may be on meta."""
        act_fn: Any = module.act_fn
        experts = cls(gate_up, down, act_fn, compute_dtype)
        experts._emptied = (_without_weights(module),)  # in a tuple: its state is no part of this module's
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
            terms: name of a weight -> adapters whose `scaling * x @ down[e].T @ up[e].T` is added to its product.

        Returns:
            `[tokens, H]` in hidden_states' dtype; the k products are weighted in the wider of the compute dtype and
            top_k_weights', and summed in fp32.

        Raises:
            TypeError, ValueError: an argument's dtype or shape. RuntimeError: an index outside 0..num_experts; on a
            device when it gets there.
        """
        tokens, top_k = self._check(hidden_states, top_k_index, top_k_weights)
        expert_ids = top_k_index.reshape(-1).long()
        in_range = ((expert_ids >= 0) & (expert_ids <= self.num_experts)).all()
        torch._assert_async(in_range, f"{self.WHO}: top_k_index must be in 0..{self.num_experts}")
        sorted_ids, order = expert_ids.sort(stable=True)
        place = order.argsort()  # where each (token, k) is among the sorted rows
        experts = torch.arange(self.num_experts, device=expert_ids.device)
        expert_offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)

        x = hidden_states.to(self._dtype(hidden_states))
        x = _take_rows(x, order // top_k, place, top_k)
        gate, up = self._product("gate_up_proj", x, expert_offsets, terms).chunk(2, -1)
        y = self._product("down_proj", self.act_fn(gate) * up, expert_offsets, terms)
        y = _take_rows(y, place, order, 1).view(tokens, top_k, self.hidden_dim)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, expert_offsets: Tensor, terms: Any) -> Tensor:
        y: Tensor = self._modules[name](x, expert_offsets)  # type: ignore[misc]  # there is one
        for term in (terms or {}).get(name, ()):
            y = y + experts_term(x, expert_offsets, *term).to(y.dtype)
        return y

    def _check(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[int, int]:
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
        return tokens, top_k_index.shape[1]

    def _dtype(self, x: Tensor) -> torch.dtype:
        if autocast_is_on(x.device):
            return torch.get_autocast_dtype(x.device.type)
        return self.compute_dtype or x.dtype

    @property
    def weight_names(self) -> list[str]:
        """Of the two weights, in the order of the parameters of what this module was made from."""
        made_from = self._emptied[0]._parameters if self._emptied else WEIGHTS
        return [name for name in made_from if name in WEIGHTS]

    @property
    def can_be_dense(self) -> bool:
        """Whether `to_experts` knows what to make: not of a QuantExperts that was not made by `from_experts`."""
        return bool(self._emptied)

    @outside_inference_mode
    def to_experts(self, dtype: torch.dtype | None = None, base_weights: Sequence[Tensor] | None = None) -> nn.Module:
        """A module of the class that this one was made from, with Ŵ rounded once, trainable.

        `base_weights`, gate_up_proj and down_proj, take Ŵ's place. This module is left as it is. Copies the weights;
        act_fn and configuration are shared. Without `dtype` each weight has its `dense_dtype`.

        Raises:
            ValueError: this module was not made by `from_experts`, or is on the meta device.
        """
        if not self.can_be_dense:
            raise ValueError(f"{self.WHO}.to_experts: the module must be from from_experts, got one that is not")
        dense: Any = _without_weights(self._emptied[0])
        parts = [self.gate_up_proj, self.down_proj]
        if base_weights is None:
            weights = [part.dequantize(dtype or part.dense_dtype) for part in parts]
            for name, part, weight in zip(WEIGHTS, parts, weights):  # Ŵ is finite in fp32, which is not made here
                if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
                    check_cast(part.dequantize(torch.float32), weight.dtype, f"{self.WHO}.to_experts: {name}")
        else:
            device = self.gate_up_proj.weight.device
            weights = []
            for name, part, weight in zip(WEIGHTS, parts, base_weights):
                target = dtype or part.dense_dtype
                check_cast(weight, target, f"{self.WHO}.to_experts: {name}")
                weights.append(weight.detach().to(device, target, copy=True))
        for name, weight in zip(WEIGHTS, weights):
            setattr(dense, name, nn.Parameter(weight))
        dense.act_fn = self.act_fn
        return dense.train(self.training)


def experts_term(x: Tensor, expert_offsets: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """scaling * x[rows of e] @ down[e].T @ up[e].T for every expert e, `[T, N]` in the factors' dtype.

    All experts' inner products are taken and those of other experts zeroed: E times the arithmetic of one adapter, and
    in return one GEMM each, no wait for a device, and plain autograd.
    """
    E, r, K = down.shape
    own = torch.searchsorted(expert_offsets, torch.arange(x.shape[0], device=x.device, dtype=torch.int32), right=True)
    inner = x.to(down.dtype) @ down.reshape(E * r, K).T
    experts = torch.arange(E, device=x.device).repeat_interleave(r)
    inner = torch.where(own[:, None] == experts, inner, 0)
    return scaling * inner @ up.transpose(0, 1).reshape(up.shape[1], E * r).T


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of the module itself that shares what is in it, its parameters left out."""
    emptied = copy.copy(module)
    emptied._parameters = dict.fromkeys(module._parameters)
    emptied._modules = dict(module._modules)
    return emptied


def _take_rows(x: Tensor, rows: Tensor, places: Tensor, times: int) -> Tensor:
    """As `_TakeRows`, which torch.func cannot transform."""
    y: Tensor = x[rows] if is_transformed(x, rows) else _TakeRows.apply(x, rows, places, times)
    return y


class _TakeRows(torch.autograd.Function):
    """y = x[rows], where each row of x is taken `times` times: row i by y[places[i * times + t]], t < times.

    The gradient gathers, too: a scatter would add in an order that a device does not fix.
    """

    @staticmethod
    def forward(ctx, x, rows, places, times):
        ctx.save_for_backward(places)
        ctx.sizes = x.shape[0], times
        return x[rows]

    @staticmethod
    def backward(ctx, dy):
        (places,) = ctx.saved_tensors
        return dy[places].unflatten(0, ctx.sizes).sum(1), None, None, None
