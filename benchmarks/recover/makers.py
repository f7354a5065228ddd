"""What is done to the 16-bit model: functions of the setting and a seed, that `ways` has the choices for."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels import recover
from nf4kernels.recover import Candidate, Contrastive, Cosine, DistillLoss, Hint
from nf4kernels.recover.activations import RoundedInputs
from nf4kernels.recover.sensitivity import Method

from .setting import Batches, Setting

RANK = nf4.LoraConfig(r=16, alpha=32)
CALIBRATION = 32  # windows
STEPS, RATE = 100, 1e-3
ROWS, TRAINED_LENGTH = 8, 64  # windows a step, and their tokens
MIDDLE, LAST, WIDTH = "layers.14", "layers.29", 576
Options = dict[str, Any]


def calibration(setting: Setting, mixed: bool = False, windows: int = CALIBRATION) -> Batches:
    if not mixed:
        return setting.batches(setting.train, 8, windows // 8)
    halves = [setting.batches(each, 8, windows // 16) for each in (setting.train, setting.train_other)]
    return [*halves[0], *halves[1]]


def steps_of(setting: Setting, count: int, seed: int, drawn: bool = False) -> Batches:
    windows = setting.drawn if drawn else setting.train
    return setting.batches(windows.view(-1, TRAINED_LENGTH), ROWS, count, seed)


def dense(setting: Setting, seed: int) -> nn.Module:
    return setting.dense()


def rounded(
    setting: Setting, seed: int, make: Callable[[Batches], Any] | None = None, mixed: bool = False,
    windows: int = CALIBRATION, **options: Any,
) -> nn.Module:  # fmt: skip
    model = setting.dense()
    rounding = None if make is None else make(calibration(setting, mixed, windows))
    nf4.quantize_model(model, rounding=rounding, progress=False, **options)
    return model


def remembered(setting: Setting, seed: int, **options: Any) -> nn.Module:
    """`rounded`, made once for all rows that begin there."""
    model: nn.Module = deepcopy(setting.memory.get(tuple(options.items()), lambda: rounded(setting, seed, **options)))
    return model


def with_levels(setting: Setting, seed: int) -> nn.Module:
    model = setting.dense()
    nf4.quantize_model(model, codebook=recover.shared_codebook(model), progress=False)
    return model


def distilled(
    setting: Setting, seed: int, loss: Callable[[], DistillLoss] = DistillLoss, steps: int = STEPS,
    drawn: bool = False, rate: float = RATE, **options: Any,
) -> nn.Module:  # fmt: skip
    """LoRA on NF4 (or on what `options` of `rounded` say), trained to be as the 16-bit model."""
    model = remembered(setting, seed, **options)
    if "lora" not in options:
        for layer in model.modules():
            if isinstance(layer, nf4.QuantLinear):
                layer.attach_lora(RANK)
    return trained(setting, model, seed, loss, steps, drawn, rate)


def trained(
    setting: Setting, model: nn.Module, seed: int, loss: Callable[[], DistillLoss] = DistillLoss, steps: int = STEPS,
    drawn: bool = False, rate: float = RATE,
) -> nn.Module:  # fmt: skip
    nf4.prepare_for_training(model, checkpointing=False)
    training = recover.Training(steps, rate, seed=seed)
    recover.distill(model, setting.teacher, steps_of(setting, steps, seed, drawn), training, loss())
    return model


def rounded_while_trained(
    setting: Setting, seed: int, rate: float, against_teacher: bool = True, is_adapted: bool = False
) -> nn.Module:
    """Quantization-aware training, by labels or by the 16-bit model; then in 4 bits, bit for bit.

    Of the layers' weights, or (`is_adapted`) of adapters that are merged into them before each rounding.
    """
    model = setting.dense().float()  # steps of this rate are less than bf16's rounding
    prepared = recover.prepare_qat(model, lora_merged=RANK if is_adapted else None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name if is_adapted else name.rpartition(".")[0] in prepared)
    batches = steps_of(setting, STEPS, seed)
    with torch.autocast("cpu", setting.dtype):
        if against_teacher:
            recover.distill(model, setting.teacher, batches, recover.Training(STEPS, rate, seed=seed))
        else:
            recover.qat_train(model, batches, learning_rate=rate, progress=False)
    recover.convert_qat(model, progress=False)
    return model.to(setting.dtype)


def with_integer_inputs(setting: Setting, seed: int, percentile: float | None = None, **options: Any) -> nn.Module:
    """NF4 whose layers see their inputs at the values of 8-bit integers."""
    model = rounded(setting, seed)
    if options.get("mode") == "static":
        options["ranges"] = recover.activation_ranges(model, calibration(setting), percentile)
    return RoundedInputs(model, options)


def of_low_rank(setting: Setting, seed: int, share: float, is_rounded: bool) -> nn.Module:
    """Two factors for each layer, by what the layers read, with a share of the layers' bytes in all."""
    model = setting.dense()
    budget = int(share * 2 * setting.weights)
    recover.low_rank_model(model, budget=budget, batches=calibration(setting), progress=False)
    if is_rounded:
        nf4.quantize_model(model, progress=False)
    return model


