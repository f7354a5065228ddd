"""Run by torchrun with restarts on 2 ranks: fine-tunes that are killed, gone on with, and refused.

Arguments: a folder, the flags of `nf4kernels finetune` but its output_dir. Prints "killed: ..." and "refused: ...".
"""

import json
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from support import fsdp_on_cpus
from transformers import Trainer as TheirTrainer

from nf4kernels.cli import main
from nf4kernels.stages.finetune import run, trainer

START, RANK = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
LAST = 3  # start, after three ends
WITHOUT_DROPOUT = "--lora_dropout=0.0"
SLOW = 3.0  # seconds


def end_at(start: int, rank: int, name: str) -> None:
    if start == START and rank == RANK:
        print(f"killed: rank {rank} {name}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def train_until(end) -> None:
    """Call `end` in the fifth step, between its forward and its backward."""
    compute = trainer.Trainer.compute_loss

    def compute_loss(self, model, *args, **options):
        loss = compute(self, model, *args, **options)
        if model.training and self.state.global_step == 4:
            end()
        return loss

    trainer.Trainer.compute_loss = compute_loss


def write_until(end) -> None:
    """Call `end` in the midst of the checkpoint of step 6."""
    save = TheirTrainer._save_rng_state

    def save_rng_state(self, *args):
        if self.state.global_step == 6:
            end()
        save(self, *args)

    TheirTrainer._save_rng_state = save_rng_state


def interrupt() -> None:
    raise KeyboardInterrupt


def stop_and_go_on(folder: Path, name: str, flags: list[str]) -> None:
    """A run that is interrupted, in `name`_part, gone on with on as many ranks in `name`_two."""
    part, two = folder / f"{name}_part", folder / f"{name}_two"
    compute = trainer.Trainer.compute_loss
    train_until(interrupt)
    assert main([*flags, f"--output_dir={part}"]) == 130
    trainer.Trainer.compute_loss = compute
    dist.barrier()
    if RANK == 0:
        shutil.copytree(part, two)
    dist.barrier()
    assert main([*flags, f"--output_dir={two}"]) == 0


def refuse(name: str, argv: list[str], expected: str) -> None:
    """Every rank ends with status 2, and its sentence for torchrun."""
    told = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    told.unlink(missing_ok=True)
    assert main(argv) == 2, f"{name}: rank {RANK} is content"
    message = json.loads(told.read_text(encoding="utf-8"))["message"]["message"]
    told.unlink()
    assert expected in message, f"{name}: rank {RANK} says {message}"
    dist.barrier()
    if RANK == 0:
        print(f"refused: {name}", flush=True)


def refuse_all(folder: Path, flags: list[str]) -> None:
    argv = [*flags, f"--output_dir={folder / 'refused'}"]
    run.VERSION, version = f"0.0.{RANK}", run.VERSION
    refuse("version", argv, "every process must have the same nf4kernels, got 0.0.0 on rank 0 and 0.0.1 on rank 1")
    run.VERSION = version
    refuse("recipe", [*argv, f"--lora_alpha={RANK}"], "must have the same lora_alpha, got 0 on rank 0 and 1 on rank 1")
    line = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    few = folder / "few.jsonl"
    few.write_text(line, encoding="utf-8")
    dist.barrier()
    refuse(
        "few examples",
        [*argv, f"--data={few}", "--held_out=0"],
        "a training example for each of the 2 processes, got 1",
    )
    refuse(
        "another batch",
        [*flags, WITHOUT_DROPOUT, "--per_device_train_batch_size=4", f"--output_dir={folder / 'ddp_part'}"],
        "whose run has 4 (2 processes) where this one has 8 (4 per_device_train_batch_size x"
        " 1 gradient_accumulation_steps x 2 processes)",
    )  # fmt: skip
    assert not (folder / "refused").exists()


def refuse_late(folder: Path, flags: list[str]) -> None:
    """A rank that does not come: the others wait as long as they were told to."""
    store = dist.PrefixStore("late", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=2, timeout=timedelta(seconds=SLOW))
    dist.barrier()
    if RANK == 0:
        began = time.monotonic()
        argv = [*flags, f"--ddp_timeout={SLOW:g}", f"--output_dir={folder / 'refused'}"]
        assert main(argv) == 2
        assert time.monotonic() - began >= SLOW
        store.set("late", "said")
    store.wait(["late"], timedelta(seconds=120))


if __name__ == "__main__":
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    if START == 0:
        train_until(lambda: end_at(0, 1, "in a step"))
    if START == 1:
        write_until(lambda: end_at(1, 0, "in a checkpoint"))
    code = main([*flags, f"--output_dir={folder / 'killed'}"])
    dist.barrier()
    end_at(2, 1, "at the end")
    assert code == 0
    if START == LAST:
        assert main([*flags, f"--output_dir={folder / 'whole'}"]) == 0
        stop_and_go_on(folder, "ddp", [*flags, WITHOUT_DROPOUT])
        refuse_all(folder, flags)
        fsdp_on_cpus.pretend()
        stop_and_go_on(folder, "fsdp", [*flags, WITHOUT_DROPOUT, "--fsdp", fsdp_on_cpus.SHARDED])
        refuse_late(folder, flags)
