"""What the demonstration prints: stages with their times, and tables."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

from ..model.report import QuantizeReport, relative_rms_error, table

MARGIN = "  "


class Stages:
    """Prints the title of every stage as it begins and keeps the seconds that each stage and each aside took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stages = 0
        self._aside = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        self._stages += 1
        print(f"\n[{self._stages}] {title}", flush=True)
        self.seconds.setdefault(title, 0.0)
        begin, aside_before = time.perf_counter(), self._aside
        yield
        self.seconds[title] += time.perf_counter() - begin - (self._aside - aside_before)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Work within a stage that is counted under its own name instead."""
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._aside += took


def mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def memory_table(report: QuantizeReport) -> str:
    """Bytes before and after and the error, a row for each kind of layer, of `quantize_model`'s report."""
    rows: list[tuple[str, ...] | None] = [("layer kind", "layers", "shape", "16-bit", "4-bit", "RMS error")]
    for kind, layers in report.by_kind().items():
        before, after = sum(x.bytes_before for x in layers), sum(x.bytes_after for x in layers)
        shapes = {f"{N} x {K}" for N, K in (x.shape for x in layers)}
        rows.append((kind, str(len(layers)), " ".join(shapes) if len(shapes) == 1 else "several", mib(before),
                     mib(after), f"{100 * relative_rms_error(layers):.2f} %"))  # fmt: skip
    rest = report.model_bytes_before - report.bytes_before
    rows.append(("all quantized", str(len(report.layers)), "", mib(report.bytes_before), mib(report.bytes_after),
                 f"{100 * report.rms_error:.2f} %"))  # fmt: skip
    rows.append(("left in 16 bits", "", "", mib(rest), mib(report.model_bytes_after - report.bytes_after), ""))
    rows.append(("whole model", "", "", mib(report.model_bytes_before), mib(report.model_bytes_after), ""))
    return indent(table(rows), MARGIN)


def loss_table(losses: dict[str, float]) -> str:
    base = next(iter(losses.values()))
    rows = [("held-out loss, in nats a token", "loss", "to 16-bit")]
    rows += [(name, f"{loss:.3f}", f"{loss - base:+.3f}") for name, loss in losses.items()]
    return indent(table(rows), MARGIN)


def time_table(seconds: dict[str, float], apart: str) -> str:
    """Seconds of every stage; `apart` stands below the total, which it is not part of."""
    rows = [("stage", "time")]
    rows += [(name, f"{took:.1f} s") for name, took in seconds.items() if name != apart]
    rows.append(("all of these", f"{sum(took for name, took in seconds.items() if name != apart):.1f} s"))
    rows.append((f"apart: {apart}", f"{seconds[apart]:.1f} s"))
    return indent(table(rows), MARGIN) + f"\n\n  most memory held at any moment: {mib(peak_bytes())}"


def sample_text(samples: list[dict]) -> str:
    """Each sample's prompt, the data's own answer, and the model's before and after the fine-tuning."""
    lines = []
    for sample in samples:
        lines += [f"  {sample['prompt']} ...", f"    data:   {sample['reference']}"]
        lines += [f"    before: {sample['before']}", f"    after:  {sample['after']}"]
    return "\n".join(lines)


def file_table(out: Path) -> str:
    """Every file and directory written, with its size and what it is."""
    kinds = {
        "adapter": "the LoRA adapters, in PEFT's format, with their recipe and log", "nf4": "the 4-bit weights",
        "merged": "a 16-bit Hugging Face model, adapters merged into the original base",
        "byte-model": "the 16-bit base that was trained here",
        "loss.png": "the fine-tuning", "weight_error.png": "the cost of rounding to 4 bits, layer by layer",
        "results.json": "all numbers of this run",
    }  # fmt: skip
    rows = [("written", "size", "what it is")]
    for path in sorted(out.iterdir()):
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
        rows.append((str(path), mib(size), kinds.get(path.name, "")))
    return indent(table(rows, left=(0, 2)), MARGIN)


def peak_bytes() -> int:
    """The most memory that this process ever held, of Linux's ru_maxrss."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
