"""What data types cost a model on tasks: lm-evaluation-harness's metrics of the dense model and each variant."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from ...model.report import table
from ..errors import StageError, first_line
from .dense import DenseWeights, load_dense, open_device
from .variants import Variant

BATCH = 8  # requests that are evaluated together
NO_FILTER = "none"  # the harness's name for an answer that is taken as it is


@dataclass(frozen=True)
class Metric:
    """One number of a task or group; `filter` is what the harness picked out of the answers, "none" for all."""

    task: str
    name: str
    filter: str
    value: float
    stderr: float | None

    @property
    def title(self) -> str:
        return f"{self.task} {self.name}" + ("" if self.filter == NO_FILTER else f" ({self.filter})")

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


@dataclass(frozen=True)
class TaskRow:
    """The metrics of a variant, or of the dense model, for which `variant` and `bits` (a weight) are None."""

    variant: Variant | None
    bits: float | None
    metrics: list[Metric]


@dataclass(frozen=True)
class TaskComparison:
    """Attributes:
    tasks: names of the tasks, groups and tags asked for.
    limit: examples of each task, at most; None for all.
    rows: the dense model, then the variants.
    parts: tasks that are counted in a group, whose rows are in `as_dict` and not in the table.
    """

    tasks: list[str]
    limit: int | None
    rows: list[TaskRow]
    parts: frozenset[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            ({"codebook": "dense"} if row.variant is None else vars(row.variant) | {"bits": row.bits})
            | {"metrics": [vars(metric) for metric in row.metrics]}
            for row in self.rows
        ]
        return {"tasks": self.tasks, "limit": self.limit, "variants": rows}

    def __str__(self) -> str:
        """A row a variant and a column a metric, with its standard error."""
        shown = [i for i, metric in enumerate(self.rows[0].metrics) if metric.task not in self.parts]
        titles = [self.rows[0].metrics[i].title for i in shown]
        rows: list[tuple[str, ...] | None] = [("codebook", "block", "scales", "bits/weight", *titles)]
        for row in self.rows:
            its = row.variant
            named = ("dense", "", "") if its is None else (its.codebook, str(its.block_size), its.scales)
            bits = "" if row.bits is None else f"{row.bits:.3f}"
            rows.append((*named, bits, *(str(row.metrics[i]) for i in shown)))
        return table(rows, left=(0, 2))


def compare_tasks(
    path: str | Path,
    tasks: Sequence[str],
    compared: Sequence[Variant],
    tasks_path: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    skip: Iterable[str] = (),
    device: Any = None,
    progress: bool = True,
) -> TaskComparison:
    """lm-evaluation-harness's metrics of the dense model in `path`, and with each variant's Ŵ in its place.

    Args:
        path: a Hugging Face directory of a causal language model, not quantized.
        tasks: names of tasks, groups or tags that the harness knows.
        compared: as `variants` makes them.
        tasks_path: a directory of the harness's YAML files, for tasks of one's own.
        limit: examples of each task; None is all.
        fewshot: solved examples before each question; None is what the task says.
        skip: layers to leave dense, as in `nf4kernels.quantize_model`; they add to its own.
        device: None is the GPU where there is one.
        progress: show a progress bar of the variants on stderr; the harness shows its own.

    Raises:
        StageError: an argument or the model is not as it must be, or a task cannot be loaded.
    """
    if limit is not None and limit < 1:
        raise StageError(f"--tasks-limit must be at least 1, got {limit}")
    if fewshot is not None and fewshot < 0:
        raise StageError(f"--tasks-fewshot must be 0 or more, got {fewshot}")
    device = open_device(device)
    manager = _manager(tasks, tasks_path)
    model, tokenizer = load_dense(Path(path))
    parts: set[str] = set()

    def measured(variant: Variant | None, bits: float | None) -> TaskRow:
        results = simple_evaluate(
            wrapped, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=fewshot, log_samples=False
        )
        parts.update(part for members in results.get("group_subtasks", {}).values() for part in members)
        return TaskRow(variant, bits, _metrics(results["results"]))

    with DenseWeights(model.to(device), skip) as dense:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
        bar = tqdm([None, *compared], desc="compare --tasks", unit="variant", disable=not progress)
        rows = [measured(variant, None if variant is None else dense.put(variant)[0]) for variant in bar]
    return TaskComparison(list(tasks), limit, rows, frozenset(parts))


def _manager(tasks: Sequence[str], tasks_path: Path | None) -> TaskManager:
    """One that knows all of `tasks`, which are loaded here for once, so that what is wrong with them shows first."""
    if tasks_path is not None and not tasks_path.is_dir():
        raise StageError(f"--tasks-path must be a directory of task files, got {tasks_path}")
    manager = None
    if tasks_path is not None:
        manager = TaskManager(include_path=str(tasks_path), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):  # to read all of the harness's own takes a while
        manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    for task in tasks:
        if task not in manager.all_tasks:
            raise StageError(
                f"--tasks must be of lm-evaluation-harness or of a file in --tasks-path, got {task} (lm_eval ls tasks"
                " lists its own)"
            )
    try:
        manager.load(list(tasks))
    except Exception as error:  # what a task, its data and their libraries raise has no common type
        raise StageError(f"--tasks must be loadable, got {type(error).__name__}: {first_line(error)}") from None
    return manager


def _metrics(results: dict[str, dict[str, Any]]) -> list[Metric]:
    """Of the harness's {task: {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": ...}}."""
    found = []
    for task, entries in results.items():
        for key, value in entries.items():
            name, comma, picked = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = entries.get(f"{name}_stderr,{picked}")  # "N/A" where the harness has none
            found.append(
                Metric(task, name, picked, float(value), float(stderr) if isinstance(stderr, (int, float)) else None)
            )
    return found
