"""The rows of the table, group by group: what is done to the 16-bit model in each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels import recover
from nf4kernels.recover import Contrastive, Cosine, DistillLoss, Hint

from .setting import Batches, Setting, Way

SEEDS = (0, 1, 2)
RANK = nf4.LoraConfig(r=16, alpha=32)
CALIBRATION = 32  # windows
STEPS, LONG_STEPS = 100, 500
ROWS, TRAINED_LENGTH = 8, 64  # windows a step, and their tokens
MIDDLE, LAST, WIDTH = "layers.14", "layers.29", 576
Options = dict[str, Any]


def calibration(setting: Setting, mixed: bool = False) -> Batches:
    if not mixed:
        return setting.batches(setting.train, 8, CALIBRATION // 8)
    halves = [setting.batches(each, 8, CALIBRATION // 16) for each in (setting.train, setting.train_other)]
    return [*halves[0], *halves[1]]


def steps_of(setting: Setting, count: int, seed: int, drawn: bool = False) -> Batches:
    windows = setting.drawn if drawn else setting.train
    return setting.batches(windows.view(-1, TRAINED_LENGTH), ROWS, count, seed)


def dense(setting: Setting, seed: int) -> nn.Module:
    return setting.dense()


def rounded(
    setting: Setting, seed: int, make: Callable[[Batches], Any] | None = None, mixed: bool = False, **options: Any
) -> nn.Module:
    model = setting.dense()
    rounding = None if make is None else make(calibration(setting, mixed))
    nf4.quantize_model(model, rounding=rounding, progress=False, **options)
    return model


def with_levels(setting: Setting, seed: int) -> nn.Module:
    model = setting.dense()
    nf4.quantize_model(model, codebook=recover.shared_codebook(model), progress=False)
    return model


def distilled(
    setting: Setting, seed: int, loss: Callable[[], DistillLoss] = DistillLoss, steps: int = STEPS,
    drawn: bool = False, **options: Any,
) -> nn.Module:  # fmt: skip
    """LoRA on NF4 (or on what `options` of quantize_model say), trained to be as the 16-bit model."""
    model = rounded(setting, seed, lora=RANK, **options)
    return trained(setting, model, seed, loss, steps, drawn)


def trained(
    setting: Setting, model: nn.Module, seed: int, loss: Callable[[], DistillLoss] = DistillLoss, steps: int = STEPS,
    drawn: bool = False,
) -> nn.Module:  # fmt: skip
    nf4.prepare_for_training(model, checkpointing=False)
    training = recover.Training(steps, seed=seed)
    recover.distill(model, setting.reference, steps_of(setting, steps, seed, drawn), training, loss())
    return model


def rounded_while_trained(setting: Setting, seed: int, rate: float, against_teacher: bool) -> nn.Module:
    """Quantization-aware training of the weights, by labels or by the 16-bit model; then in 4 bits, bit for bit."""
    model = setting.dense().float()  # steps of this rate are less than bf16's rounding
    prepared = recover.prepare_qat(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in prepared)
    batches = steps_of(setting, STEPS, seed)
    with torch.autocast("cpu", setting.dtype):
        if against_teacher:
            recover.distill(model, setting.reference, batches, recover.Training(STEPS, rate, seed=seed))
        else:
            recover.qat_train(model, batches, learning_rate=rate, progress=False)
    recover.convert_qat(model, progress=False)
    return model.to(setting.dtype)


def planned(setting: Setting, seed: int, bits: float, drops: bool = False) -> nn.Module:
    """The exact best of a plan by each layer's KL, by the diagonal of the Fisher information and one measurement."""
    model = setting.dense()
    names = list(recover.candidates.layer_names(model))
    found = recover.sensitivity(
        model, setting.batches(setting.train, 8, 2), method="scaled", progress=False,
        drops=recover.blocks_of(model, names) if drops else (),
    )  # fmt: skip
    recover.apply_plan(model, recover.make_plan(found, bits), progress=False)
    return model


def pruned(
    setting: Setting, seed: int, pattern: str, method: str, share: float, is_recovered: bool = False,
    is_rounded: bool = True,
) -> nn.Module:  # fmt: skip
    """Pruned, then NF4; recovered by LoRA against the 16-bit model, the zeros of the base staying where they are."""
    model = setting.dense()
    batches = calibration(setting)
    if pattern in ("heads", "channels", "layers"):
        config = model.config
        structure = recover.find_structure(model, config.num_attention_heads, config.num_key_value_heads)
        recover.prune_structure(model, structure, pattern, share, method, batches, progress=False)
    else:
        recover.prune_model(model, share, pattern, method, batches, progress=False)
    if is_rounded:
        nf4.quantize_model(model, lora=RANK if is_recovered else None, progress=False)
    return trained(setting, model, seed) if is_recovered else model


