"""Small models for training on several ranks, the same on every rank, and the plain step that theirs must equal."""

import copy

import torch
from support import tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import nf4kernels as nf4

LORA = nf4.LoraConfig(r=4, init="gaussian")
ODD = {"intermediate_size": 127}  # rows that no number of ranks divides, and columns that are no whole blocks
SQUARE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}  # room for every two bytes in a weight
OPTIONS = {
    "float scales": {"double_quant": False}, "mxfp4": {"codebook": "mxfp4"}, "nvfp4": {"codebook": "nvfp4"},
}  # fmt: skip


def dense(case: str) -> nn.Module:
    if case == "experts":
        return tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    if case == "every byte":
        return tiny.llama(**SQUARE)
    return tiny.llama(tie_word_embeddings=case == "tied", **(ODD if case == "odd rows" else {}))


def made(case: str) -> nn.Module:
    """The same on every rank: a frozen base in 4 bits and filled adapters, of ours or of PEFT's."""
    torch.manual_seed(0)
    model = dense(case)
    model.requires_grad_(False)
    nf4.quantize_model(model, lora=None if case == "peft" else LORA, progress=False, **OPTIONS.get(case, {}))
    if case == "peft":
        model = with_peft(model)
    if case in ("several adapters", "unused"):
        for layer in tiny.layers(model).values():
            layer.add_lora(LORA, name="second")
        nf4.set_adapter(model, "second")
    if case == "unused":
        for layer in tiny.layers(model).values():
            layer.adapters.requires_grad_(True)
    if case == "every byte":
        fill_bytes(model.model.layers[0].mlp.up_proj)
    tiny.fill_adapters(model)
    if case == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def with_peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    import nf4kernels.integrations.peft  # noqa: F401 (makes PEFT know our layers)

    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def every_two_bytes() -> Tensor:
    """uint8 [512, 256]: every pattern of 16 bits, so of bf16 every NaN, and of fp32 many."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(512, 256).clone()


def fill_bytes(layer: nf4.QuantLinear) -> None:
    codes = torch.arange(layer.absmax.numel()).to(torch.uint8).view(layer.absmax.shape)
    layer.absmax, layer.weight = nn.Parameter(codes, False), nn.Parameter(every_two_bytes(), False)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Whose step is one rounded multiplication and one subtraction an element, wherever a shard begins."""
    return torch.optim.SGD(trained(model).values(), lr=0.125, foreach=False)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def plain_gradients(
    model: nn.Module, batches: list[list[Tensor]], dtype=None, reduce_dtype=torch.float32
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of each rank's last batch, and gradients: of a rank the sum over its batches, then the mean of ranks.

    Args:
        batches: of each rank.
        dtype: what parameters are computed with.
        reduce_dtype: what the mean is taken in; gradients come in fp32.
    """
    worker = copy.deepcopy(model)
    if dtype is not None:
        for parameter in worker.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    losses, sums = [], {}
    for mine in batches:
        worker.zero_grad()
        for rows in mine:
            loss = loss_of(worker, rows)
            loss.backward()
        losses.append(loss.detach())
        for name, parameter in trained(worker).items():
            if parameter.grad is not None:
                gradient = parameter.grad.to(reduce_dtype)
                sums[name] = sums[name] + gradient if name in sums else gradient.clone()
    return losses, {name: (total / len(batches)).float() for name, total in sums.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaN, which codebooks hold."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
