"""A plan for a Hugging Face directory: what its layers cost on a text, and the plan that loses least within bytes."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...codebook import DOUBLE_QUANT_CODEBOOKS
from ...model.report import table
from ...nn.lora import LoraConfig
from ...recover.agreement import evaluating
from ...recover.batches import counted_rows, logits_in, run
from ...recover.candidates import Candidate, blocks_of, default_candidates, layer_names, layers_of_one_input
from ...recover.plan import Plan, make_plan
from ...recover.sensitivity import METHODS, Sensitivities, aliases_of, changed, divergence, sensitivity
from ..compare.dense import load_dense, open_device
from ..errors import StageError, first_line
from ..text_loss import LONGEST_TOKEN, batches_of, read_documents, windows
from .plan_picture import plot_plan
from .search import Found, product_seconds, search

ALIASES = {"out": "output"}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass
class PlanOptions:
    """What a plan is to be."""

    model: str | None = field(default=None, metadata={"help": "a dense Hugging Face directory with its tokenizer."})
    text: str | None = field(
        default=None,
        metadata={"help": "what the model is to stay good at: a .txt, or a .jsonl of lines with text."},
    )
    output: str | None = field(default=None, metadata={"help": "the plan's file, .json; a .png comes beside it."})
    bits: float | None = field(
        default=None, metadata={"help": "the budget: bits a weight of the layers, scales and codebooks included."}
    )
    bytes: str | None = field(
        default=None, metadata={"help": "or the bytes of the whole model, as 90M, 1.5G (1000) or 90Mi (1024)."}
    )
    candidates: list[str] | None = field(
        default=None,
        metadata={
            "help": "what a layer may become: CODEBOOK, CODEBOOK:BLOCK or CODEBOOK:BLOCK:SCALES (e4m3, dynamic8,"
            " float32), with +rN for a LoRA of rank N (LoftQ), after rankN/ for two layers of rank N; or dense."
        },
    )
    method: str = field(default="scaled", metadata={"help": f"how the KL is found: one of {', '.join(METHODS)}."})
    each: bool = field(default=False, metadata={"help": "layers that read the same input may differ, too."})
    drop: bool = field(default=False, metadata={"help": "whole blocks, attentions and MLPs may be dropped."})
    skip: list[str] | None = field(default=None, metadata={"help": "layers to leave dense, which no plan counts."})
    tokens: int = field(default=1024, metadata={"help": "how many of the text are predicted."})
    length: int = field(default=256, metadata={"help": "of a window, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "that it computes in: float32, or auto for the model's."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda or cuda:1; a GPU where there is one."})
    measurements: str | None = field(
        default=None, metadata={"help": "the file of what was measured; OUTPUT with .sensitivity.json where not said."}
    )
    milliseconds: float | None = field(
        default=None, metadata={"help": "the most that one token's products may take, measured on this device."}
    )
    trials: int = field(
        default=0, metadata={"help": "plans that an evolutionary search measures, from the best expected on."}
    )
    seed: int = field(default=0, metadata={"help": "of the search, and of what the method draws."})


@dataclass(frozen=True)
class Line:
    """One way to store all layers: bits a weight, bytes of the whole model, expected and measured KL, seconds."""

    name: str
    bits: float
    nbytes: int
    expected: float
    measured: float
    seconds: float | None


@dataclass(frozen=True)
class Planned:
    """What was made.

    Attributes:
        tokens: predictions behind each KL.
        lines: every plain candidate for all layers, then the plan.
        output, picture: the files.
    """

    plan: Plan
    tokens: int
    lines: list[Line]
    output: Path
    picture: Path

    def __str__(self) -> str:
        rows: list[Any] = [("all layers", "bits/weight", "model", "expected KL", "measured KL", "ms a token")]
        for line in self.lines:
            time = "" if line.seconds is None else f"{1e3 * line.seconds:.2f}"
            rows.append((line.name, f"{line.bits:.3f}", f"{line.nbytes / 2**20:.1f} MiB", f"{line.expected:.4f}",
                         f"{line.measured:.4f}", time))  # fmt: skip
        rows.insert(-1, None)
        return table(rows)


def read_candidate(word: str) -> Candidate:
    """The candidate of one word of --candidates; StageError for a word that is none."""
    expected = "--candidates must be of CODEBOOK[:BLOCK[:SCALES]][+rN], rankN/... and dense"
    low, slash, rest = word.rpartition("/")
    plain, plus, adapter = rest.partition("+")
    try:
        rank = int(low.removeprefix("rank")) if slash else None
        if plain == "dense" and not plus:
            return Candidate(rank=rank)
        codebook, *own = plain.split(":")
        options: dict[str, Any] = {"codebook": codebook}
        if own:
            options["block_size"] = int(own[0])
        if len(own) == 2:
            options["double_quant"] = own[1] in DOUBLE_QUANT_CODEBOOKS
            options |= {"scale_codebook": own[1]} if own[1] in DOUBLE_QUANT_CODEBOOKS else {}
            if own[1] not in (*DOUBLE_QUANT_CODEBOOKS, "float32"):
                raise ValueError(f"scales {own[1]}")
        if len(own) > 2 or (plus and not adapter.startswith("r")):
            raise ValueError("other words")
        if plus:
            r = int(adapter.removeprefix("r"))
            options["lora"] = LoraConfig(r=r, alpha=r, init="loftq")
        return Candidate(options, rank)
    except (TypeError, ValueError) as error:
        raise StageError(f"{expected}, got {word!r}: {first_line(error)}") from None


def read_bytes(word: str) -> int:
    """90M, 1.5G, 90Mi, 1000; StageError for what is none."""
    digits = word.strip().rstrip("bB").rstrip("kKmMgGiI")
    unit = word.strip().rstrip("bB")[len(digits) :].lower()
    try:
        return int(float(digits) * UNITS[unit])
    except (KeyError, ValueError):
        raise StageError(f"--bytes must be a number with k, M, G, Ki, Mi or Gi, got {word!r}") from None


def plan_directory(options: PlanOptions, progress: bool = True) -> Planned:
    """Measure what layers cost, make the plan, measure what it costs, and write plan and picture.

    What was measured is kept beside the plan, so that another budget takes no second measurement, and the same command
    goes on where it was stopped.

    Raises:
        StageError: an argument, the model or the text is not as it must be, or the budget is too small.
    """
    output, candidates = _checked(options)
    documents = list(read_documents(Path(options.text or ""), options.tokens * LONGEST_TOKEN))
    device = open_device(options.device)
    model, tokenizer = load_dense(Path(options.model or ""))
    rows = windows(documents, tokenizer, options.length, options.tokens)
    if not rows:
        raise StageError(f"{options.text} must hold at least two tokens, got fewer")
    batches = [{"input_ids": b.ids, "attention_mask": b.mask} for b in batches_of(rows, device)]
    skip = tuple(options.skip or ())
    layers = layer_names(model, skip)
    if not layers:
        raise StageError("MODEL must have a linear layer to quantize, got none")
    weights = [weight for layer in layers.values() for weight in layer.parameters() if weight.dim() >= 2]
    rest = _bytes(model.parameters()) - _bytes(weights)
    stored = weights[0].dtype
    model.to(device)
    if options.dtype == "float32":
        model.float()
    groups = [] if options.each else layers_of_one_input(model, batches[0], list(layers))
    drops = blocks_of(model, list(layers)) if options.drop else []
    measurements = Path(options.measurements or output.with_suffix(".sensitivity.json"))
    try:
        found = sensitivity(
            model, batches, candidates, groups, drops, skip, options.method, measurements, stored,  # type: ignore[arg-type]
            options.seed, progress,
        )  # fmt: skip
    except ValueError as error:
        raise StageError(first_line(error)) from None
    seconds = None
    if options.milliseconds is not None:
        seconds = product_seconds(layers, found, device, stored, progress)
    most = float("inf") if options.milliseconds is None else options.milliseconds / 1e3
    budget = found.weights * options.bits / 8 if options.bytes is None else read_bytes(options.bytes) - rest  # type: ignore[operator]
    try:
        with _silent():
            plan = make_plan(found, nbytes=int(budget), seconds=seconds, most_seconds=most)
    except ValueError as error:
        note = "" if options.bytes is None else f"; --bytes are of the whole model, {rest} of which stay as they are"
        raise StageError(f"{first_line(error)}{note}") from None
    measure = _Measure(model, batches)
    if options.trials:
        tried = search(
            found, plan, int(budget), seconds, most, measure.of_plan, options.trials, options.seed,
            output.with_suffix(".trials.log"), progress,
        )  # fmt: skip
        plan = _best(tried, most, plan)
    lines = _lines(found, plan, rest, seconds, measure, progress)
    plan.save(output)
    picture = output.with_suffix(".png")
    plot_plan(picture, found, plan)
    return Planned(plan, found.rows, lines, output, picture)


def _checked(options: PlanOptions) -> tuple[Path, list[Candidate]]:
    """StageError before anything is loaded."""
    for name in ("model", "text", "output"):
        if not getattr(options, name):
            raise StageError(f"--{name} must be given, got none")
    if (options.bits is None) == (options.bytes is None):
        raise StageError(f"--bits or --bytes must be given, got {'neither' if options.bits is None else 'both'}")
    output = Path(options.output or "")
    if output.suffix != ".json" or not output.parent.is_dir():
        raise StageError(f"--output must be a .json in a directory that exists, got {output}")
    if options.bytes is not None:
        read_bytes(options.bytes)
    if options.tokens < 1 or options.length < 2:
        raise StageError(f"--tokens and --length must be at least 1 and 2, got {options.tokens} and {options.length}")
    for name, value, known in (("method", options.method, METHODS), ("dtype", options.dtype, ("float32", "auto"))):
        if value not in known:
            raise StageError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
    if options.trials < 0 or (options.milliseconds is not None and not options.milliseconds > 0):
        raise StageError("--trials and --milliseconds must be above 0, got others")
    words = options.candidates
    return output, default_candidates() if words is None else [read_candidate(word) for word in words]


class _Measure:
    """KL(model || model changed) on the batches; the model's logits are computed once."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches, self.aliases = model, batches, dict(aliases_of(model))
        with evaluating(model), torch.no_grad():
            self.references = [counted_rows(logits_in(run(model, batch)), batch) for batch in batches]

    @torch.no_grad()
    def of_plan(self, plan: Plan) -> float:
        with evaluating(self.model), changed(self.model, dict(plan.layers), self.aliases):
            return divergence(self.model, self.batches, self.references)


