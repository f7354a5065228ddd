"""QuantLinear: nn.Linear with a 4-bit weight and, if wanted, a LoRA adapter."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..autograd import autocast_is_on, outside_inference_mode
from ..functional import dequantize, linear_from_args, lora_linear_from_args, quantize, take_columns
from ..quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from .casts import cast, check_cast
from .lora import (
    FROM_WEIGHT,
    LoraConfig,
    WaitingAdapter,
    called_term,
    check_adapter_name,
    init_adapter,
    over_original_weight,
    plain_weight,
    quantize_with_start,
)  # fmt: skip
from .quant_module import BUFFERS, OTHER_BUFFERS, QuantModule, checked_compute_dtype

COLUMN_ORDER = "column_order"  # the buffer that a weight with act-order has, as `QuantizedWeight.column_order`
OF_WEIGHT = ("weight", *BUFFERS, *OTHER_BUFFERS, COLUMN_ORDER)  # what of a layer's state is of its weight
LoraTerm = tuple[Tensor, Tensor, float, float]  # A, B, scaling, dropout_p


class QuantLinear(QuantModule, nn.Linear):
    """y = x @ Ŵ.T + bias [+ scaling * dropout(x) @ lora_A.T @ lora_B.T], Ŵ in 4 bits.

    `weight` is a frozen uint8 parameter, the scales are buffers; `.to(dtype)` and mixed-precision casts leave both
    alone and move bias and adapter only. Nothing is ever repacked.

    Of several adapters one is active: its factors are `lora_A` and `lora_B`, and its name is `adapter_name`. The others
    wait, frozen, in the child `adapters`, by name. Where a factor has hooks, another forward or a parametrization, it
    is called as a module and its product added afterwards, which rounds once more.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; dtype is that of the dense weight which is
            drawn and then quantized, of bias and of a new adapter.
        codebook, block_size, double_quant, scale_codebook: as in `nf4kernels.quantize`.
        compute_dtype: what x is cast to for the product, the output being cast back; None computes in x's dtype.
            Under autocast, autocast's dtype wins.
        lora: an adapter to attach, or None.

    Source: QLoRA (arXiv 2305.14314), equation 5.
    """

    WHO = "nf4kernels.QuantLinear"
    WAITING = "adapters"  # the child that holds the adapters which wait, there where there are any
    column_order: Tensor | None
    adapter_name: str = "default"  # of the active adapter
    adapters_off: bool = False  # inside disable_adapters

    @outside_inference_mode
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        codebook: str | Tensor = "nf4",
        block_size: int | None = None,
        double_quant: bool = True,
        scale_codebook: str = "e4m3",
        compute_dtype: torch.dtype | None = None,
        lora: LoraConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        nn.Module.__init__(self)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        options = {
            "codebook": codebook, "block_size": block_size, "double_quant": double_quant,
            "scale_codebook": scale_codebook,
        }  # fmt: skip
        self._install_dense(dense, compute_dtype, lora, options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        lora: LoraConfig | None = None,
        compute_dtype: torch.dtype | None = None,
        **quant_options,
    ) -> "QuantLinear":
        """The layer that stands for `linear`; bias is shared with it, training mode kept.

        Raises as `nf4kernels.quantize` does, for linear's weight and `quant_options`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._install_dense(linear, compute_dtype, lora, quant_options)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls,
        qweight: QuantizedWeight,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
        lora: LoraConfig | None = None,
    ) -> "QuantLinear":
        """The layer around an existing quantized weight, whose tensors it shares."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._install(qweight, bias, compute_dtype, lora)
        return layer

    def _apply(self, fn, recurse: bool = True):
        """As of any such module; `Module.type` would cast the order, too."""
        order = self._buffers.get(COLUMN_ORDER)
        super()._apply(fn, recurse)
        if order is not None:
            self._buffers[COLUMN_ORDER] = order.to(self.weight.device)
        return self

    def _install(self, qweight, bias, compute_dtype, lora) -> None:
        self.compute_dtype = checked_compute_dtype(compute_dtype, self.WHO)
        self.set_qweight(qweight)
        self.register_parameter("bias", bias)
        self.lora: LoraConfig | None = None
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        if lora is not None:
            self.add_lora(lora, dtype=qweight.dtype if bias is None else bias.dtype)

    def _install_dense(self, dense: nn.Linear, compute_dtype, lora: LoraConfig | None, quant_options) -> None:
        """`_install` of a dense layer's weight, the only place where an adapter may start from it."""
        if lora is None or lora.init not in FROM_WEIGHT:
            self._install(quantize(dense.weight, **quant_options), dense.bias, compute_dtype, lora)
            return
        dtype = dense.weight.dtype if dense.bias is None else dense.bias.dtype
        qweight, A, B = quantize_with_start(dense.weight, lora, dtype, **quant_options)
        self._install(qweight, dense.bias, compute_dtype, None)
        self.attach_lora(lora, dtype)
        self._set_start(A, B)

    def _set_start(self, A: Tensor, B: Tensor) -> None:
        factors: Any = (self.lora_A, self.lora_B)
        for factor, values in zip(factors, (A, B)):
            if not factor.weight.is_meta:
                factor.weight.data.copy_(values)
                factor.start.copy_(values)

    def forward(self, x: Tensor, term: LoraTerm | None = None) -> Tensor:
        """The output `[..., out_features]`; with `term` that LoRA term in place of the layer's own adapter's."""
        if self.compute_dtype is None or autocast_is_on(x.device):
            return self._product(x, term)
        in_dtype = x.dtype
        return self._product(x.to(self.compute_dtype) if in_dtype in WEIGHT_DTYPES else x, term).to(in_dtype)

    def _product(self, x: Tensor, term: LoraTerm | None) -> Tensor:
        bias, lora = self._parameter("bias"), self.lora
        order = self._buffers.get(COLUMN_ORDER)
        taken = x if order is None else self._taken(x)
        if term is not None:
            given = term[0] if order is None else self._taken(term[0])
            return lora_linear_from_args(taken, self._weight_args(), given, term[1], term[2], bias, term[3])
        if lora is None or self.adapters_off:
            return linear_from_args(taken, self._weight_args(), bias, self.WHO)
        lora_A: Any = self._modules["lora_A"]
        lora_B: Any = self._modules["lora_B"]
        dropout_p = lora.dropout if self.training else 0.0
        A, B = plain_weight(lora_A), plain_weight(lora_B)
        if A is None or B is None or _has_any_global_hook():
            y = linear_from_args(taken, self._weight_args(), bias, self.WHO)
            return y + called_term(x, lora_A, lora_B, lora.scaling, dropout_p).to(y.dtype)
        A = A if order is None else self._taken(A)
        return lora_linear_from_args(taken, self._weight_args(), A, B, lora.scaling, bias, dropout_p)

    def _taken(self, x: Tensor) -> Tensor:
        """x or A with its columns in the order in which the bytes have Ŵ's."""
        return take_columns(x, self.column_order, self.in_features)

    @outside_inference_mode
    def set_qweight(self, qweight: QuantizedWeight) -> None:  # type: ignore[override]  # never experts
        """As of any such module, and the order of the columns."""
        super().set_qweight(qweight)
        self.register_buffer(COLUMN_ORDER, qweight.column_order)

    @property
    def qweight(self) -> QuantizedWeight:
        """The weight as a value that shares this module's tensors."""
        qweight: Any = super().qweight
        order = self._buffers.get(COLUMN_ORDER)
        return qweight if order is None else replace(qweight, column_order=order)

    def state_errors(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """As of any such module, and an order of columns that only one of the two has, or that is none."""
        errors = super().state_errors(state_dict, prefix)
        key, own = prefix + COLUMN_ORDER, self._buffers.get(COLUMN_ORDER)
        order = state_dict.get(key)
        if order is None:
            if own is not None and f"{prefix}weight" in state_dict:
                errors.append(f"{key} must be there, since this layer has it, got none")
        elif own is None:
            errors.append(f"{key}: this layer has its columns in order")
        elif order.dtype != own.dtype or order.shape != own.shape:
            errors.append(f"{key} must be {own.dtype} {list(own.shape)}, got {order.dtype} {list(order.shape)}")
        return errors

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Ŵ `[out_features, in_features]`, without the adapter."""
        return dequantize(self.qweight, dtype)

    @property
    def adapter_names(self) -> list[str]:
        """Of all adapters on this layer, the active one first."""
        active = [] if self.lora is None else [self.adapter_name]
        return [*active, *self._waiting()]

    def _waiting(self) -> dict[str, Any]:
        """name -> WaitingAdapter."""
        waiting = self._modules.get(self.WAITING)
        return {} if waiting is None else waiting._modules

    @outside_inference_mode
    def add_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """Attach a fresh adapter; ValueError where one of that name is attached already.

        It is active at once where no other is; else it waits, frozen, until `set_adapter` names it.

        Args:
            dtype: of lora_A and lora_B; None takes the dtype of bias, or the one the weight was quantized from.
            name: a part of the names of parameters, so without dots.
        """
        if config.init in FROM_WEIGHT:
            raise ValueError(
                "nf4kernels.QuantLinear.add_lora: init must be 'default' or 'gaussian' on a layer in 4 bits, whose"
                f" dense weight is gone (from_linear and quantize_model have it), got {config.init!r}"
            )
        self.attach_lora(config, dtype, name)

    @outside_inference_mode
    def attach_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """`add_lora` also for a start from the weight, whose values the caller has."""
        who = "nf4kernels.QuantLinear.add_lora"
        check_adapter_name(name, who)
        if name in self.adapter_names:
            raise ValueError(f"{who}: the layer must have no adapter {name!r} yet, got one already")
        if self.weight.is_meta and hasattr(self, "_hf_hook"):
            raise ValueError(f"{who}: the layer must not be offloaded yet: add adapters, then let accelerate dispatch")
        if dtype is None:
            dtype = self.qweight.dtype if self.bias is None else self.bias.dtype
        options: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": dtype}
        lora_A = nn.Linear(self.in_features, config.r, **options)
        lora_B = nn.Linear(config.r, self.out_features, **options)
        if config.init in FROM_WEIGHT:  # kept for what an adapter over the original weight is: the change since then
            for factor in (lora_A, lora_B):
                factor.register_buffer("start", torch.zeros_like(factor.weight))
        if not self.weight.is_meta:
            init_adapter(lora_A, lora_B, config)
        if self.lora is None:
            self.lora, self.lora_A, self.lora_B, self.adapter_name = config, lora_A, lora_B, name
        else:
            self._let_wait(name, WaitingAdapter(config, lora_A, lora_B))

    def _let_wait(self, name: str, adapter: WaitingAdapter) -> None:
        if self._modules.get(self.WAITING) is None:
            self.add_module(self.WAITING, nn.ModuleDict())
        waiting: Any = self._modules[self.WAITING]
        waiting[name] = adapter

    def get_adapter(self, name: str | None = None) -> tuple[LoraConfig, nn.Linear, nn.Linear] | None:
        """(configuration, lora_A, lora_B) of the adapter of that name, of the active one for None; None: no such."""
        if self.lora is not None and name in (None, self.adapter_name):
            return self.lora, self.lora_A, self.lora_B  # type: ignore[return-value]  # set with lora
        adapter = None if name is None else self._waiting().get(name)
        return None if adapter is None else (adapter.config, adapter.lora_A, adapter.lora_B)

    def set_adapter(self, name: str | None) -> None:
        """Make the adapter of that name active and trainable; the others wait, frozen.

        None, and a name that this layer does not have, leave it without an active one.
        """
        active = self.get_adapter()
        if active is not None and name != self.adapter_name:
            self._let_wait(self.adapter_name, WaitingAdapter(*active))
            self.lora = self.lora_A = self.lora_B = None
        if self.lora is None and name in self._waiting():
            adapter = self._take(name)
            self.lora, self.lora_A, self.lora_B, self.adapter_name = (
                adapter.config, adapter.lora_A, adapter.lora_B, name,
            )  # fmt: skip
        if self.lora_A is not None and self.lora_B is not None:
            self.lora_A.requires_grad_(True)
            self.lora_B.requires_grad_(True)

    def remove_adapter(self, name: str = "default") -> None:
        """Detach the adapter of that name, active or not; ValueError where there is none."""
        if name not in self.adapter_names:
            who = "nf4kernels.QuantLinear.remove_adapter"
            raise ValueError(f"{who}: name must be one of {self.adapter_names}, got {name!r}")
        if self.lora is not None and name == self.adapter_name:
            self.lora = self.lora_A = self.lora_B = None
        else:
            self._take(name)

    def _take(self, name: str) -> WaitingAdapter:
        waiting = self._waiting()
        adapter: WaitingAdapter = waiting.pop(name)
        if not waiting:
            del self._modules[self.WAITING]
        return adapter

    def __getstate__(self) -> dict[str, Any]:
        """Without `adapters_off`: a copy made inside disable_adapters is not inside it."""
        return {name: value for name, value in self.__dict__.items() if name != "adapters_off"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if COLUMN_ORDER not in self._buffers:  # of an earlier version
            self.register_buffer(COLUMN_ORDER, None)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Where the state has this layer's adapters, but another one active, that one is made active here as well."""
        stored = {key[len(prefix) :].split(".")[1] for key in state_dict if key.startswith(f"{prefix}{self.WAITING}.")}
        active = [name for name in self.adapter_names if name not in stored]
        has_active = f"{prefix}lora_A.weight" in state_dict
        if stored != set(self._waiting()) and stored <= set(self.adapter_names) and len(active) == has_active:
            self.set_adapter(active[0] if active else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def lora_delta(self) -> Tensor:
        """scaling * lora_B @ lora_A, fp32 `[out_features, in_features]`; ValueError without an adapter."""
        if self.lora is None or self.lora_A is None or self.lora_B is None:
            raise ValueError("nf4kernels.QuantLinear.lora_delta: the layer must have an adapter, got none")
        with torch.no_grad():
            return self.lora.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    @torch.no_grad()
    def delta_over_original(self) -> Tensor:
        """As `lora_delta`, over the weight from before quantization, of which the adapter may have taken its start."""
        config, A, B = over_original_weight(*self.get_adapter())  # type: ignore[misc]  # there is an active one
        return config.scaling * (B.float() @ A.float())

    @outside_inference_mode
    def to_linear(
        self, dtype: torch.dtype | None = None, merge_lora: bool = True, base_weight: Tensor | None = None
    ) -> nn.Linear:
        """A dense nn.Linear with Ŵ, plus the adapter's product if `merge_lora`, summed in fp32 and rounded once.

        `base_weight`, `[out_features, in_features]`, takes the place of Ŵ, as the weight from before quantization: of
        an adapter that started from it, the change since then is added. This layer is left as it is. Copies everything.
        Without `dtype` it is the bias's, or `dense_dtype` where there is none. ValueError where a finite value does not
        fit dtype.
        """
        if dtype is None:
            dtype = self.dense_dtype if self.bias is None else self.bias.dtype
        if base_weight is None:
            weight = self.dequantize(torch.float32)
        else:
            weight = base_weight.to(self.weight.device, torch.float32, copy=True)
        if merge_lora and self.lora is not None:
            weight += self.lora_delta() if base_weight is None else self.delta_over_original()
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(cast(weight, dtype, f"{self.WHO}.to_linear: weight"))
        if self.bias is not None:
            check_cast(self.bias, dtype, f"{self.WHO}.to_linear: bias")
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return dense.train(self.training)

    @outside_inference_mode
    def reset_parameters(self) -> None:
        """Draw a new weight as nn.Linear does and quantize it; a new bias and adapter likewise."""
        source = torch.bfloat16 if self.bias is None else self.bias.dtype
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.weight.device, dtype=source
        )
        for name in self.adapter_names:
            config, lora_A, lora_B = self.get_adapter(name)  # type: ignore[misc]  # it is there
            init_adapter(lora_A, lora_B, config)
        if self.lora is not None and self.lora.init in FROM_WEIGHT:
            dtype = lora_A.weight.dtype
            qweight, A, B = quantize_with_start(dense.weight, self.lora, dtype, **self.quant_options)
            self._set_start(A, B)
        else:
            qweight = quantize(dense.weight, **self.quant_options)
        self.set_qweight(qweight)
        if self.bias is not None:
            self.bias.data.copy_(dense.bias)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codebook={self.codebook}, block_size={self.block_size}, scale_codebook={self.scale_codebook}"
        )
        return text if self.lora is None else f"{text}, lora_r={self.lora.r}"
