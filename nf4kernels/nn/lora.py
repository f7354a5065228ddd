"""LoRA: its configuration, how its factors start, and how they are multiplied where more than a product is wanted."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import dequantize, quantize, quantize_experts
from ..modes import without_autocast
from ..quantized_weight import QuantizedExperts, QuantizedWeight, stack_experts

FROM_WEIGHT = ("pissa", "loftq")  # the starts that need the dense weight, and change what is quantized
INITS = ("default", "gaussian", *FROM_WEIGHT)
LOFTQ_ITERATIONS = 5
# Of the randomised SVD. On matrices of 512 and 1024 it leaves at most 0.06 % more than the best approximation, and with
# half the iterations 0.2 %. At rank 16 a full SVD takes 14 times as long on a matrix of 1024, 28 times on one of 2048.
OVERSAMPLING, POWER_ITERATIONS, SEED = 16, 8, 0


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scaling and start of a LoRA adapter.

    Attributes:
        r: rank, at least 1.
        alpha: scaling numerator.
        dropout: probability of zeroing an input element of the LoRA path while training, in [0, 1).
        use_rslora: scale by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
        init: "default" (A Kaiming uniform, B zero) or "gaussian" (A normal with deviation 1/r, B zero), PEFT's two. Or,
            where the dense weight W is there (`quantize_model`, `from_linear`, `from_experts`), "pissa": the product is
            W's best approximation of rank r, and what is left of W is quantized (arXiv 2404.02948); or "loftq": it is
            that of the quantization error, in alternation (arXiv 2310.08659). The 4-bit weight is then another than
            without the adapter; `save_adapters` writes a plain LoRA of twice the rank for the original weight.

    Raises:
        ValueError: a field is out of its range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    use_rslora: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"nf4kernels.LoraConfig: r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"nf4kernels.LoraConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.init not in INITS:
            raise ValueError(f"nf4kernels.LoraConfig: init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.init in FROM_WEIGHT and not self.alpha > 0:
            raise ValueError(f"nf4kernels.LoraConfig: alpha must be above 0 with init={self.init!r}, got {self.alpha}")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def check_adapter_name(name: str, who: str) -> None:
    """ValueError for what cannot be a part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{who}: name must be a word that can be a module's name, got {name!r}")