def layer_loss(kind: str) -> DistillLoss:
    if kind == "cosine":
        return DistillLoss(layers=[Cosine(name, name) for name in (MIDDLE, LAST)])
    if kind == "hint":
        return DistillLoss(layers=[Hint(MIDDLE, MIDDLE, (WIDTH, WIDTH), weight=0.1)])
    return DistillLoss(layers=[Contrastive(LAST, LAST, (WIDTH, WIDTH), weight=0.1)])


ROUNDINGS: Sequence[tuple[str, Options]] = (
    ("scales searched", {"make": lambda batches: recover.ScaleSearch()}),
    ("scales searched by inputs", {"make": recover.ScaleSearch}),
    ("scales searched by inputs, both texts", {"make": recover.ScaleSearch, "mixed": True}),
    ("levels of each layer (k-means)", {"make": partial(recover.ScaleSearch, scales="absmax", levels="kmeans")}),
    ("AWQ", {"make": recover.Awq}),
    ("AWQ + scales searched", {"make": lambda batches: recover.Awq(batches, recover.ScaleSearch(batches))}),
    ("GPTQ", {"make": recover.Gptq}),
    ("GPTQ + scales searched", {"make": partial(recover.Gptq, scales="search")}),
    ("GPTQ + scales searched, both texts", {"make": partial(recover.Gptq, scales="search"), "mixed": True}),
    ("GPTQ + scales + levels", {"make": partial(recover.Gptq, scales="search", levels="kmeans")}),
    ("GPTQ + scales + sweeps", {"make": partial(recover.Gptq, scales="search", sweeps=3)}),
)
STARTS: Sequence[tuple[str, Options]] = (
    ("LoftQ, r 16", {"lora": nf4.LoraConfig(r=16, init="loftq")}),
    ("PiSSA, r 16", {"lora": nf4.LoraConfig(r=16, init="pissa")}),
    ("LQ-LoRA by inputs, r 16", {"make": recover.LqLora, "lora": RANK}),
)
LOSSES: Sequence[tuple[str, Callable[[], DistillLoss]]] = (
    ("labels alone", lambda: DistillLoss(soft=0, hard=1)),
    ("KL", DistillLoss),
    ("KL, T 2", lambda: DistillLoss(temperature=2)),
    ("KL of the 64 likeliest", lambda: DistillLoss(k=64)),
    ("KL + 0.5 labels", lambda: DistillLoss(hard=0.5)),
    ("KL + cosine", partial(layer_loss, "cosine")),
    ("KL + hint", partial(layer_loss, "hint")),
    ("KL + contrast", partial(layer_loss, "contrast")),
)
WAYS = (
    Way("bf16", "start", dense),
    Way("NF4", "start", rounded),
    Way("NF4, blocks of 32", "start", partial(rounded, block_size=32)),
    Way("AF4", "start", partial(rounded, codebook="af4")),
    Way("int8", "start", partial(rounded, codebook="int8")),
    Way("levels of the model (k-means)", "rounding", with_levels),
    *(Way(name, "rounding", partial(rounded, **options)) for name, options in (*ROUNDINGS, *STARTS)),
    *(Way(f"LoRA, {name}", "distill", partial(distilled, loss=loss), SEEDS) for name, loss in LOSSES),
    Way(f"LoRA, KL, {LONG_STEPS} steps", "distill", partial(distilled, steps=LONG_STEPS), SEEDS),
    Way("LoRA, KL, text drawn from bf16", "distill", partial(distilled, drawn=True), SEEDS),
    Way("GPTQ + scales, both texts, then LoRA, KL", "distill",
        partial(distilled, make=partial(recover.Gptq, scales="search"), mixed=True), SEEDS),
    Way("QAT, labels", "qat", partial(rounded_while_trained, rate=2e-5, against_teacher=False), SEEDS),
    Way("QAT, KL", "qat", partial(rounded_while_trained, rate=2e-5, against_teacher=True), SEEDS),
    *(Way(f"plan at {bits} bits", "plan", partial(planned, bits=bits)) for bits in (5.0, 4.5, 4.1)),
    Way("plan at 3.5 bits, blocks dropped", "plan", partial(planned, bits=3.5, drops=True)),
    Way("NF4, blocks of 4096", "plan", partial(rounded, block_size=4096)),
    *(
        Way(f"{pattern} {100 * share:.0f} %{', recovered' if is_recovered else ''}", "prune",
            partial(pruned, pattern=pattern, method=method, share=share, is_recovered=is_recovered),
            SEEDS if is_recovered else (0,))
        for pattern, method, share in (
            ("unstructured", "wanda", 0.25), ("unstructured", "wanda", 0.5), ("2:4", "wanda", 0.5),
            ("heads", "gradient", 1 / 3), ("channels", "gradient", 0.25), ("channels", "gradient", 0.5),
            ("layers", "influence", 0.25), ("layers", "influence", 0.5),
        )
        for is_recovered in (False, True)
    ),
)  # fmt: skip
