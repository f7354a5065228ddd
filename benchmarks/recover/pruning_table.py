"""What pruning takes from SmolLM2 with and without 4 bits, and what a short recovery brings back: the rows of a table.

    python -m benchmarks.recover.pruning_table --model DIR --out rows.jsonl
    python -m benchmarks.recover.pruning_table --model DIR --out recovered.jsonl --recover 30

Each row is appended when it is there, and the same command goes on after the last one. The loss and the KL to the bf16
model are in nats a token, of held-out word definitions and of prose about Python, which the calibration has none of.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import nf4kernels as nf4
from nf4kernels.model.memory import model_bytes
from nf4kernels.recover import (
    MaskedLora,
    agreement,
    apply_masks,
    find_masks,
    find_structure,
    prune_model,
    prune_structure,
)
from nf4kernels.recover.pruning.prune import prunable

from ..model.answers import train_and_held_out

LENGTH, ROWS = 64, 16
CALIBRATION = 1024
RECOVERY_ROWS = 4
KL_WINDOWS = 8  # of the calibration for the score by KL, which runs the model once a layer
ORDERS = ("bf16", "prune, round", "round, prune")
ALL_ORDERS = (*ORDERS, "round, same masks")
UNITS = ("heads", "channels", "layers")
# What is measured, in the order in which it is worth knowing: (pattern, method, share, orders, or steps of recovery).
ROWS_OF_TABLE = [
    ("unstructured", "wanda", 0.5, ALL_ORDERS), ("2:4", "wanda", 0.5, "recover"),
    ("2:4", "wanda", 0.5, ORDERS), ("unstructured", "magnitude", 0.5, ORDERS),
    ("channels", "gradient", 0.25, ORDERS[:2]), ("layers", "influence", 0.25, ORDERS[:2]),
    ("heads", "gradient", 0.25, ORDERS[:2]), ("unstructured", "gradient", 0.5, ORDERS),
    ("channels", "gradient", 0.25, "recover"), ("layers", "kl", 0.25, "recover"),
    ("channels", "wanda", 0.25, ORDERS[:1]), ("channels", "magnitude", 0.25, ORDERS[:1]),
    ("unstructured", "wanda", 0.25, ORDERS[:2]), ("2:4", "magnitude", 0.5, ORDERS[:2]),
    ("unstructured", "magnitude", 0.25, ORDERS[:2]), ("layers", "kl", 0.25, ORDERS[:2]),
    ("layers", "gradient", 0.25, ORDERS[:1]), ("layers", "magnitude", 0.25, ORDERS[:1]),
    ("heads", "wanda", 0.25, ORDERS[:1]), ("heads", "magnitude", 0.25, ORDERS[:1]),
    ("channels", "gradient", 0.5, ORDERS[:2]), ("layers", "influence", 0.5, ORDERS[:2]),
    ("unstructured", "gradient", 0.25, ORDERS[:2]), ("2:4", "gradient", 0.5, ORDERS[:2]),
    ("unstructured", "wanda", 0.5, "recover"), ("channels", "gradient", 0.5, "recover"),
]  # fmt: skip


class Texts:
    """Windows of LENGTH tokens: calibration and training of word definitions, two held-out texts."""

    def __init__(self, tokenizer: Any, words: int, prose: int) -> None:
        trained, held_out = train_and_held_out()
        self.training = _windows(tokenizer, "\n".join(row["prompt"] + row["completion"] for row in trained))
        definitions = _windows(tokenizer, "\n".join(row["prompt"] + row["completion"] for row in held_out))
        documents = _windows(tokenizer, "\n".join(topics.values()))
        self.calibration = _batches(self.training[: CALIBRATION // LENGTH])
        self.words, self.prose = (_batches(each[: count // LENGTH]) for each, count in
                                  ((definitions, words), (documents, prose)))  # fmt: skip


def _windows(tokenizer: Any, text: str) -> Tensor:
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def _batches(windows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": each} for each in windows.split(ROWS)]


class Recorded(nn.Module):
    """The reference's logits on the held-out texts, computed once."""

    def __init__(self, model: nn.Module, batches: list) -> None:
        super().__init__()
        with torch.no_grad():
            self._logits = {batch["input_ids"].data_ptr(): model(**batch).logits for batch in batches}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._logits[input_ids.data_ptr()]


class Table:
    def __init__(self, path: Path, texts: Texts, reference: Recorded) -> None:
        self._path, self._texts, self._reference = path, texts, reference
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.keys = {tuple(json.loads(line)["key"]) for line in lines}

    def add(self, key: tuple, model: nn.Module, seconds: float) -> None:
        words, prose = (agreement(model, self._reference, each) for each in (self._texts.words, self._texts.prose))
        row = {"key": key, "bytes": model_bytes(model), "seconds": round(seconds, 1), "words": vars(words),
               "prose": vars(prose)}  # fmt: skip
        self.keys.add(key)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        name, size = " ".join(map(str, key)), row["bytes"] / 2**20
        print(
            f"{name:45} {size:6.1f} MiB  {words.loss:.3f} {words.kl:.3f} "
            f"{words.top1:.3f}  {prose.loss:.3f} {prose.kl:.3f} {prose.top1:.3f}  {seconds:.0f} s",
            flush=True,
        )


