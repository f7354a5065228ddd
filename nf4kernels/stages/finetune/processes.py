"""A run of several processes: which of them speaks, and how they share the model."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading

from ..errors import StageError

LAUNCH = "torchrun --nproc-per-node N -m nf4kernels finetune ..."
AUTO = {
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
}  # fmt: skip
# DeepSpeed's configurations by the names of --deepspeed; transformers fills "auto" from the recipe. Frozen weights have
# neither gradients nor states: stage 2 shares those of the adapters, stage 3 the weights, too.
ZERO: dict[str, dict[str, Any]] = {
    "zero2": {**AUTO, "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}},
    "zero3": {
        **AUTO,
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
}  # fmt: skip
# FSDP2 by the model's own layers; the adapters are saved whole; the first process of a machine alone reads the model.
FSDP = {
    "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": True,
}  # fmt: skip


def is_main() -> bool:
    """Whether this process is the one that speaks and writes, by what torchrun or accelerate has set."""
    return os.environ.get("RANK", "0") == "0"


def sharing(deepspeed: Any, fsdp: Any, fsdp_config: Any, use_cpu: bool) -> dict[str, Any]:
    """SFTConfig's fields of that name, from zero2 or zero3 or a file, and from a plain --fsdp.

    Raises:
        StageError: what is asked for needs a package, a GPU or a launcher that is not there.
    """
    if str(fsdp).lower() in ("none", "false", ""):
        fsdp = None
    elif str(fsdp).lower() == "true":
        fsdp, fsdp_config = True, _fsdp_config(fsdp_config)
    if deepspeed is not None:
        if deepspeed not in ZERO and not isinstance(deepspeed, dict) and not Path(deepspeed).is_file():
            raise StageError(f"--deepspeed must be {', '.join(ZERO)} or a file of DeepSpeed's, got {deepspeed}")
        if find_spec("deepspeed") is None:
            raise StageError("--deepspeed needs DeepSpeed, run: pip install deepspeed")
        _check_launched("--deepspeed")
        deepspeed = ZERO.get(deepspeed, deepspeed) if isinstance(deepspeed, str) else deepspeed
    if fsdp is not None:
        _check_launched("--fsdp")
        if use_cpu or not has_gpu():
            raise StageError("--fsdp needs GPUs, leave it out: on CPUs each process has the whole model")
    return {"deepspeed": deepspeed, "fsdp": fsdp, "fsdp_config": fsdp_config}


def _fsdp_config(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """FSDP, with what the recipe, JSON or a file of it says; StageError for an older FSDP."""
    found: Any = given or {}
    if isinstance(given, str) and given:
        try:
            found = json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
    if not isinstance(found, dict):
        raise StageError(f"--fsdp_config must be a mapping or a JSON file that holds one, got {given}")
    named = {name.removeprefix("fsdp_"): value for name, value in found.items()}
    if str(named.get("version", 2)) != "2":
        raise StageError(f"--fsdp_config must have version 2, got {named['version']}: FSDP1 takes no packed bytes")
    return {**FSDP, **named}


def load_for_sharding(training: Any) -> bool:
    """Whether the model is loaded on the CPU, since FSDP brings each device its share; with `training`, by its fields.

    With cpu_ram_efficient_loading, transformers is told so before it loads, and the other processes read nothing.
    """
    if not training.fsdp:
        return False
    if str(training.fsdp_config.get("cpu_ram_efficient_loading", False)).lower() == "true":
        enable_fsdp_ram_efficient_loading()
    return True


def has_gpu() -> bool:
    return torch.accelerator.is_available()


def _check_launched(flag: str) -> None:
    if "WORLD_SIZE" not in os.environ:
        raise StageError(f"{flag} needs a process for each GPU, run: {LAUNCH}")
