"""Quantization-aware training: layers that round while they are trained, and become 4-bit layers bit for bit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..functional import quantize
from ..model.dispatched import check_not_dispatched
from ..model.heads import SKIP
from ..model.memory import model_bytes
from ..model.plan import check_container, check_skip, plan_layers, replace_module
from ..model.quantize import check_options, squared_error
from ..model.report import QuantizedLayer, QuantizeReport
from ..model.walk import get_submodule, inside, named_modules
from ..modes import outside_inference_mode
from ..nn.lora import LoraConfig
from .batches import Batch, cross_entropy
from .fake_quantize import FakeQuantLinear, check_lora_merged

Loss = Callable[[nn.Module, Batch], Tensor]


@outside_inference_mode
def prepare_qat(
    model: nn.Module,
    skip: Iterable[str] = (),
    lora_merged: LoraConfig | None = None,
    clip: bool = False,
    **quant_options,
) -> list[str]:
    """Put a FakeQuantLinear in the place of each nn.Linear that `quantize_model` would replace, in place.

    Parameters are shared, not copied, and the state dict keeps its keys, so that dense checkpoints load and are
    written. A second call changes nothing. `quantize_model` leaves prepared layers alone.

    Args:
        model, skip: as in `nf4kernels.quantize_model`.
        lora_merged: train adapters on frozen weights, merged before each rounding, so that no rounding is left when
            they are merged at the end; None trains the weights. What else of the model is trained is not changed.
        clip: as in `fake_quantize`.
        quant_options: as in `nf4kernels.quantize`, and compute_dtype as in `QuantLinear`.

    Returns:
        The names of the layers that were replaced.

    Raises:
        TypeError, ValueError: an argument is wrong, an entry of `skip` matches nothing, a layer's weight cannot be
            quantized (the message names it), or the model has fused experts that `skip` does not name; the model is
            then unchanged.
    """
    who = "nf4kernels.recover.prepare_qat"
    check_container(model, "model", who)
    model = inside(model)
    if isinstance(skip, str):
        raise TypeError(f"{who}: skip must be a sequence of names, got {skip!r}")
    skip = tuple(skip)
    check_skip(model, skip, who)
    check_lora_merged(lora_merged, who)
    check_not_dispatched(model, who)
    check_options(None, quant_options, who)
    found, _ = plan_layers(model, (*SKIP, *skip), quant_options.get("block_size"))
    how = {name: value for name, value in quant_options.items() if name != "compute_dtype"}
    for name, *_ in found:
        dense: Any = get_submodule(model, name)
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"{who}: model must have no fused experts but those in skip, got {name}")
        try:
            quantize(dense.weight, **how)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{who}: layer {name}: {error}") from None
    for names in found:
        dense = get_submodule(model, names[0])
        replace_module(model, names, dense, FakeQuantLinear(dense, lora_merged, clip, **quant_options))
    return [names[0] for names in found]


@outside_inference_mode
def convert_qat(model: nn.Module, progress: bool = True) -> QuantizeReport:
    """Replace every FakeQuantLinear by the QuantLinear whose Ŵ and output are its own bit for bit, in place.

    Adapters are merged. Biases, hooks and modes are kept. One layer at a time is copied; a model without such layers
    stays as it is.

    Returns:
        The layers with their bytes and how far Ŵ is from the (merged) weight.

    Raises:
        TypeError, ValueError: model is no module, or a weight has become NaN or inf (the message names the layer);
            layers before it are converted, and another call goes on from there.
    """
    who = "nf4kernels.recover.convert_qat"
    check_container(model, "model", who)
    model = inside(model)
    before, layers = model_bytes(model), []
    for names, fake in tqdm(_prepared(model), desc="convert", unit="layer", disable=not progress):
        try:
            layer = fake.to_quant_linear()
        except ValueError as error:
            raise ValueError(f"{who}: layer {names[0]}: {error}") from None
        errors = squared_error(layer.qweight, fake.merged())
        shape = tuple(fake.weight.shape)
        layers.append(QuantizedLayer(names[0], shape, fake.weight.nbytes, layer.nbytes, *errors))
        replace_module(model, names, fake, layer)
    return QuantizeReport(layers, [], before, model_bytes(model))


@outside_inference_mode
def remove_qat(model: nn.Module) -> list[str]:
    """Replace every FakeQuantLinear by the nn.Linear with its weight before rounding, adapters merged; the names."""
    check_container(model, "model", "nf4kernels.recover.remove_qat")
    model = inside(model)
    replaced = []
    for names, fake in _prepared(model):
        replace_module(model, names, fake, fake.to_linear())
        replaced.append(names[0])
    return replaced


def predicted(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of what the batch is to predict, in fp32; ValueError for a batch without labels."""
    return cross_entropy(model, batch, "nf4kernels.recover.qat_train")


def qat_train(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss = predicted,
    learning_rate: float = 1e-5,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool = True,
) -> list[float]:
    """One step on each batch of a finite iterable; the losses before each step.

    Any model and any loss: a plain loop, AdamW without weight decay, the learning rate falling to zero in a line,
    gradients clipped at norm 1. An `optimizer` that is given keeps its learning rates. The model is left in training
    mode.

    Args:
        loss: from a model and a batch to a scalar, as one that compares with a teacher.

    Raises:
        ValueError: nothing is trained, or a loss is NaN or inf (before that step).
    """
    who = "nf4kernels.recover.qat_train"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"{who}: model must have a parameter that requires a gradient, got none")
    batches, given = list(batches), optimizer is not None
    optimizer = optimizer or torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    optimizer.zero_grad(set_to_none=True)  # of whatever was before
    model.train()
    losses = []
    bar = tqdm(batches, desc="qat", unit="step", disable=not progress)
    for step, batch in enumerate(bar):
        if not given:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / len(batches))
        value = loss(model, batch)
        losses.append(value.item())
        if not value.isfinite():
            raise ValueError(f"{who}: loss must be finite, got {losses[-1]} at step {step}")
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def _prepared(model: nn.Module) -> list[tuple[list[str], FakeQuantLinear]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model):
        if isinstance(module, FakeQuantLinear):
            names.setdefault(module, []).append(name)
    return [(each, module) for module, each in names.items() if isinstance(module, FakeQuantLinear)]
