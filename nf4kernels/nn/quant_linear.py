"""QuantLinear: nn.Linear with a 4-bit weight and, if wanted, a LoRA adapter."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import dequantize, linear_from_args, lora_linear_from_args, quantize, take_columns
from ..modes import autocast_is_on, outside_inference_mode, without_autocast
from ..quantized_weight import WEIGHT_DTYPES, QuantizedWeight, is_permutation
from .adapted_module import AdaptedModule
from .casts import cast, check_cast
from .lora import (
    FROM_WEIGHT,
    LoraConfig,
    called_term,
    init_adapter,
    over_original_weight,
    plain_weight,
    quantize_with_start,
)  # fmt: skip
from .quant_module import OTHER_BUFFERS, SCALE_TENSORS, checked_compute_dtype, normal
from .released import check_gathered

COLUMN_ORDER = "column_order"  # the buffer that a weight with act-order has, as `QuantizedWeight.column_order`
OF_WEIGHT = ("weight", *SCALE_TENSORS, *OTHER_BUFFERS, COLUMN_ORDER)  # what of a layer's state is of its weight
LoraTerm = tuple[Tensor, Tensor, float, float]  # A, B, scaling, dropout_p


class QuantLinear(AdaptedModule, nn.Linear):
    """y = x @ Ŵ.T + bias [+ scaling * dropout(x) @ lora_A.T @ lora_B.T], Ŵ in 4 bits.

    `weight` is a frozen uint8 parameter, and so are 8-bit scales, `absmax`; the others are buffers. `.to(dtype)` and
    mixed-precision casts leave all of them alone and move bias and adapter only. Nothing is ever repacked.

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
    column_order: Tensor | None

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
        made = self._buffers.get(COLUMN_ORDER)
        if order is not None and made is not None and made.dtype != order.dtype:
            self._buffers[COLUMN_ORDER] = order.to(made.device)
        return self

    def _install(self, qweight, bias, compute_dtype, lora) -> None:
        self.compute_dtype = checked_compute_dtype(compute_dtype, self.WHO)
        self.set_qweight(qweight)
        self.register_parameter("bias", bias)
        self.lora = self.lora_A = self.lora_B = None
        if lora is not None:
            self.add_lora(lora, dtype=qweight.dtype if bias is None else bias.dtype)

    def _install_dense(self, dense: nn.Linear, compute_dtype, lora: LoraConfig | None, quant_options) -> None:
        """`_install` of a dense layer's weight, the only place where an adapter may start from it."""
        check_gathered([("the dense weight", dense.weight)], self.WHO)
        if lora is None or lora.init not in FROM_WEIGHT:
            self._install(quantize(dense.weight, **quant_options), dense.bias, compute_dtype, lora)
            return
        dtype = dense.weight.dtype if dense.bias is None else dense.bias.dtype
        qweight, A, B = quantize_with_start(dense.weight, lora, dtype, **quant_options)
        self._install(qweight, dense.bias, compute_dtype, None)
        self.attach_lora(lora, dtype)
        self.set_start(A, B)

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
        order = qweight.column_order
        self.register_buffer(COLUMN_ORDER, None if order is None else normal(order))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if COLUMN_ORDER not in self._buffers:  # of an earlier version
            self.register_buffer(COLUMN_ORDER, None)

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
        elif not is_permutation(order):
            errors.append(f"{key} must be a permutation of the {len(order)} columns, got none")
        return errors

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Ŵ `[out_features, in_features]`, without the adapter."""
        return dequantize(self.qweight, dtype)

    def new_factors(self, config: LoraConfig, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
        if dtype is None:
            dtype = self.original_dtype if self.bias is None else self.bias.dtype
        options: dict[str, Any] = {"bias": False, "device": self.weight.device, "dtype": dtype}
        return nn.Linear(self.in_features, config.r, **options), nn.Linear(config.r, self.out_features, **options)

    def lora_delta(self) -> Tensor:
        """scaling * lora_B @ lora_A, fp32 `[out_features, in_features]`; ValueError without an adapter."""
        if self.lora is None or self.lora_A is None or self.lora_B is None:
            raise ValueError("nf4kernels.QuantLinear.lora_delta: the layer must have an adapter, got none")
        with torch.no_grad(), without_autocast(self.weight.device):
            return self.lora.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    @torch.no_grad()
    def delta_over_original(self) -> Tensor:
        """As `lora_delta`, over the weight from before quantization, of which the adapter may have taken its start."""
        config, A, B = over_original_weight(*self.get_adapter())  # type: ignore[misc]  # there is an active one
        with without_autocast(A.device):
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
            if tuple(base_weight.shape) != self.weight_shape:
                came = list(base_weight.shape)
                raise ValueError(f"{self.WHO}.to_linear: base_weight must be {list(self.weight_shape)}, got {came}")
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
            for factor in (lora_A, lora_B):
                if hasattr(factor, "start"):  # an adapter of the weight before begins anew, as any other
                    factor.start.copy_(factor.weight)
        if self.lora is not None and self.lora.init in FROM_WEIGHT:
            dtype = self.lora_A.weight.dtype
            qweight, A, B = quantize_with_start(dense.weight, self.lora, dtype, **self.quant_options)
            self.set_start(A, B)
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
