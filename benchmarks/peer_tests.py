"""Another project's own tests, run as they are and with our kernels under them: how many passed, and which differ.

    python -m benchmarks.peer_tests bitsandbytes DIR          # DIR holds the tests/ of its release
    python -m benchmarks.peer_tests bitsandbytes DIR -k 'test_ops'
    python -m benchmarks.peer_tests peft DIR                  # its tests of LoRA on custom models

DIR is a checkout of the other project, of which nothing is in this repository. Each way runs in a process of its own,
at low priority. It ends with 1 where a test that passed without us does not pass with us.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

OUTCOMES = ("passed", "failed", "skipped", "xfailed")
Outcomes = dict[str, str]  # test -> one of OUTCOMES


@dataclass(frozen=True)
class Peer:
    """Whose tests: `files` under DIR, those that `keyword` chooses.

    Attributes:
        prelude, ours: Python that runs first, and options of pytest, which bring in our code.
        options: of pytest, on both sides.
    """

    files: tuple[str, ...]
    keyword: str
    prelude: str = ""
    ours: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


PEERS = {
    "bitsandbytes": Peer(
        files=tuple(f"tests/test_{name}.py" for name in ("functional", "linear4bit", "ops", "autograd", "parametrize")),
        keyword="(4bit or nf4 or fp4 or test_parametrize) and not bench",
        prelude="from nf4kernels.integrations.bitsandbytes import patch; patch()",
        environment={"BNB_TEST_DEVICE": "cpu"},
    ),
    "peft": Peer(
        files=("tests/test_custom_models.py",),
        keyword="test_",
        options=("-o", "addopts=", "-p", "benchmarks.peer_peft"),
        ours=("--layers", "ours"),
        environment={"HF_HUB_OFFLINE": "1"},  # what needs a download fails on both sides, at once
    ),
}


def run(peer: Peer, directory: Path, with_ours: bool, keyword: str | None) -> Outcomes:
    """The outcome of every test that was collected; RuntimeError where pytest itself failed."""
    chosen = peer.keyword if keyword is None else f"({peer.keyword}) and ({keyword})"
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}", "-k", chosen]
        options += [*peer.options, *(peer.ours if with_ours else ())]
        prelude = f"{peer.prelude}; " if with_ours and peer.prelude else ""
        code = f"import os, sys; os.nice(10); {prelude}import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", code, *options, *peer.files]
        process = subprocess.run(
            command, cwd=directory, env=os.environ | peer.environment | {"PYTHONPATH": path}, check=False
        )
        if process.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {process.returncode} in {directory}")
        return read_outcomes(report)


def read_outcomes(report: Path) -> Outcomes:
    """Of a JUnit report."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        elif skipped is not None:
            outcome = "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"
        else:
            outcome = "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def table(name: str, ways: dict[str, Outcomes]) -> str:
    """Counts by file, a row for each way."""
    lines = [f"| {name}'s tests | with | ran | {' | '.join(OUTCOMES)} |", "| --- " * (3 + len(OUTCOMES)) + "|"]
    files = sorted({test.split("::")[0].split(".")[1] for way in ways.values() for test in way})
    for file in [*files, ""]:
        for way, outcomes in ways.items():
            own = [
                outcome for test, outcome in outcomes.items() if not file or test.split("::")[0].split(".")[1] == file
            ]
            counts = collections.Counter(own)
            cells = [file or "all", way, len(own), *(counts[outcome] for outcome in OUTCOMES)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_tests", description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("directory", type=Path, help="a checkout of the peer's release")
    parser.add_argument("-k", dest="keyword", help="a further pytest expression")
    arguments = parser.parse_args()
    peer = PEERS[arguments.peer]
    theirs = run(peer, arguments.directory, False, arguments.keyword)
    ours = run(peer, arguments.directory, True, arguments.keyword)
    print(table(arguments.peer, {arguments.peer: theirs, "nf4kernels": ours}))
    worse = [test for test, outcome in theirs.items() if outcome == "passed" and ours.get(test) != "passed"]
    better = [test for test, outcome in ours.items() if outcome == "passed" and theirs.get(test) != "passed"]
    print(*(f"no longer passes: {test}" for test in worse), *(f"passes now: {test}" for test in better), sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
