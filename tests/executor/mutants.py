"""Leaves out, or moves, each barrier, wait, commit and fence of every CUDA kernel in turn, and shows who notices.

    PYTHONPATH=tests python -m executor.mutants            # all: "make mutants"
    PYTHONPATH=tests python -m executor.mutants ^linear    # of the kernels whose names this regular expression finds

Each is a mutant: one call in one instance of a kernel, which the host executor changes when it comes there, so that
nothing is compiled. It runs the calls of benchmarks/gpu/sanitize.py that reach the site, the quickest first, under the
race detector, until the executor ends a launch or a result has other bits. A mutant that none notices is equivalent to
the kernel, by a proof in EQUIVALENT, or it has survived, which is a gap in the tests: then the exit status is 1.
"""

import faulthandler
import itertools
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from executor import build
from executor.executor import SETTINGS, SM_86_SHARED, SM_90_SHARED, Executor, Site
from support import cuda_backend
from torch import Tensor

from benchmarks.gpu import reuse, sanitize
from nf4kernels.backends import native

# What is done to a call of each name. A barrier after which copies begin is put off until they have, as well.
CHANGES = {
    "sync_block": ("removed",),
    "sync_warp": ("removed", "unordered"),
    "copy_async_wait": ("removed", "short"),
    "copy_async_commit": ("removed",),
    "fence_device": ("removed",),
    "arrive": ("removed",),
}
BEFORE_COPIES = ("late",)
MULTIPROCESSORS = 2
SECONDS = 60  # for one call of a mutant, which may have made it endless

# (kernel without its template arguments, line of the source without comment, change) -> why no result can differ.
EQUIVALENT = {
    ("*_tiled_kernel", "copy_async_wait<0>();", "removed"): "every fetch is of a step, which has waited for it",
    ("*_tiled_kernel", "copy_async_wait<0>();", "short"): "every fetch is of a step, which has waited for it",
}


class Edit(NamedTuple):
    """A mutant in the source, for what is more than one call: `old` in a file of csrc/cuda, MUTANT where it is on."""

    what: str
    kernel: str  # the kernels that it is in, as a regular expression
    file: str
    old: str
    new: str
    is_slow: bool = False  # all that can be noticed is more wavefronts of shared memory

    def is_in(self, call: "Call") -> bool:
        return re.search(rf"(?<!\w){self.kernel}", call.kernels) is not None

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what} ({self.file})"


EDITS = (
    Edit(
        "every block adds all elements", "reduce_splits_kernel", "reduce_splits.cu",
        "i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads",
        "i = (MUTANT ? 0 : int64_t(blockIdx.x) * kThreads) + threadIdx.x; i < count; "
        "i += MUTANT ? kThreads : int64_t(gridDim.x) * kThreads",
    ),
    Edit(
        "every block adds all rows", "reduce_splits_transposed_kernel", "reduce_splits.cu",
        "row = blockIdx.y; row < args.rows; row += gridDim.y",
        "row = MUTANT ? 0 : blockIdx.y; row < args.rows; row += MUTANT ? 1 : gridDim.y",
    ),
    Edit(
        "a fetch into the stage that is multiplied", "linear_tiled_kernel", "linear_tiled.cuh",
        "product.fetch(free, step", "product.fetch(MUTANT ? stage : free, step",
    ),
    Edit(
        "a fetch into the stage that is multiplied", "linear_dgrad_tiled_kernel", "linear_dgrad_tiled.cuh",
        "product.fetch(free, (step", "product.fetch(MUTANT ? stage : free, (step",
    ),
    Edit(
        "every thread adds in the tree", "mean_kernel", "quantize_absmax.cu",
        "if (int(threadIdx.x) < half) staged", "if (int(threadIdx.x) < (MUTANT ? kThreads / 2 : half)) staged",
    ),
    Edit(
        "no swizzle of x", "linear_tiled_kernel", "tile.cuh",
        "return vector ^ (row & 7);", "return MUTANT ? vector : vector ^ (row & 7);", is_slow=True,
    ),
    Edit(
        "no swizzle of dY", "linear_dgrad_tiled_kernel", "tile.cuh",
        "return kRowVectors == 4 ?", "return MUTANT ? vector : kRowVectors == 4 ?", is_slow=True,
    ),
    Edit(
        "no padding of W", "linear_dgrad_tiled_kernel", "linear_dgrad_tiled.cuh",
        "n * S::kPackedPitch + n / 4 * 32;", "n * S::kPackedPitch + (MUTANT ? 0 : n / 4 * 32);", is_slow=True,
    ),
    Edit(
        "every row of the table from the same bank on", "linear_tiled_kernel", "pair_table.cuh",
        "row[(i + byte) % 8]", "row[MUTANT ? i : (i + byte) % 8]", is_slow=True,
    ),
)  # fmt: skip


