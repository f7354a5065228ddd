"""What a person reads of a fine-tune: its log, the picture of it, and the model card."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from ...distributed.expert_load import BUSIEST, IDLE
from ...storage.atomic import replacing
from ...version import VERSION

LOG, PICTURE, CARD, RECIPE = "log.csv", "loss.png", "README.md", "recipe.yaml"
# Of the trainer's log, what is the same however often a run was resumed; times and speeds are not.
COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "entropy")
OF_EXPERTS = (BUSIEST, IDLE)  # columns of a mixture's log alone
OF_A_TEACHER = ("soft", "hard", "cosine", "hint", "contrastive", "eval_kl")  # and of a distillation's


@dataclass(frozen=True)
class Card:
    """What a model card says of the kind of a run."""

    title: str = "LoRA adapters for"
    about: str = "Trained by nf4kernels {version} with TRL and PEFT."
    library: str = "peft"
    tags: tuple[str, ...] = ("lora", "nf4kernels")
    verb: str = "finetune"


def write_log(path: Path, history: list[dict[str, Any]]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        columns = (*COLUMNS, *(name for name in OF_EXPERTS + OF_A_TEACHER if any(name in entry for entry in history)))
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(entry for entry in history if "loss" in entry or "eval_loss" in entry)


def write_picture(
    path: Path,
    history: list[dict[str, Any]],
    before: float | None,
    after: float | None,
    kl: tuple[float | None, float | None] = (None, None),
) -> None:
    """Training loss and held-out loss over the steps; below each other where the one is of a teacher.

    kl: the held-out KL to that teacher before and after.
    """
    last = max((entry["step"] for entry in history if "loss" in entry), default=0)

    def points(column: str, first: float | None = None, final: float | None = None) -> list[tuple[int, float]]:
        found = {(entry["step"], entry[column]) for entry in history if column in entry}
        ends = {(step, value) for step, value in ((0, first), (last, final)) if value is not None}
        return sorted(found | ends)

    training, held_out = points("loss"), points("eval_loss", before, after)
    has_teacher = any(value is not None for value in kl)
    panels: list[tuple[str, dict[str, list[tuple[int, float]]]]] = (
        [("distillation (nats a token)", {"training": training, "held out, KL to the teacher": points("eval_kl", *kl)}),
         ("loss (nats a token)", {"held out": held_out})]
        if has_teacher else [("loss (nats a token)", {"training": training, "held out": held_out})]
    )  # fmt: skip
    figure = Figure(figsize=(7, 3 * len(panels) + 1))
    for axes, (label, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        for name, line in lines.items():
            if line:
                axes.plot(*zip(*line), "-" if name == "training" else "o--", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def write_card(
    path: Path,
    base: str,
    given: dict[str, Any],
    facts: dict[str, Any],
    samples: list[tuple[str, str, str]],
    card: Card,
) -> None:
    """README.md of what was trained: what Hugging Face's hub reads on top, then the losses, samples and the recipe.

    Args:
        facts: a row of the table each.
        samples: prompt, what the data has as its answer, what the model answers.
    """
    top = yaml.safe_dump(
        {
            "base_model": base,
            "library_name": card.library,
            "pipeline_tag": "text-generation",
            "tags": list(card.tags),
        },
        sort_keys=False,
    )
    lines = [
        f"---\n{top}---", f"# {card.title} {Path(base).name or base}", card.about.format(version=VERSION),
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        f"![loss]({PICTURE})",
    ]  # fmt: skip
    if samples:
        lines.append("## Answers on held-out examples")
    for prompt, expected, answer in samples:
        lines.append(f"{_block('asked', prompt)}\n{_block('in the data', expected)}\n{_block('answered', answer)}")
    text = yaml.safe_dump(given, sort_keys=True, allow_unicode=True)
    lines.append(f"## Recipe\n\n```yaml\n{text}```\n\n`nf4kernels {card.verb} --config {RECIPE}` runs it again.")
    with replacing(path) as partial:
        partial.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _block(title: str, text: str) -> str:
    """Text of any kind, indented, so that no mark in it counts."""
    return f"{title}:\n\n" + "\n".join(f"    {line}" for line in text.splitlines() or [""]) + "\n"
