"""A run of several processes: which of them speaks, how they meet and agree, and how they share the model."""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import enable_fsdp_ram_efficient_loading

from ...storage.atomic import write_json
from ..errors import StageError, first_line

Found = TypeVar("Found")

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


def is_restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them ended."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def count() -> int:
    """Of the processes that have met."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def meet(use_cpu: bool, backend: str | None, seconds: float) -> None:
    """Wait for the launcher's other processes. transformers would, but on CPUs without the time-out.

    torchrun keeps its store over restarts, and with it the addresses of processes that have ended (pytorch #135712):
    keys begin with the number of the start where all processes have the same one, which is on one machine.

    Raises:
        StageError: there are fewer GPUs than processes, or a process did not come.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not use_cpu and here > torch.accelerator.device_count():
        raise StageError(f"--nproc-per-node must be at most the number of GPUs, {torch.accelerator.device_count()},"
                         f" got {here}")  # fmt: skip
    is_launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not is_launched or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        return
    limit = timedelta(seconds=seconds)
    with in_time(seconds):
        store, rank, ranks = next(dist.rendezvous("env://", timeout=limit))
        if here == ranks:
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = backend or ("gloo" if use_cpu else None)  # None: each kind of device has its own
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """What torch.distributed raises where another process does not come, or has ended, as a StageError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not isinstance(error, dist.DistError) and "gloo" not in text:
            raise
        if "timed out" in text or "timeout" in text:
            raise StageError(
                f"every process must come to each exchange within --ddp_timeout, {seconds:g} s, got nothing from"
                f" another: {first_line(error)}"
            ) from error
        raise StageError(f"every process must go on to the end, got one that has ended: {first_line(error)}") from error


def check_alike(seconds: float, own: Mapping[str, Any]) -> None:
    """All processes must have the same under the same names; else each says who differs.

    Raises:
        StageError: one has something else, or sent nothing within `seconds`.
    """
    if count() == 1:
        return
    everyone: list[dict[str, Any]] = [{}] * count()
    with in_time(seconds):
        dist.all_gather_object(everyone, dict(own))
    for rank, other in enumerate(everyone):
        for name in sorted({*everyone[0], *other}):
            first, its = (values.get(name, "none") for values in (everyone[0], other))
            if first != its:
                raise StageError(f"every process must have the same {name}, got {first} on rank 0 and {its} on rank"
                                 f" {rank}")  # fmt: skip


def from_main(seconds: float, find: Callable[[], Found]) -> Found:
    """What the main process finds, on every process: each reads a directory that another writes into otherwise.

    Raises:
        StageError: the main process's own, or it sent nothing within `seconds`.
    """
    if count() == 1:
        return find()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = find()
        except StageError as error:
            box[1] = str(error)
    with in_time(seconds):
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise StageError(box[1])
    found: Found = box[0]
    return found


def wait_for_all() -> None:
    if count() > 1:
        dist.barrier()


def tell_launcher(error: StageError) -> None:
    """Leave the sentence for torchrun, whose report names each process that ended and why.

    torchrun ends a process in the midst of this once another has ended, and would itself fail at half a file, with no
    restart: its own `record_exception` writes one.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        told = {"message": f"{type(error).__name__}: {error}", "extraInfo": {
            "py_callstack": traceback.format_exc(), "timestamp": str(int(time.time())),
        }}  # fmt: skip
        write_json(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), {"message": told})


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