def copy_with_edits(folder: Path) -> Path:
    """A copy of csrc in `folder` that has all EDITS, none of them on until the executor is told its number."""
    copy = folder / "csrc"
    shutil.copytree(build.CSRC, copy, dirs_exist_ok=True)
    for number, edit in enumerate(EDITS, 1):
        path = copy / "cuda" / edit.file
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise SystemExit(f"{edit.file} must have once what mutants.py edits: {edit.old}")
        is_on = f"(executor::source_mutant == {number})"
        path.write_text(text.replace(edit.old, edit.new.replace("MUTANT", is_on)), encoding="utf-8")
    return copy


class Mutant(NamedTuple):
    site: Site
    change: str

    @property
    def kernel(self) -> str:
        return self.site.kernel.partition("<")[0]

    def is_in(self, call: "Call") -> bool:
        return self.site in call.sites

    @property
    def line(self) -> str:
        """The source at the site, without its comment."""
        path, _, number = self.site.place.rpartition(":")
        return Path(path).read_text(encoding="utf-8").splitlines()[int(number) - 1].partition("//")[0].strip()

    @property
    def place(self) -> str:
        return Path(self.site.place).name

    def __str__(self) -> str:
        return f"{self.site.kernel}: {self.change} {self.line} ({self.place})"


class Limits(NamedTuple):
    """Of a launch."""

    shared: int = SM_86_SHARED
    blocks: int = 0  # along x and y; 0: as many as it asks for
    has_counters: bool = True  # of arrivals; else sums take a second launch


def limits_of(case: sanitize.Case) -> tuple[Limits, ...]:
    """Also with so few blocks that they loop over the grid, or shared memory for linear_small's deeper ring."""
    if case.op == "quantize_absmax":
        return Limits(), Limits(blocks=1)
    if case.op == "lora_grad" and "1100 rows" in case.what:
        return Limits(), Limits(has_counters=False)
    is_small = case.kernels[0] is not None and case.kernels[0].kernel == "small"
    return (Limits(), Limits(SM_90_SHARED)) if is_small else (Limits(),)


class Call(NamedTuple):
    """One call of an op that the mutants are tried on."""

    case: sanitize.Case
    kernel: reuse.Forced | None
    limits: "Limits"
    expected: tuple[Tensor, ...]
    sites: dict[Site, bool]
    kernels: str  # the names of those that ran
    seconds: float


