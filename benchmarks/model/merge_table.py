"""What merging a fine-tuned adapter does to it, through PEFT's own API: held-out loss of SmolLM2 on WordNet.

    python -m benchmarks.model.merge_table [--steps 50] [--cache .cache]

Prints one row for the 16-bit model, for it in 4 bits, for that with an adapter, and for each of the three merges.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels.demo import smollm2
from nf4kernels.demo.loading import cast_parameters, load, quiet_transformers
from nf4kernels.demo.settings import Settings
from nf4kernels.integrations.peft import merge_into
from nf4kernels.model.training import training_dtype
from nf4kernels.stages.text_loss import Batch, held_out_loss

from .answers import batched, encode, train, train_and_held_out, training_batches

MAX_LENGTH = 64


def encoded(tokenizer: Any, steps: int) -> tuple[list[Batch], list[Batch]]:
    """(batches for `steps` of training, held-out batches) of the demo's word definitions."""
    examples, held_out = train_and_held_out()
    rows = [encode(example, tokenizer, MAX_LENGTH) for example in examples]
    batches = training_batches(rows, Settings.batch, steps, Settings.seed)
    return batches, batched(encode(example, tokenizer, MAX_LENGTH) for example in held_out)


def fine_tuned(base: nn.Module, batches: list[Batch], rank: int, learning_rate: float) -> nn.Module:
    """PEFT's model of `base`, quantized in place, its adapter trained."""
    nf4.quantize_model(base)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    train(model, batches, learning_rate, "fine-tune")
    return model.eval()


def merge_losses(
    base: nn.Module, batches: list[Batch], tests: list[Batch], rank: int = 8, learning_rate: float = 1e-3
) -> dict[str, float]:
    """Row -> mean loss of an answer's token in `tests`; `base` is the dense model and stays as it is."""
    losses = {"16-bit base": held_out_loss(base, tests)}
    model = fine_tuned(copy.deepcopy(base), batches, rank, learning_rate)
    with model.disable_adapter():
        losses["NF4"] = held_out_loss(model, tests)
    losses["NF4 + LoRA"] = held_out_loss(model, tests)
    targets = {"merged into Ŵ": "dequantized", "merged into the base": base, "merged back into 4 bits": "4bit"}
    for row, target in targets.items():
        with merge_into(target):
            merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        losses[row] = held_out_loss(merged, tests)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model.merge_table", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    arguments = parser.parse_args()
    quiet_transformers()
    torch.manual_seed(0)
    base, tokenizer = load(smollm2.fetch(arguments.cache))
    cast_parameters(base, training_dtype("cpu"))  # 16-bit arithmetic is slow on some CPUs; what it holds stays the same
    batches, tests = encoded(tokenizer, arguments.steps)
    begin = time.perf_counter()
    losses = merge_losses(base, batches, tests)
    print(f"\n| SmolLM2-135M, {arguments.steps} steps | held-out loss |\n| --- | --- |")
    for row, loss in losses.items():
        print(f"| {row} | {loss:.3f} |")
    print(f"\n{time.perf_counter() - begin:.0f} s, {torch.get_num_threads()} threads, {training_dtype('cpu')}")


if __name__ == "__main__":
    main()
