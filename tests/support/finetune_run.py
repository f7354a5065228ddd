"""What the tests of `nf4kernels finetune` share: small settings, files of examples, a command line."""

import json
import os
import signal
from pathlib import Path

from nf4kernels.cli import main

STEPS = 8
FIELDS = {
    "max_steps": STEPS, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 4,
    "lora_r": 4, "lora_dropout": 0.1, "gradient_checkpointing": False, "disable_tqdm": True, "dtype": "float32",
}  # fmt: skip


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model, data, out, /, **changes) -> list[str]:
    fields = {"model": model, "data": data, "output_dir": out, **FIELDS, **changes}
    return ["finetune", *(f"--{name}={value}" for name, value in fields.items())]


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def train_in_child(argv: list[str], said: Path, killed_at: str | None = None) -> None:
    """The command in this process, whose standard output goes to the file `said`; `killed_at` a function of run.py."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    if killed_at is not None:
        from nf4kernels.stages.finetune import run

        assert callable(getattr(run, killed_at))
        setattr(run, killed_at, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    os._exit(main(argv))