def _lines(
    found: Sensitivities, plan: Plan, rest: int, seconds: Mapping | None, measure: _Measure, progress: bool
) -> list[Line]:
    plans = {}
    for candidate in dict.fromkeys(option.candidate for option in found.options if not option.candidate.dropped):
        own = [option for option in found.options if option.candidate == candidate]
        plans[candidate.name] = Plan(
            {name: candidate for option in own for name in option.layers}, sum(o.nbytes for o in own), found.weights,
            sum(o.kl for o in own),
        )  # fmt: skip
    plans["the plan"] = plan
    of = {(option.layers, option.candidate): time for option, time in (seconds or {}).items()}
    lines = []
    for name, each in tqdm(plans.items(), desc="measure", unit="plan", disable=not progress):
        time = sum(t for (names, c), t in of.items() if all(each.layers[n] == c for n in names)) if seconds else None
        lines.append(Line(name, each.bits, rest + each.nbytes, each.kl, measure.of_plan(each), time))
    return lines


def _best(tried: Sequence[Found], most: float, start: Plan) -> Plan:
    """Of what is within the budget the one with the least KL; `start` where nothing that was measured is."""
    within = [one for one in tried if one.seconds <= most]
    return min(within, key=lambda one: one.kl).plan if within else start


@contextmanager
def _silent() -> Iterator[None]:
    """A `with` in which nothing reaches the process's stdout: HiGHS prints lines of its own debugging (scipy 1.17)."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _bytes(parameters: Any) -> int:
    return sum(parameter.nbytes for parameter in {id(each): each for each in parameters}.values())
