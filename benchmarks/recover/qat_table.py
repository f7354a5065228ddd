"""What training through the rounding, 8-bit activations, low rank and a shared codebook do to a small language model.

`python -m benchmarks.recover.qat_table MODEL_DIR [--steps 80] [--parts qat activations low_rank codebook]` prints a
table: held-out loss, KL to the 16-bit model and top-1 agreement on word definitions that nothing was trained on, dense
parts and inputs in bf16. Seconds are those of the method on this machine, loading and evaluation left out.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import nf4kernels as nf4
from nf4kernels.demo.data import definitions
from nf4kernels.model.memory import model_bytes
from nf4kernels.recover import (
    activation_costs,
    agreement,
    convert_qat,
    low_rank_model,
    prepare_qat,
    qat_train,
    shared_codebook,
)
from nf4kernels.recover.batches import counted_rows, logits_in, run
from nf4kernels.recover.qat import cross_entropy

LENGTH, ROWS = 64, 8  # tokens of a row, rows of a batch
HELD_OUT, CALIBRATION = 2048, 2048  # tokens
PARTS = ("qat", "activations", "low_rank", "codebook")
SHARES = (0.9, 0.5)


def batches(ids: Tensor, rows: int) -> list[dict[str, Tensor]]:
    whole = ids[: len(ids) // (LENGTH * rows) * LENGTH * rows].view(-1, rows, LENGTH)
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in whole]


def divergence_from(teacher: nn.Module) -> Callable[[nn.Module, dict], Tensor]:
    """KL(teacher || model), nats a row."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        with torch.no_grad():
            p = counted_rows(logits_in(run(teacher, batch)), batch).float().log_softmax(-1)
        q = counted_rows(logits_in(run(model, batch)), batch).float().log_softmax(-1)
        return functional.kl_div(q, p, reduction="batchmean", log_target=True)

    return loss


class Table:
    def __init__(self, reference: nn.Module, held_out: Iterable) -> None:
        self.reference, self.held_out = reference, list(held_out)
        print(f"{'':58} {'MB':>6} {'loss':>7} {'KL':>7} {'top-1':>6} {'s':>6}", flush=True)

    def row(self, name: str, model: nn.Module, seconds: float = 0.0, found=None) -> None:
        found = found or agreement(model, self.reference, self.held_out)
        numbers = f"{found.loss:7.4f} {found.kl:7.4f} {found.top1:6.1%} {seconds:6.0f}"
        print(f"{name:58} {model_bytes(model) / 1e6:6.1f} {numbers}", flush=True)


def quantized(model: nn.Module, **options) -> nn.Module:
    made = copy.deepcopy(model)
    nf4.quantize_model(made, progress=False, **options)
    return made


def qat_rows(table: Table, steps: list, wanted: list[str]) -> None:
    ways = {
        "full, cross-entropy, 2e-5": (None, cross_entropy, 2e-5),
        "full, KL to 16 bits, 2e-5": (None, divergence_from(table.reference), 2e-5),
        "full, KL to 16 bits, 1e-4": (None, divergence_from(table.reference), 1e-4),
        "LoRA merged r=16, cross-entropy, 5e-4": (16, cross_entropy, 5e-4),
        "LoRA merged r=16, KL to 16 bits, 5e-4": (16, divergence_from(table.reference), 5e-4),
    }
    for name, (r, loss, rate) in ways.items():
        if wanted and not any(each in name for each in wanted):
            continue
        model, since = copy.deepcopy(table.reference), time.monotonic()
        if r is None:
            model.float()  # whose steps bf16 would round away
        model.requires_grad_(r is None)
        prepare_qat(model, lora_merged=None if r is None else nf4.LoraConfig(r=r, alpha=2 * r))
        with torch.autocast("cpu", torch.bfloat16):
            qat_train(model, steps, loss, learning_rate=rate)
        seconds = time.monotonic() - since
        convert_qat(model, progress=False)
        model.to(torch.bfloat16)
        table.row(f"QAT {name}, {len(steps)} steps of {len(steps[0]['input_ids'])}x{LENGTH}", model, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of {LENGTH} tokens, in a step of qat")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="tokens to be measured on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", default=[], help="rows of qat with one of these in their names, no other")
    args = parser.parse_args()
    reference = AutoModelForCausalLM.from_pretrained(args.directory, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.directory)
    texts = [row["prompt"] + row["completion"] for row in definitions()]
    ids = torch.tensor(tokenizer("\n".join(texts))["input_ids"])
    held_out, ids = batches(ids[-args.held_out :], 16), ids[: -args.held_out]
    steps, calibration = batches(ids[CALIBRATION:], args.rows)[: args.steps], batches(ids[:CALIBRATION], ROWS)
    table = Table(reference, held_out)
    plain = quantized(reference)
    if not args.only:
        table.row("16 bits", reference)
        table.row("NF4", plain)
    if "codebook" in args.parts:
        since = time.monotonic()
        codebook = shared_codebook(reference)
        seconds = time.monotonic() - since
        table.row("4 bits, one codebook by k-means", quantized(reference, codebook=codebook), seconds)
    if "activations" in args.parts:
        since = time.monotonic()
        for name, found in activation_costs(plain, reference, held_out, calibration).items():
            table.row(f"NF4, inputs {name}", plain, found=found)
    if "low_rank" in args.parts:
        budget = sum(
            layer.bytes_before for layer in nf4.quantize_model(copy.deepcopy(reference), progress=False).layers
        )
        for share in SHARES:
            for weighted in (None, calibration):
                model, since = copy.deepcopy(reference), time.monotonic()
                low_rank_model(model, budget=int(share * budget), batches=weighted, progress=False)
                seconds = time.monotonic() - since
                how = "SVD" if weighted is None else "SVD weighted by inputs"
                table.row(f"{how}, {share:.0%} of the layers' bytes", model, seconds)
                if share == SHARES[0]:
                    table.row("  its parts in NF4", quantized(model), seconds)
    if "qat" in args.parts:
        qat_rows(table, steps, args.only)


if __name__ == "__main__":
    main()