class Trial:
    """The ops on the host executor, and calls of them."""

    def __init__(self, executor: Executor, ops: object) -> None:
        self.executor, self.ops = executor, ops
        self.set(*SETTINGS[0])

    def set(self, schedule: str, copies: str) -> None:
        self.setting = schedule, copies

    def result(self, case: sanitize.Case, kernel: reuse.Forced | None, limits: Limits) -> tuple[Tensor, ...]:
        self.executor.set(*self.setting, shared_limit=limits.shared)
        self.executor.limit_grid(limits.blocks)
        if limits.has_counters:
            self.executor.library.nf4kernels_executor_forget_streams()
        else:
            self.executor.library.nf4kernels_executor_unknown_stream()
        with sanitize.forcing(self._force, kernel):
            result = getattr(self.ops, case.op)(*case.args)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def _force(self, *kernel):
        return native.running_kernel(self.executor.library, *kernel)

    def calls(self, cases: Iterable[sanitize.Case]) -> Iterator[Call]:
        """Of every case by every kernel that takes it, its results the reference's."""
        for case in cases:
            wanted = getattr(sanitize.reference, case.op)(*case.args)
            wanted = (wanted,) if isinstance(wanted, Tensor) else wanted
            for kernel, limits in itertools.product(case.kernels, limits_of(case)):
                self.executor.reset()
                start = time.perf_counter()
                try:
                    result = self.result(case, kernel, limits)
                except RuntimeError as error:
                    if sanitize.REFUSAL not in str(error):
                        raise
                    continue
                seconds = time.perf_counter() - start
                assert all(map(sanitize.is_close, result, wanted)), f"{case.op} {case.what} {kernel}: wrong"
                kernels = " ".join(launch.kernel for launch in self.executor.launches())
                yield Call(case, kernel, limits, result, self.executor.sites(), kernels, seconds)

    def verdict(self, mutant: "Mutant | Edit", calls: list[Call]) -> str | None:
        """What noticed the mutant in one of these calls, or None. In a process of its own, which may crash or hang."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            faulthandler.disable()  # pytest's would print the stacks
            code = 1
            try:
                os.write(writer, (self._verdict(mutant, calls) or "").encode())
                code = 0
            except BaseException as error:
                os.write(writer, repr(error).encode())
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            verdict = file.read().decode()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return f"ends by signal {os.WTERMSIG(status)}"
        assert status == 0, f"{mutant}: {verdict}"
        return verdict or None

    def _verdict(self, mutant: "Mutant | Edit", calls: list[Call]) -> str | None:
        if isinstance(mutant, Edit):
            if mutant.is_slow:
                return "bank conflicts" if any(self.has_more_conflicts(mutant, call) for call in calls) else None
            self.executor.library.nf4_executor_source_mutant(EDITS.index(mutant) + 1)
        else:
            self.executor.change(mutant.site, mutant.change)
        for setting in SETTINGS:
            self.set(*setting)
            for call in calls:
                signal.alarm(SECONDS)
                try:
                    result = self.result(call.case, call.kernel, call.limits)
                except RuntimeError as error:
                    return kind_of(str(error))
                if not all(map(same_bits, result, call.expected)):
                    return "wrong bits"
        return None

    def has_more_conflicts(self, edit: Edit, call: Call) -> bool:
        wavefronts = []
        for number in (0, EDITS.index(edit) + 1):
            self.executor.library.nf4_executor_source_mutant(number)
            wavefronts.append(self.wavefronts(call))
        return wavefronts[1] > wavefronts[0]

    def wavefronts(self, call: Call) -> int:
        """Of shared memory, in one call."""
        with self.executor.counting():
            self.result(call.case, call.kernel, call.limits)
        return sum(each.actual for each in self.executor.accesses() if each.kind.startswith("shared"))


KINDS = {
    "in flight": "unfinished copy",
    "without having waited": "unfinished copy",
    ": race: ": "race",
    ": divergent: ": "divergent",
    ": deadlock: ": "deadlock",
}


def kind_of(message: str) -> str:
    """What ended the launch, in two words."""
    return next((kind for text, kind in KINDS.items() if text in message), message)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


def mutants_of(calls: Iterable[Call]) -> list[Mutant]:
    sites: dict[Site, bool] = {}
    for call in calls:
        for site, before_copies in call.sites.items():
            sites[site] = sites.get(site, False) or before_copies
    return [
        Mutant(site, change)
        for site, before_copies in sorted(sites.items())
        for change in CHANGES[site.what] + (BEFORE_COPIES if before_copies else ())
    ]


def proof_of(mutant: Mutant | Edit) -> str | None:
    for (kernel, line, change), proof in EQUIVALENT.items():
        is_it = isinstance(mutant, Mutant) and (line, change) == (mutant.line, mutant.change)
        if is_it and re.fullmatch(kernel.replace("*", ".*"), mutant.kernel):
            return proof
    return None


CALLS_OF_AN_EQUIVALENT = 1  # is enough to see that its proof is not plainly wrong


def try_all(trial: Trial, calls: list[Call], mutants: Iterable[Mutant | Edit]) -> dict[Mutant | Edit, str]:
    """What noticed each mutant; "equivalent" or "SURVIVED" where nothing did."""
    verdicts: dict[Mutant | Edit, str] = {}
    for mutant in mutants:
        reaching = sorted((call for call in calls if mutant.is_in(call)), key=lambda call: call.seconds)
        proof = proof_of(mutant)
        noticed = trial.verdict(mutant, reaching[: CALLS_OF_AN_EQUIVALENT if proof else None])
        assert not (proof and noticed), f"{mutant} is not equivalent: {noticed}"
        verdicts[mutant] = noticed or ("equivalent" if proof else "SURVIVED")
    return verdicts


def unreached(calls: Iterable[Call], csrc: Path = build.CSRC) -> list[str]:
    """Calls in csrc/cuda that no case comes to, as "<file>:<line>"."""
    reached = {site.place for call in calls for site in call.sites}
    named = re.compile(rf"\b({'|'.join(CHANGES)})\s*(<[^;]*>)?\(")
    return [
        f"{path.name}:{number}"
        for path in sorted((csrc / "cuda").glob("*.cu*"))
        if path.name != "device.cuh"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if named.search(line.partition("//")[0]) and f"{path}:{number}" not in reached
    ]


def table(verdicts: dict[Mutant | Edit, str]) -> str:
    """A line for each kernel, call and change: what noticed how many instances of the kernel."""
    rows: dict[tuple[str, ...], Counter[str]] = {}
    for mutant, verdict in verdicts.items():
        what = (mutant.what, mutant.file) if isinstance(mutant, Edit) else (mutant.change, mutant.line, mutant.place)
        rows.setdefault((mutant.kernel, *what), Counter())[verdict] += 1
    return "\n".join(
        f"{kernel:36} {'  '.join(what):66} " + ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common())
        for (kernel, *what), counts in rows.items()
    )


def summary(verdicts: dict[Mutant | Edit, str]) -> str:
    counts = Counter(verdicts.values())
    return f"{len(verdicts)} mutants: " + ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common())


def main(kernels: str = "") -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    csrc = copy_with_edits(build.ROOT / "build" / "executor" / "mutants")
    executor = cuda_backend.load(races=True, csrc=csrc)
    trial = Trial(executor, getattr(torch.ops, cuda_backend.NAMESPACE))
    print(f"{time.perf_counter() - start:.0f} s: built", flush=True)
    tiles = {op: native.cuda_tiles(executor.library, op) for op in reuse.PIPELINED}
    executor.library.nf4kernels_executor_device(90, MULTIPROCESSORS)
    calls = list(trial.calls(sanitize.cases(tiles, MULTIPROCESSORS)))
    print(f"{time.perf_counter() - start:.0f} s: {len(calls)} calls without a mutant", flush=True)
    verdicts: dict[Mutant | Edit, str] = {}
    chosen = [mutant for mutant in [*mutants_of(calls), *EDITS] if re.search(kernels, mutant.kernel)]
    for _, of_kernel in itertools.groupby(chosen, key=lambda mutant: mutant.kernel):
        found = try_all(trial, calls, of_kernel)
        print(table(found), flush=True)
        verdicts |= found
    proofs = {f"equivalent: {m.kernel}: {m.change} {m.line} {proof}" for m in verdicts if (proof := proof_of(m))}
    gaps = [f"SURVIVED {mutant}" for mutant, verdict in verdicts.items() if verdict == "SURVIVED"]
    gaps += [f"NOT REACHED {place}" for place in unreached(calls, csrc)]
    print("\n".join([*sorted(proofs), *gaps, f"{time.perf_counter() - start:.0f} s: {summary(verdicts)}"]))
    return 1 if gaps else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
