"""What a person sees while a model is trained: the time it will take, and a bar with loss, speed and memory."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from .forecast import GIB, resident

WARM_UP, TIMED = 1, 2  # optimizer steps: the first is slower than the others


class Progress(ProgressCallback):
    """transformers' bar, with the last numbers beside it instead of a line of them each time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}
        self.current_step = state.global_step
        if self.training_bar is not None:  # else the time left would count the steps of an earlier run
            self.training_bar.initial = self.training_bar.n = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        for name in ("loss", "eval_loss", "tokens/s"):
            if name in logs:
                self.shown[name.replace("eval_", "held-out ")] = f"{logs[name]:.4g}"
        self.shown["memory"] = f"{memory_in_use() / GIB:.2f} GiB"
        self.training_bar.set_postfix(self.shown)


class Clock(TrainerCallback):
    """Says after the first steps how long the run will take; `evaluation` is the seconds of one held-out loss."""

    def __init__(self, say: Callable[[str], None], evaluation: float) -> None:
        self.say, self.evaluation = say, evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.since = state.global_step, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, left = state.global_step - self.begun, state.max_steps - self.begun
        if done == WARM_UP:
            self.since = time.monotonic()
        if done != WARM_UP + TIMED or left <= done or not state.is_world_process_zero:
            return
        seconds = (time.monotonic() - self.since) / TIMED
        told = f"time: about {tqdm.format_interval(round(seconds * left))} for {left} steps, {seconds:.3g} s each"
        times = 1 + (left // state.eval_steps if args.eval_strategy == "steps" else 0)
        times += int(args.num_train_epochs) if args.eval_strategy == "epoch" else 0
        if times * self.evaluation >= 1:
            told += f", and {tqdm.format_interval(round(times * self.evaluation))} for the held-out loss"
        with tqdm.external_write_mode(file=sys.stderr):
            self.say(told)


def memory_in_use() -> int:
    """Bytes: what torch has taken of the GPU at most, or what the process has in memory on a CPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resident()
