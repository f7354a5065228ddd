"""A dense causal language model rounded by calibration on text, and written in 4 bits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...integrations.transformers import Nf4Config, Nf4Quantizer
from ...model.adapters import remove_adapter
from ...model.memory import model_bytes
from ...model.quantize import quantize_model
from ...model.report import QuantizeReport
from ...model.walk import named_modules
from ...nn.lora import LoraConfig
from ...nn.quant_linear import QuantLinear
from ...recover.roundings import Awq, CalibratedRounding, Gptq, LqLora, ScaleSearch
from ...storage.adapters import save_adapters
from ...storage.atomic import TargetError, replacing_directory
from ...storage.directory_checks import ConversionError, Words, check_outside, check_target, copy_rest
from ..causal_model import load_causal_model, load_tokenizer
from ..errors import StageError, first_line, refuse_unused
from ..plan_file import read_plan
from ..text_loss import LONGEST_TOKEN, batches_of, read_documents, windows

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
    overwrite: bool = False


def round_directory(in_dir: Path, out_dir: Path, options: RoundOptions, progress: bool = True) -> QuantizeReport:
    """Quantize the model in `in_dir` by calibration, and write it to `out_dir` as `save_pretrained` does.

    A method WITH_ADAPTER writes an adapter over that model, as PEFT's, to ADAPTER in it. The report's errors are then
    with the adapter, its bytes without.

    `out_dir` appears when it is complete, or not at all. The whole dense model is in memory.

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
            report = _rounded_into(staging, in_dir, out_dir, options, progress)
            copy_rest(in_dir, staging)
    except TargetError as error:
        raise StageError(f"{WORDS.out_dir} {error}") from None
    except OSError as error:
        raise StageError(f"{WORDS.out_dir} must be a directory that can be written, got {out_dir}: {first_line(error)}"
                         ) from None  # fmt: skip
    return report


def _rounded_into(
    staging: Path, in_dir: Path, out_dir: Path, options: RoundOptions, progress: bool
) -> QuantizeReport:  # fmt: skip
    """Write all but the files that are copied; `out_dir` is where they will be."""
    plan = read_plan(options.plan)
    tokenizer = load_tokenizer([in_dir])
    found = [window for file in options.text for window in _windows(file, tokenizer, options)]
    model = load_causal_model(in_dir, dense=True).eval()
    batches = [{"input_ids": b.ids, "attention_mask": b.mask} for b in batches_of(found, model.device)]
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
    except (TypeError, ValueError, RuntimeError) as error:
        raise StageError(first_line(error).removeprefix("nf4kernels.quantize_model: ")) from None
    model.config.use_cache = uses_cache
    quantizer = Nf4Quantizer(Nf4Config(**quant_options, skip=options.skip, plan=_own_options(model, plan or {})))
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    if lora is not None:
        _move_adapters(model, staging / ADAPTER, out_dir.resolve())
        report = replace(report, model_bytes_after=model_bytes(model))
    model.save_pretrained(staging)
    return report


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


def _windows(file: Path, tokenizer: Any, options: RoundOptions) -> list[list[int]]:
    """This text's share of the tokens; StageError where there are none."""
    share = -(-options.tokens // len(options.text))
    found = windows(read_documents(file, share * LONGEST_TOKEN), tokenizer, options.length, share)
    if not found:
        raise StageError(f"{file} must hold at least two tokens, got fewer")
    return found
