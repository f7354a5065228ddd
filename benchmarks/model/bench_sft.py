"""QLoRA of SmolLM2 by TRL's SFTTrainer: ours, bitsandbytes, bitsandbytes patched, and LoRA on the dense bf16 model.

    python -m benchmarks.model.bench_sft [--steps 50] [--csv FILE]

Every side is a process of its own, so that its peak memory is its own; all of them are alive together and take turns
step by step, so that what slows the machine down slows each. Everything else is as TRL sets it: the products run under
bf16 autocast, and the adapters have the dtype that TRL gives them. Only its checkpointing of activations is off, which
costs every side one more forward. Each step has BATCH rows of LENGTH tokens, packed from the demo's WordNet.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TextIO

import torch

from nf4kernels.demo import loading, smollm2
from nf4kernels.demo.data import HELD_OUT, definitions

from ..harness import BNB_DQ, DENSE, OURS, ROOT, Row, machine, row_of, spread, watch_others
from ..report.tables import write_csv

PATCHED = f"{BNB_DQ}, patched"
SIDES = (OURS, BNB_DQ, PATCHED, DENSE)
OP = "sft step"
BATCH, LENGTH = 4, 64
RANK, ALPHA, RATE = 16, 32, 3e-4
HELD_OUT_ROWS = 16
LAST = 10  # steps whose training losses are averaged for the report
WARM_UP = 2  # steps that are trained but not timed: what is set up at the first call
# Of the held-out losses of the 4-bit sides after training: same codes, scales in another 8 bits, other roundings. Ours
# may be lower by more: it adds the LoRA term before it rounds. PEFT adds it to outputs in bf16, whose half ulp is more
# than most of the term in the first steps.
LOSS_BOUND = 0.1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model.bench_sft", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="of training, each side (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="write the row there too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of a process that trains it
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that are not timed, got {args.steps}")
    return args


def train(side: str, steps: int) -> None:
    """Train one side, a step for each line on stdin, and report on stdout in lines of JSON.

    {"ready"} before each step, {"ms", "loss"} after it, and at the end {"held_out", "peak_mib", "adapters"}.
    """
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report

    def report(**values) -> None:
        print(json.dumps(values), file=reports, flush=True)

    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(side, steps, out)
        trainer.add_callback(turn_taker(report))
        adapters = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad}
        trainer.train()
        peak = peak_mib()
        report(held_out=trainer.evaluate()["eval_loss"], peak_mib=peak, adapters=", ".join(sorted(adapters)))


def make_trainer(side: str, steps: int, out: str):
    """A SFTTrainer of this side's model."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    loading.quiet_transformers()
    model, tokenizer = load(side)
    train, held_out = (
        Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows])
        for rows in (definitions()[:-HELD_OUT], definitions()[-HELD_OUT:])
    )
    config = SFTConfig(
        out, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", per_device_train_batch_size=BATCH,
        packing=True, packing_strategy="wrapped", max_length=LENGTH, gradient_checkpointing=False, use_cpu=True,
        bf16=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.eval_dataset = trainer.eval_dataset.select(range(min(HELD_OUT_ROWS, len(trainer.eval_dataset))))
    return trainer


def load(side: str):
    """(SmolLM2 as this side has it, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    if side == OURS:
        import nf4kernels.integrations.peft  # noqa: F401  # PEFT then runs its LoRA on our layers as one op
        from nf4kernels.integrations.transformers import Nf4Config

        options["quantization_config"] = Nf4Config()
    elif side != DENSE:
        if side == PATCHED:
            from nf4kernels.integrations import bitsandbytes

            bitsandbytes.patch()
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    directory = smollm2.fetch(ROOT / ".cache")
    return AutoModelForCausalLM.from_pretrained(directory, **options), AutoTokenizer.from_pretrained(directory)


def turn_taker(report: Callable):
    from transformers import TrainerCallback

    class TurnTaker(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            report(ready=True)
            sys.stdin.readline()
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.ms = (time.perf_counter() - self.begin) * 1e3

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                report(ms=self.ms, loss=float(logs["loss"]))

    return TurnTaker()


def peak_mib() -> float:
    # not ru_maxrss: a process starts with that of the one that started it
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1024


class Side:
    """The process that trains one side."""

    def __init__(self, side: str, steps: int, errors: TextIO) -> None:
        command = [sys.executable, "-m", "benchmarks.model.bench_sft", "--side", side, "--steps", str(steps)]
        self.name, self.errors = side, errors
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        self.read()

    def read(self) -> dict:
        """Its next report."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"the process of {self.name} ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def step(self) -> dict:
        """{"ms", "loss"} of one step of training; when it returns the process is idle."""
        print(file=self.process.stdin, flush=True)
        done = self.read()
        self.after = self.read()  # that it is ready for the next step; after the last one, how training ended
        return done


@contextlib.contextmanager
def started(steps: int) -> Iterator[list[Side]]:
    """The sides' processes, each ready for its first step: they load one after the other."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        sides: list[Side] = []
        try:
            for name in SIDES:
                sides.append(Side(name, steps, errors))
            yield sides
        finally:
            for side in sides:
                side.process.kill()
                side.process.wait()


def cpu_seconds(sides: list[Side]) -> float:
    """That the sides' processes have used."""
    ticks = 0
    for side in sides:
        fields = Path(f"/proc/{side.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(steps: int) -> Row:
    """The row of all sides; prints the losses."""
    with started(steps) as sides:
        ms: dict[str, list[float]] = {name: [] for name in SIDES}
        losses: dict[str, list[float]] = {name: [] for name in SIDES}
        for step in range(steps):
            if step == WARM_UP:
                others = watch_others(lambda: cpu_seconds(sides))
            first = step % len(sides)
            for side in sides[first:] + sides[:first]:
                done = side.step()
                losses[side.name].append(done["loss"])
                if step >= WARM_UP:
                    ms[side.name].append(done["ms"])
            print(f"step {step + 1}: " + ", ".join(f"{name} {losses[name][-1]:.3f}" for name in SIDES), flush=True)
        row = row_of(ms, OP, smollm2.DIRECTORY, None, torch.get_num_threads(), "", None)
        row.others = others()
        ends = {side.name: side.after for side in sides}
    row.tokens = BATCH * LENGTH
    row.peak_mib = {name: end["peak_mib"] for name, end in ends.items()}
    row.loss = {name: end["held_out"] for name, end in ends.items()}
    print()
    for name, end in ends.items():
        low, median, high = spread(ms[name])
        print(
            f"{name}: {median / 1e3:.2f} s/step ({low / 1e3:.2f}-{high / 1e3:.2f}), peak {end['peak_mib']:.0f} MiB, "
            f"loss {fmean(losses[name][-LAST:]):.3f} over the last steps, {end['held_out']:.3f} held out, "
            f"adapters in {end['adapters']}"
        )
    return row


def check_losses(losses: dict[str, float]) -> None:
    """Held out, after the same training: nothing is lost by our kernels, under PEFT's layers or bitsandbytes'."""
    assert losses[OURS] <= losses[BNB_DQ] + LOSS_BOUND, f"held-out losses {losses}: allowed {LOSS_BOUND} apart"
    assert abs(losses[PATCHED] - losses[BNB_DQ]) <= LOSS_BOUND, f"held-out losses {losses}: allowed {LOSS_BOUND} apart"


def main() -> None:
    args = parse()
    if args.side:
        train(args.side, args.steps)
        return
    about = machine() | {"command": " ".join(["python -m benchmarks.model.bench_sft", *sys.argv[1:]])}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    smollm2.fetch(ROOT / ".cache")
    row = measure(args.steps)
    print(row)
    if args.csv:
        write_csv(args.csv, [row], about)
        print(f"written: {args.csv}")
    check_losses(row.loss)


if __name__ == "__main__":
    main()