def measure_masks(
    table: Table, dense: nn.Module, texts: Texts, pattern: str, method: str, share: float, orders: tuple
) -> None:
    """bf16; pruned then rounded; the same masks on codes that have the dense weight's scales; rounded then pruned."""
    key = (pattern, method, share)
    wanted = [each for each in orders if (*key, each) not in table.keys]
    if not wanted:
        return
    options = {"share": share, "pattern": pattern, "method": method, "batches": texts.calibration, "progress": False}
    began = time.perf_counter()
    masks = find_masks(dense, **options)
    seconds = time.perf_counter() - began
    model = copy.deepcopy(dense)
    apply_masks(model, masks)
    if "bf16" in wanted:
        table.add((*key, "bf16"), model, seconds)
    nf4.quantize_model(model, progress=False)
    if "prune, round" in wanted:
        table.add((*key, "prune, round"), model, seconds)
    model = copy.deepcopy(dense)
    nf4.quantize_model(model, progress=False)
    if "round, same masks" in wanted:
        rounded = copy.deepcopy(model)
        apply_masks(rounded, masks)
        table.add((*key, "round, same masks"), rounded, seconds)
    if "round, prune" in wanted:
        prune_model(model, **options)
        table.add((*key, "round, prune"), model, seconds)


def cut(dense: nn.Module, texts: Texts, unit: str, method: str, share: float) -> Any:
    model: Any = copy.deepcopy(dense)
    structure = find_structure(model, model.config.num_attention_heads, model.config.num_key_value_heads)
    calibration = _batches(texts.training[:KL_WINDOWS]) if method == "kl" else texts.calibration
    prune_structure(model, structure, unit, share, method, calibration, progress=False)
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def measure_structure(
    table: Table, dense: nn.Module, texts: Texts, unit: str, method: str, share: float, orders: tuple
) -> None:
    key = (unit, method, share)
    if {(*key, each) for each in orders} <= table.keys:
        return
    began = time.perf_counter()
    model = cut(dense, texts, unit, method, share)
    seconds = time.perf_counter() - began
    table.add((*key, "bf16"), model, seconds)
    if "prune, round" in orders:
        nf4.quantize_model(model, progress=False)
        table.add((*key, "prune, round"), model, seconds)


def measure_recovery(
    table: Table, dense: nn.Module, texts: Texts, pattern: str, method: str, share: float, steps: int
) -> None:
    """KL to the dense model, `steps` of RECOVERY_ROWS windows: adapters merged under masks in bf16, then rounded."""
    key = (pattern, method, share, f"{steps} steps")
    if (*key, "prune, round") in table.keys:
        return
    masks: dict[str, Any]
    if pattern in UNITS:
        model = cut(dense, texts, pattern, method, share)
        masks = dict.fromkeys(prunable(model))
    else:
        model = copy.deepcopy(dense)
        masks = dict(prune_model(model, share, pattern, method, texts.calibration, progress=False))
    began = time.perf_counter()
    adapters = MaskedLora(model, masks, nf4.LoraConfig(r=16))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for batch in _drawn(texts.training, steps):
        with torch.no_grad():
            wanted = dense(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
        found = model(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
        loss = functional.kl_div(found, wanted, reduction="sum", log_target=True) / found[..., 0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    adapters.merge()
    seconds = time.perf_counter() - began
    table.add((*key, "bf16"), model, seconds)
    nf4.quantize_model(model, progress=False)
    table.add((*key, "prune, round"), model, seconds)


def _drawn(windows: Tensor, steps: int) -> Iterator[Tensor]:
    random.seed(0)
    for _ in range(steps):
        yield windows[random.sample(range(len(windows)), RECOVERY_ROWS)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recover", type=int, default=0, help="steps of recovery: those rows, and no others")
    parser.add_argument("--words", type=int, default=1024)
    parser.add_argument("--prose", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    dense.config.use_cache = False
    texts = Texts(tokenizer, args.words, args.prose)
    table = Table(args.out, texts, Recorded(dense, [*texts.words, *texts.prose]))
    if ("none", "", 0, "prune, round") not in table.keys:
        table.add(("none", "", 0, "bf16"), dense, 0)
        rounded = copy.deepcopy(dense)
        nf4.quantize_model(rounded, progress=False)
        table.add(("none", "", 0, "prune, round"), rounded, 0)
    for pattern, method, share, orders in ROWS_OF_TABLE:
        if (orders == "recover") != bool(args.recover):
            continue
        if args.recover:
            measure_recovery(table, dense, texts, pattern, method, share, args.recover)
        elif pattern in UNITS:
            measure_structure(table, dense, texts, pattern, method, share, orders)
        else:
            measure_masks(table, dense, texts, pattern, method, share, orders)


if __name__ == "__main__":
    main()
