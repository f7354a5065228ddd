"""What a run will take of the machine, before it starts."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer import utils as heads

from ...model.plan import QUANTIZED, parts
from ..estimate import OPTIMIZERS, one_matrix, own_dtype
from ..sharded_memory import gathered, share
from ..traced_memory import peak_of_training, without_values
from .trainer import Trainer

GIB = 2**30
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, where it has one


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process at the peak of a training step.

    Attributes:
        weights: of the model, in 4 bits and dense.
        trained: the adapters and the optimizer's states.
        activations: with the logits, the gradients that exist at that moment, and a decoded weight on a GPU.
        program: on a CPU, what the process had in memory before it read the model.
        machine: what there is.
    """

    weights: int
    trained: int
    activations: int
    program: int
    machine: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.program

    def __str__(self) -> str:
        told = (
            f"memory: about {_gib(self.total)} GiB at the peak (weights {_gib(self.weights)}, adapters and optimizer"
            f" {_gib(self.trained)}, activations {_gib(self.activations)}"
        )
        told += f", the program itself {_gib(self.program)}" if self.program else ""
        told += f"); this {'machine' if self.program else 'GPU'} has {_gib(self.machine)}"
        if self.total > self.machine:
            told += ": a smaller per_device_train_batch_size or max_length, or gradient_checkpointing, takes less"
        return told


def forecast_memory(trainer: Trainer, program: int) -> Memory:
    """The peak of a step on the longest rows of the trainer's data, by running one without values.

    Args:
        program: bytes that the process had in memory before the model was read.

    Raises:
        Exception: of any type, where the model's own code cannot run without values.
    """
    args, model = trainer.args, trainer.model
    device = model.device
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = {id(each): each for each in (*model.parameters(), *model.buffers()) if id(each) not in trained}
    adapters = sum(parameter.nbytes for parameter in trained.values())
    optimizer = round(sum(map(OPTIMIZERS.get(str(args.optim.value), own_dtype), trained.values())))
    optimizer = 0 if "paged" in args.optim.value and device.type != "cpu" else optimizer
    weights = sum(each.nbytes for each in frozen.values())
    if args.fsdp or is_deepspeed_zero3_enabled():
        shard, ranks = ("fsdp2" if args.fsdp else "zero3"), args.world_size
        weights = share(weights, ranks) + gathered(model, ranks, shard).working
        adapters, optimizer = share(adapters, ranks), share(optimizer, ranks)
    matrices = [part for module in model.modules() if isinstance(module, QUANTIZED) for part in parts(module)]
    decoded = 0 if device.type == "cpu" else max((2 * one_matrix(part.weight_shape) for part in matrices), default=0)
    with _fused_head(device.type):
        peak = peak_of_training(
            without_values(model).train(), args.per_device_train_batch_size, _length(trainer),
            args.gradient_accumulation_steps, _loss, args.activation_offloading,
        )  # fmt: skip
    return Memory(
        weights, adapters + optimizer, peak.total + decoded,
        program if device.type == "cpu" else 0, machine_memory(device),
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def machine_memory(device: torch.device) -> int:
    """Bytes of the device, or of the machine where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = LIMIT.read_text(encoding="utf-8").strip() if LIMIT.exists() else "max"
    return min(whole, int(limit)) if limit.isdigit() else whole


def _length(trainer: Trainer) -> int:
    longest, most = trainer.counted["train"].longest, trainer.args.max_length
    if most is not None and (trainer.args.packing or longest > most):
        return most
    return max(longest, 2)


def _loss(model: Any, ids: Tensor) -> Tensor:
    """As TRL's trainer computes it, in tiles of the vocabulary where this TRL can."""
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if hasattr(heads, "add_fused_lm_head"):
        return -model(**inputs, fused_lm_head=True).log_probs.sum()
    return model(**inputs).loss


class _HeadOnGpu(torch.autograd.Function):
    """What the fused head of TRL allocates where Triton computes in its tiles: one tile, and the gradient in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, width: int,
        *_: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.save_for_backward(hidden, weight, targets)
        ctx.width = width
        _tile(hidden, width)
        numbers = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2)]
        found = hidden.new_empty(len(hidden), dtype=torch.bool)
        ctx.mark_non_differentiable(found)
        return numbers[0], numbers[1], None, None, found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        gradient = torch.empty_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _tile(hidden, ctx.width)
        back = None if of_weight is None else of_weight.to(weight.dtype)
        return gradient.to(hidden.dtype), back, *(None for _ in range(7))


def _tile(hidden: Tensor, width: int) -> Tensor:
    return hidden.new_empty(min(len(hidden), 4096), width)


@contextmanager
def _fused_head(device: str):
    """TRL's fused head on the meta device, which torch has no autocast for, as it is on `device`."""
    asks = torch.is_autocast_enabled
    name = "_ChunkedLogProbFunction"
    function = getattr(heads, name, None)
    torch.is_autocast_enabled = lambda *_: False
    if device != "cpu" and function is not None:
        setattr(heads, name, _HeadOnGpu)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asks
        if function is not None:
            setattr(heads, name, function)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