def init_adapter(lora_A: Any, lora_B: Any, config: LoraConfig) -> None:
    """Start the factors in place so that their product is zero; a start from the weight is not made here.

    Factors of experts start as each expert's own would.
    """
    A, B = lora_A.weight.data, lora_B.weight.data
    if config.init == "gaussian":
        nn.init.normal_(A, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(A.flatten(0, -2), a=math.sqrt(5))
    nn.init.zeros_(B)


@torch.no_grad()
def quantize_with_start(
    weight: Tensor, config: LoraConfig, dtype: torch.dtype, **quant_options
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """(Ŵ, A [r, K], B [N, r]) with Ŵ + scaling * B @ A close to the dense weight, by `config.init`; reproducible.

    A and B have `dtype`; what is quantized is what their rounded product leaves, in weight's dtype.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta:
        qweight = quantize(weight, **quant_options)  # every check is there
        return qweight, weight.new_empty(config.r, weight.shape[1]), weight.new_empty(weight.shape[0], config.r)
    W = weight.detach().float()
    if config.init == "pissa":
        A, B = principal_factors(W, config, dtype)
        return quantize(_left(W, A, B, config).to(weight.dtype), **quant_options), A, B
    qweight = quantize(weight, **quant_options)
    A, B = principal_factors(W - dequantize(qweight, torch.float32), config, dtype)
    for _ in range(LOFTQ_ITERATIONS - 1):
        qweight = quantize(_left(W, A, B, config).to(weight.dtype), **quant_options)
        A, B = principal_factors(W - dequantize(qweight, torch.float32), config, dtype)
    return qweight, A, B


def quantize_experts_with_start(
    weight: Tensor, config: LoraConfig, dtype: torch.dtype, **quant_options
) -> tuple[QuantizedExperts, Tensor, Tensor]:
    """`quantize_with_start` of each expert's weight of `[E, N, K]`; A is [E, r, K], B [E, N, r]."""
    E, N, K = weight.shape
    if weight.is_meta or not E:
        options: Any = {"dtype": dtype, "device": weight.device}
        factors = torch.empty(E, config.r, K, **options), torch.empty(E, N, config.r, **options)
        return quantize_experts(weight, **quant_options), *factors
    first, *others = [quantize_with_start(each, config, dtype, **quant_options) for each in weight]
    qweights, A, B = zip(first, *others)
    return stack_experts(qweights), torch.stack(A), torch.stack(B)


def _left(W: Tensor, A: Tensor, B: Tensor, config: LoraConfig) -> Tensor:
    with without_autocast(W.device):
        return torch.addmm(W, B.float(), A.float(), alpha=-config.scaling)


def principal_factors(W: Tensor, config: LoraConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) with scaling * B @ A the best approximation of W of rank r, each with the root of the singular values.

    Where W has fewer singular values than r the other rows of A are drawn, and those columns of B are zero.
    """
    U, S, Vh = principal_components(W, config.r)
    roots = (S / config.scaling).sqrt()
    A, B = roots[:, None] * Vh, U * roots
    missing = config.r - len(S)
    if missing > 0:
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randn(missing, W.shape[1], generator=generator).to(W.device) / max(W.shape[1], 1) ** 0.5
        A, B = torch.cat([A, drawn]), torch.cat([B, B.new_zeros(W.shape[0], missing)], 1)
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


def principal_components(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [N, r], S [r], Vh [r, K]), the first r singular triples of W, fp32; fewer where W has fewer.

    By a randomised range finder with power iterations from a fixed seed (arXiv 0909.4061, algorithm 4.4).
    """
    width = min(r + OVERSAMPLING, *W.shape)
    generator = torch.Generator().manual_seed(SEED)
    with without_autocast(W.device):
        Q = W @ torch.randn(W.shape[1], width, generator=generator).to(W.device)
        for _ in range(POWER_ITERATIONS):
            Q = W @ torch.linalg.qr(W.T @ torch.linalg.qr(Q).Q).Q
        Q = torch.linalg.qr(Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
        return (Q @ U)[:, :r], S[:r], Vh[:r]


def over_original_weight(config: LoraConfig, lora_A: Any, lora_B: Any) -> tuple[LoraConfig, Tensor, Tensor]:
    """(configuration, A, B) of the adapter over the original weight, of which one from `FROM_WEIGHT` has taken its own.

    There it is what it has become less what it began as, which is a plain adapter of twice the rank and the same
    scaling; any other adapter is itself.
    """
    A, B = lora_A.weight, lora_B.weight
    if config.init not in FROM_WEIGHT:
        return config, A, B
    first_A, first_B = lora_A.get_buffer("start"), lora_B.get_buffer("start")
    alpha = config.alpha * (math.sqrt(2) if config.use_rslora else 2)
    doubled = replace(config, r=2 * config.r, alpha=alpha, init="default")
    return doubled, torch.cat([A, first_A.to(A.dtype)], -2), torch.cat([B, -first_B.to(B.dtype)], -1)


class WaitingAdapter(nn.Module):
    """An adapter that is not the active one of its layer: kept with it, frozen, and multiplied with nothing."""

    def __init__(self, config: LoraConfig, lora_A: nn.Module, lora_B: nn.Module) -> None:
        super().__init__()
        self.config, self.lora_A, self.lora_B = config, lora_A, lora_B
        self.requires_grad_(False)


def plain_weight(factor: nn.Linear) -> Tensor | None:
    """The weight of a factor that is a product with it and no more; None where someone wants the module to be called.

    That is: hooks, another forward (accelerate sets one on the instance), a parametrization (another class), a bias.
    By the instance's dictionary: an attribute look-up of nn.Module takes 0.6 us.
    """
    own = factor.__dict__
    parameters = own["_parameters"]
    if (
        type(factor) is not nn.Linear
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or parameters.get("bias") is not None
    ):
        return None
    weight = parameters.get("weight")
    return factor.weight if weight is None else weight  # a plain attribute where sharding made it one


def called_term(x: Tensor, lora_A: nn.Module, lora_B: nn.Module, scaling: float, dropout_p: float) -> Tensor:
    """scaling * lora_B(lora_A(dropout(x))): the modules are called, each with its input in the dtype of its weight."""
    if dropout_p > 0:
        x, _ = torch.native_dropout(x, dropout_p, True)
    for factor in (lora_A, lora_B):
        weight = getattr(factor, "weight", None)
        x = factor(x if weight is None else x.to(weight.dtype))
    return scaling * x