def sensitivities(
    setting: Setting, candidates: Sequence[Candidate] | None = None, method: Method = "scaled", drops: bool = True
) -> recover.Sensitivities:
    """Of the layers in float32; the default's are kept in a file."""
    model = setting.dense().float()
    names = list(recover.candidates.layer_names(model))
    batches = setting.batches(setting.train, 4, 1)
    return recover.sensitivity(
        model, batches, candidates, recover.layers_of_one_input(model, batches[0], names),
        recover.blocks_of(model, names) if drops else (), method=method, dense_dtype=setting.dtype,
        path=setting.sensitivity if candidates is None else None,
    )  # fmt: skip


def planned(setting: Setting, seed: int, bits: float, make: Callable[[Batches], Any] | None = None) -> nn.Module:
    """The plan that loses least by the layers' own KL (measured for NF4, told by Fisher's information for the others);
    blocks may be dropped. With `make` of a rounding it is rounded by that."""
    plan = recover.make_plan(sensitivities(setting), bits)
    if make is not None:
        return rounded(setting, seed, make, plan=plan)
    model = setting.dense()
    recover.apply_plan(model, plan, progress=False)
    return model


def zeroed(
    setting: Setting, seed: int, pattern: str, method: str, share: float, is_recovered: bool = False,
    order: str = "prune, round",
) -> nn.Module:  # fmt: skip
    """Zeros, and NF4 before or after them or not at all; recovered by LoRA beside weights whose zeros stay."""
    model = setting.dense()
    batches = calibration(setting)
    for what in order.split(", "):
        if what == "prune":
            recover.prune_model(model, share, pattern, method, batches, progress=False)
        else:
            nf4.quantize_model(model, lora=RANK if is_recovered else None, progress=False)
    return trained(setting, model, seed) if is_recovered else model


def cut(setting: Setting, seed: int, unit: str, method: str, share: float, is_recovered: bool = False) -> nn.Module:
    """Smaller layers or fewer of them, then NF4; recovered by LoRA."""
    model: Any = setting.dense()
    config = model.config
    structure = recover.find_structure(model, config.num_attention_heads, config.num_key_value_heads)
    recover.prune_structure(model, structure, unit, share, method, calibration(setting), progress=False)
    config.num_hidden_layers, config.use_cache = len(model.model.layers), False  # caches go by the layers' old numbers
    nf4.quantize_model(model, lora=RANK if is_recovered else None, progress=False)
    return trained(setting, model, seed) if is_recovered else model


def layer_loss(kind: str) -> DistillLoss:
    if kind == "cosine":
        return DistillLoss(layers=[Cosine(name, name) for name in (MIDDLE, LAST)])
    if kind == "hint":
        return DistillLoss(layers=[Hint(MIDDLE, MIDDLE, (WIDTH, WIDTH), weight=0.001)])
    return DistillLoss(layers=[Contrastive(LAST, LAST, (WIDTH, WIDTH), weight=0.1)])
