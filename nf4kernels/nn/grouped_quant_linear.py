"""GroupedQuantLinear: one weight of QuantExperts, all experts' in 4 bits, and its adapters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import dequantize
from ..grouped import grouped_linear_from_args, grouped_lora_linear_from_args
from ..modes import without_autocast
from ..quantized_weight import QuantizedExperts
from .adapted_module import AdaptedModule
from .casts import cast
from .lora import LoraConfig, over_original_weight

ExpertsTerm = tuple[Tensor, Tensor, float]  # A [E, r, K], B [E, N, r], scaling


class ExpertsFactor(nn.Module):
    """A LoRA factor of all experts, `weight` `[E, rows, columns]`; called for it, so that hooks may bring it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class GroupedQuantLinear(AdaptedModule):
    """y = x[rows of e] @ Ŵ[e].T [+ scaling * dropout(x[rows of e]) @ A[e].T @ B[e].T] for every expert e.

    One weight of QuantExperts, which call it; see `nf4kernels.grouped_lora_linear`. `lora_A` holds `[E, r, K]` and
    `lora_B` `[E, N, r]`.
    """

    WHO = "nf4kernels.QuantExperts"
    QUANTIZED = QuantizedExperts
    qweight: QuantizedExperts

    def __init__(self, qweights: QuantizedExperts) -> None:
        super().__init__()
        self.num_experts, self.lora_A, self.lora_B = qweights.shape[0], None, None
        self.set_qweight(qweights)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Of Ŵ."""
        return self.num_experts, self.out_features, self.in_features

    def forward(
        self, x: Tensor, expert_offsets: Tensor, bias: Tensor | None = None, terms: Sequence[ExpertsTerm] = ()
    ) -> Tensor:
        """`bias` `[E, N]`, cast to x's dtype: each expert's own row is added; `terms` replace the own adapter's."""
        A, B, scaling, dropout_p = self._term(x.dtype, terms)
        if A is None or B is None:
            return grouped_linear_from_args(x, expert_offsets, self._weight_args(), bias, self.WHO)
        lora = (A, B, scaling, dropout_p)
        return grouped_lora_linear_from_args(x, expert_offsets, self._weight_args(), *lora, bias, self.WHO)

    def _term(
        self, dtype: torch.dtype, terms: Sequence[ExpertsTerm]
    ) -> tuple[Tensor | None, Tensor | None, float, float]:
        """(A, B, scaling, dropout_p) of one LoRA term; several adapters are one of their ranks' sum."""
        if len(terms) == 1:
            return *terms[0], 0.0
        if terms:
            A = torch.cat([A.to(dtype) for A, _, _ in terms], 1)
            B = torch.cat([(scaling * B).to(dtype) for _, B, scaling in terms], 2)
            return A, B, 1.0, 0.0
        if self.lora is None or self.adapters_off:
            return None, None, 1.0, 0.0
        factors: Any = self._modules
        dropout_p = self.lora.dropout if self.training else 0.0
        return factors["lora_A"](), factors["lora_B"](), self.lora.scaling, dropout_p

    def new_factors(self, config: LoraConfig, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
        E, N, K = self.weight_shape
        options: Any = {"dtype": dtype or self.original_dtype, "device": self.weight.device}
        return (
            ExpertsFactor(torch.empty(E, config.r, K, **options)),
            ExpertsFactor(torch.empty(E, N, config.r, **options)),
        )

    def dequantize(self, dtype: torch.dtype = torch.bfloat16, transposed: bool = False) -> Tensor:
        """Ŵ `[num_experts, out_features, in_features]`, or each expert's transpose; contiguous; without adapters."""
        E, N, K = self.weight_shape
        out = torch.empty((E, K, N) if transposed else (E, N, K), dtype=dtype, device=self.weight.device)
        for expert, qweight in enumerate(self.qweight):
            if transposed:
                out[expert] = dequantize(qweight, dtype).T
            else:
                dequantize(qweight, out=out[expert])
        return out

    @torch.no_grad()
    def merged_weight(
        self, terms: Sequence[ExpertsTerm], dtype: torch.dtype, who: str, base: Tensor | None, transposed: bool
    ) -> Tensor:
        """Ŵ + the sum of scaling * B[e] @ A[e] for every expert e, `[E, N, K]`; in fp32, each expert rounded once.

        `base` takes the place of Ŵ. Where `transposed`, it and the result are each expert's transpose. ValueError where
        a finite value does not fit dtype.
        """
        E, N, K = self.weight_shape
        out = torch.empty((E, K, N) if transposed else (E, N, K), dtype=dtype, device=self.weight.device)
        for expert, qweight in enumerate(self.qweight):
            if base is None:
                weight = dequantize(qweight, torch.float32)
            else:
                given = base[expert].to(out.device, torch.float32)
                weight = given.T if transposed else given
            with without_autocast(weight.device):
                for A, B, scaling in terms:
                    weight = torch.addmm(weight, B[expert].float(), A[expert].float(), alpha=scaling)
            out[expert] = cast(weight.T if transposed else weight, dtype, who)
        return out

    def active_term(self, over_original: bool = False) -> list[ExpertsTerm]:
        """The active adapter's, if there is one; over Ŵ, or over the weight that it may have taken its start from."""
        if self.lora is None:
            return []
        config, A, B = self.lora, self.lora_A.weight, self.lora_B.weight
        if over_original:
            config, A, B = over_original_weight(config, self.lora_A, self.lora_B)
        return [(A, B, config.scaling)]

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"codebook={self.codebook}, block_size={self.block_size}, scale_codebook={self.scale_codebook}"
        )
