"""LLaMA-Factory, unchanged, fine-tunes SmolLM2 by QLoRA on bitsandbytes: as it is, and patched by our kernels.

    python -m benchmarks.model.train_llamafactory --python ENVIRONMENT/bin/python [--steps 20] [--rounds 2]

ENVIRONMENT has llamafactory, bitsandbytes and nf4kernels installed; what runs there differs in nothing but the variable
NF4KERNELS_PATCH_BITSANDBYTES. The data is the demo's WordNet as Alpaca JSON. Prints the loss of every step and the
seconds a step takes, by the times at which LLaMA-Factory logs them; the two ways take turns.
"""

import argparse
import ast
import json
import os
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from nf4kernels.demo import smollm2
from nf4kernels.demo.data import HELD_OUT, definitions

from ..harness import ROOT, ratios, spread

VARIABLE = "NF4KERNELS_PATCH_BITSANDBYTES"
WAYS = {"bitsandbytes": "0", "patched": "1"}  # what VARIABLE is
IS_PATCHED = (
    "import bitsandbytes; from nf4kernels.integrations.bitsandbytes import is_patched; print(int(is_patched()))"
)
DATASET = "wordnet"
# Between the losses of the two ways at one step, in nats a token: the same codes and scales, other roundings.
LOSS_BOUND = 0.05
OPTIONS = {
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 16, "lora_target": "all",
    "quantization_method": "bnb", "quantization_bit": 4, "double_quantization": True,
    "dataset": DATASET, "template": "smollm2", "cutoff_len": 128, "preprocessing_num_workers": 1,
    "per_device_train_batch_size": 8, "learning_rate": 3e-4, "lr_scheduler_type": "constant", "seed": 0,
    "bf16": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model.train_llamafactory",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has llamafactory")
    parser.add_argument("--steps", type=int, default=20, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, since the first one is not timed, got {args.steps}")
    return args


def write_data(folder: Path) -> None:
    """WordNet's training examples, and the file by which LLaMA-Factory finds them."""
    rows = [
        {"instruction": row["prompt"], "input": "", "output": row["completion"].strip()}
        for row in definitions()[:-HELD_OUT]
    ]
    (folder / f"{DATASET}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({DATASET: {"file_name": f"{DATASET}.json"}}), encoding="utf-8")


def environment(way: str) -> dict[str, str]:
    """That of the process: this checkout's nf4kernels, nothing from a network, and threads that sleep when they wait.

    Those that spin make a step many times as long while anything else runs.
    """
    own = {VARIABLE: WAYS[way], "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {"GOMP_SPINCOUNT": "1000", **os.environ, **own}


def check_ways(python: Path) -> None:
    """SystemExit where the variable does not decide whether bitsandbytes is patched."""
    for way, value in WAYS.items():
        done = subprocess.run([python, "-c", IS_PATCHED], env=environment(way), capture_output=True, encoding="utf-8")
        if done.stdout.strip() != value:
            raise SystemExit(
                f"{python} must have bitsandbytes and an installed nf4kernels, whose {VARIABLE} works:"
                f" with {value} it printed {done.stdout.strip()!r}\n{done.stderr}"
            )


def train(python: Path, way: str, folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """(losses, seconds of each step but the first) of one run."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        model = str(smollm2.fetch(ROOT / ".cache"))
        options = {
            **OPTIONS, "model_name_or_path": model, "dataset_dir": str(folder), "output_dir": out, "max_steps": steps,
        }  # fmt: skip
        settings = folder / "settings.yaml"
        settings.write_text(json.dumps(options), encoding="utf-8")  # which is YAML too
        process = subprocess.Popen(
            [python, "-m", "llamafactory.cli", "train", settings], env=environment(way), cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )  # fmt: skip
        losses, times, said = [], [], []
        for line in process.stdout:
            said.append(line)
            if line.startswith("{'loss'"):
                times.append(time.perf_counter())
                losses.append(float(ast.literal_eval(line)["loss"]))
        if process.wait() or len(losses) != steps:
            raise SystemExit(f"LLaMA-Factory, {way}: {len(losses)} of {steps} steps\n{''.join(said[-40:])}")
    return losses, [after - before for before, after in pairwise(times)]


def main() -> None:
    args = parse()
    check_ways(args.python)
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for turn in range(args.rounds):
            for way in list(WAYS) if turn % 2 == 0 else reversed(WAYS):
                losses[way], took = train(args.python, way, folder, args.steps)
                seconds[way] += took
                print(f"round {turn + 1}, {way}: " + " ".join(f"{second:.2f}" for second in took), flush=True)
    print("\nstep  loss: " + "  ".join(WAYS))
    for step, row in enumerate(zip(*losses.values()), 1):
        print(f"{step:4}  " + "  ".join(f"{loss:.4f}" for loss in row))
    for way, values in seconds.items():
        low, median, high = spread(values)
        print(f"{way}: {median:.2f} s/step ({low:.2f}-{high:.2f})")
    low, median, high = ratios(*seconds.values())
    print(f"patched is {median:.2f} times as fast ({low:.2f}-{high:.2f})")
    apart = max(abs(one - other) for one, other in zip(*losses.values()))
    assert apart <= LOSS_BOUND, f"losses are {apart:.3f} apart at one step, allowed {LOSS_BOUND}"


if __name__ == "__main__":
    main()
