"""A dense causal language model rounded by calibration on text, and written in 4 bits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers import Nf4Config, Nf4Quantizer
from ...model.adapters import remove_adapter
from ...model.memory import model_bytes
from ...model.quantize import quantize_model
from ...model.report import QuantizeReport, table
from ...model.walk import named_modules
from ...nn.lora import LoraConfig
from ...nn.quant_linear import QuantLinear
from ...recover.agreement import Agreement, agreement
from ...recover.roundings import Awq, CalibratedRounding, Gptq, LqLora, ScaleSearch
from ...storage.adapters import save_adapters
from ...storage.atomic import TargetError, replacing_directory
from ...storage.directory_checks import ConversionError, Words, check_outside, check_target, copy_rest
from ..causal_model import load_causal_model, load_tokenizer
from ..errors import StageError, first_line, refuse_unused
from ..plan_file import read_plan
from ..text_loss import batches_of, windows_of

WORDS = Words("recover round", "IN_DIR", "OUT_DIR", "--skip", "--overwrite")
Batches = list[dict[str, Tensor]]
METHODS: Mapping[str, Callable[[Batches], CalibratedRounding]] = {
    "gptq": lambda batches: Gptq(batches, scales="search"),
    "awq": Awq,
    "awq+gptq": lambda batches: Awq(batches, Gptq(scales="search")),
    "search": ScaleSearch,
    "levels": lambda batches: ScaleSearch(batches, scales="absmax", levels="kmeans"),
    "gptq+levels": lambda batches: Gptq(batches, scales="search", levels="kmeans"),
    "lq-lora": LqLora,
    "lq-lora+gptq": lambda batches: LqLora(batches, then=Gptq(scales="search")),
}
WITH_ADAPTER = ("lq-lora", "lq-lora+gptq")
ADAPTER = "adapter"  # in OUT_DIR: what these two begin an adapter with


@dataclass(frozen=True)
class RoundOptions:
    """What `round_directory` does.

    Attributes:
        method: one of METHODS.
        text: files as `read_documents` takes them, of which the same number of tokens is read.
        tokens, length: of all texts together, and of a window.
        codebook, block_size, double_quant, scale_codebook, skip: as in `nf4kernels.quantize_model`.
        plan: a file of `nf4kernels recover plan`, whose options go before these.
        rank, alpha: of the adapter, of a method WITH_ADAPTER.
        held_out: another such file, of which `tokens` measure the result.
        overwrite: replace a model that is there.
    """

    method: str
    text: Sequence[Path]
    tokens: int = 16384
    length: int = 128
    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    scale_codebook: str = "e4m3"
    skip: Sequence[str] = ()
    plan: Path | None = None
    rank: int = 16
    alpha: float = 32.0
    held_out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Rounded:
    """What `round_directory` did.

    Attributes:
        report: its errors are with the adapter of a method WITH_ADAPTER, its bytes without.
        measured: on the held-out text, of the model in 16 bits, plainly rounded, and rounded so; empty without.
    """

    report: QuantizeReport
    measured: Mapping[str, Agreement]

    def __str__(self) -> str:
        lines = [self.report.summary().split("\n\n")[0]]
        if self.measured:
            rows = [
                (name, f"{found.loss:.4f}", f"{found.kl:.4f}", f"{100 * found.top1:.1f} %")
                for name, found in self.measured.items()
            ]
            lines.append(table([(f"on {next(iter(self.measured.values())).rows} held-out tokens, nats a token", "loss",
                                 "KL to 16 bits", "same likeliest"), *rows]))  # fmt: skip
        return "\n\n".join(lines)


def round_directory(in_dir: Path, out_dir: Path, options: RoundOptions, progress: bool = True) -> Rounded:
    """Quantize the model in `in_dir` by calibration, and write it to `out_dir` as `save_pretrained` does.

    A method WITH_ADAPTER writes an adapter over that model, as PEFT's, to ADAPTER in it.

    `out_dir` appears when it is complete, or not at all. The whole dense model is in memory, and twice more where the
    result is measured.

    Raises:
        StageError: a directory or a text is not as it must be, or a layer cannot be rounded.
    """
    if options.method not in METHODS:
        raise StageError(f"--method must be one of {', '.join(METHODS)}, got {options.method!r}")
    for name, value, least in (
        ("tokens", options.tokens, 1), ("length", options.length, 2), ("rank", options.rank, 1)
    ):  # fmt: skip
        if value < least:
            raise StageError(f"--{name} must be at least {least}, got {value}")
    refuse_unused(options, (
        ("--method lq-lora or lq-lora+gptq", options.method in WITH_ADAPTER, ("rank", "alpha")),
        ("8-bit scales", options.double_quant, ("scale_codebook",)),
    ))  # fmt: skip
    if not (math.isfinite(options.alpha) and options.alpha > 0):
        raise StageError(f"--alpha must be above 0, got {options.alpha}")
    try:
        check_outside(in_dir.resolve(), out_dir.resolve(), WORDS)
        check_target(out_dir, options.overwrite, WORDS)
    except ConversionError as error:
        raise StageError(str(error).removeprefix(f"{WORDS.who}: ")) from None
    try:
        with replacing_directory(out_dir) as staging:
            rounded = _rounded_into(staging, in_dir, out_dir, options, progress)
            copy_rest(in_dir, staging)
    except TargetError as error:
        raise StageError(f"{WORDS.out_dir} {error}") from None
    except OSError as error:
        raise StageError(f"{WORDS.out_dir} must be a directory that can be written, got {out_dir}: {first_line(error)}"
                         ) from None  # fmt: skip
    return rounded


def _rounded_into(
    staging: Path, in_dir: Path, out_dir: Path, options: RoundOptions, progress: bool
) -> Rounded:  # fmt: skip
    """Write all but the files that are copied; `out_dir` is where they will be."""
    plan = read_plan(options.plan)
    tokenizer = load_tokenizer([in_dir])
    share = -(-options.tokens // len(options.text))
    found = [window for file in options.text for window in windows_of(file, tokenizer, options.length, share)]
    held_out = []
    if options.held_out is not None:
        held_out = windows_of(options.held_out, tokenizer, options.length, options.tokens, "--held-out")
    model = load_causal_model(in_dir, dense=True).eval()
    batches = _batches(found, model.device)
    quant_options: dict[str, Any] = {
        "codebook": options.codebook, "block_size": options.block_size, "double_quant": options.double_quant,
        "scale_codebook": options.scale_codebook,
    }  # fmt: skip
    lora = LoraConfig(options.rank, options.alpha) if options.method in WITH_ADAPTER else None
    model.config.use_cache, uses_cache = False, model.config.use_cache
    try:
        rounding = METHODS[options.method](batches)
        report = quantize_model(
            model, options.skip, lora=lora, plan=plan, rounding=rounding, progress=progress, **quant_options
        )
        measured: dict[str, Agreement] = {}
        if held_out:
            dense, plain = (load_causal_model(in_dir, dense=True) for _ in range(2))
            quantize_model(plain, options.skip, plan=plan, progress=False, **quant_options)
            models = {"in 16 bits": dense, "to the nearest level": plain, f"by {options.method}": model}
            held = _batches(held_out, model.device)
            measured = {name: agreement(each, dense, held) for name, each in models.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise StageError(first_line(error).removeprefix("nf4kernels.quantize_model: ")) from None
    model.config.use_cache = uses_cache
    quantizer = Nf4Quantizer(Nf4Config(**quant_options, skip=options.skip, plan=_own_options(model, plan or {})))
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    if lora is not None:
        _move_adapters(model, staging / ADAPTER, out_dir.resolve())
        report = replace(report, model_bytes_after=model_bytes(model))
    model.save_pretrained(staging)
    return Rounded(report, measured)


def _move_adapters(model: Any, directory: Path, base: Path) -> None:
    """Take the adapters from the model and write them as PEFT's, over its rounded weights, which `base` will hold.

    They began with the error of those weights: as plain ones they are written as they are, and not as a change.
    """
    model.requires_grad_(False)  # else what is dense would be saved as trained beside the adapters
    model.config._name_or_path = str(base)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.lora is not None:
            config, lora_A, lora_B = module.lora, module.lora_A, module.lora_B
            module.remove_adapter(module.adapter_name)
            module.attach_lora(replace(config, init="default"), lora_A.weight.dtype)
            module.lora_A.weight.data.copy_(lora_A.weight)
            module.lora_B.weight.data.copy_(lora_B.weight)
    save_adapters(model, directory)
    remove_adapter(model)


def _own_options(model: nn.Module, plan: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """A plan, with the 16 levels of each layer that a rounding gave its own."""
    own: dict[str, Any] = dict(plan)
    for name, module in named_modules(model):
        if isinstance(module, QuantLinear) and module.qweight.codebook == "custom":
            qweight = module.qweight
            own[name] = (own.get(name) or {}) | {"codebook": qweight.code.tolist(), "block_size": qweight.block_size}
    return own


def _batches(found: list[list[int]], device: torch.device) -> Batches:
    return [{"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches_of(found, device)]
