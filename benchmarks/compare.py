"""python -m benchmarks.compare BASE: this working tree against a git reference, round by round within one run.

BASE is built in a worktree of its own. Each version runs in a process that stays alive, and the two take turns case by
case. Exit status 1 says that something became slower.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nf4kernels.model.report import table

from .compare_worker import CASES, case_name
from .harness import ROOT, Spread, ratios, spread

WORKER = Path(__file__).with_name("compare_worker.py")
TOLERANCE = 1.05


def is_regression(now_over_then: Spread) -> bool:
    """Slower by more than 5 %, and slower in four of five rounds."""
    p20, median, _ = now_over_then
    return median > TOLERANCE and p20 > 1


@contextmanager
def built(base: str) -> Iterator[Path]:
    """A worktree of `base` with its library built in place, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="nf4kernels-base-") as directory:
        tree = Path(directory) / "tree"
        git("worktree", "add", "--detach", "--quiet", str(tree), base)
        try:
            # build_clib makes the static libraries that some versions link
            command = [sys.executable, "setup.py", "-q", "build_clib", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=tree, capture_output=True, encoding="utf-8", check=False)
            if done.returncode:
                raise SystemExit(f"building {base} failed:\n{done.stderr[-2000:]}")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Worker:
    """A process that times cases with the nf4kernels of `tree`."""

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            encoding="utf-8",
        )  # fmt: skip
        package, self.implementation, reason = self._answer().split("\t")
        if Path(package) != tree.resolve() / "nf4kernels":
            raise SystemExit(f"the worker for {tree} imported {package}")
        if not self.implementation.startswith("native"):
            raise SystemExit(f"{tree} has no compiled kernels: {reason}")

    def milliseconds(self, case: int) -> float:
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}; its message stands above")
        return line.strip()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("base", help="a git reference: main, HEAD~3, v0.1.0")
    parser.add_argument("--rounds", type=int, default=25, help="of every case (default: %(default)s)")
    args = parser.parse_args(arguments)
    with ExitStack() as stack:
        base = f"{args.base} ({git('rev-parse', '--short', args.base)})"
        tree = stack.enter_context(built(args.base))
        now, then = stack.enter_context(Worker(ROOT)), stack.enter_context(Worker(tree))
        print(f"this working tree ({now.implementation}) against {base} ({then.implementation}), {args.rounds} rounds")
        lines, slower = [], []
        for number, case in enumerate(CASES):
            times = [(), ()]
            for done in range(args.rounds + 1):
                order = (0, 1) if done % 2 else (1, 0)
                found = {side: (now, then)[side].milliseconds(number) for side in order}
                if done:  # the first round sets up
                    times = [(*own, found[side]) for side, own in enumerate(times)]
            ratio = ratios(times[0], times[1])
            verdict = "SLOWER" if is_regression(ratio) else ""
            slower += [case_name(case)] if verdict else []
            ms = [f"{spread(own)[1]:.3f}" for own in times]
            lines.append((case_name(case), *ms, f"{ratio[1]:.2f}", f"{ratio[0]:.2f}-{ratio[2]:.2f}", verdict))
    print(table([("case", "now, ms", "then, ms", "now/then", "p20-p80", ""), *lines], left=(0, 5)))
    print(f"slower by more than 5 %: {', '.join(slower)}" if slower else "nothing is slower by more than 5 %")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
