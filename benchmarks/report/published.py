"""Which published format works where: runs the tests that show it, and prints a table of them.

    python -m benchmarks.report.published [PYTEST OPTIONS]

A cell is how many tests passed, of how many; a skipped test (a way that this machine lacks) is left out. Exit status 1
where one failed.
"""

import collections
import re
import sys
from collections.abc import Mapping

import pytest

CONTRACT, LAYOUTS = "tests/contract/test_formats.py", "tests/storage/test_published_layouts.py"
CHECKPOINTS, LOADED = "tests/storage/test_published_checkpoints.py", "tests/integrations/test_transformers_published.py"
BACKENDS = {
    "CPU": r"(avx512_bf16|avx512|avx2|neon_bf16|neon|scalar)\b",
    "CUDA (executor)": r"executor\b",
    "Triton (interpreter)": r"interpreter\b",
}
# Format -> what its tests of kernels are called, and those of its files.
FORMATS = {
    "MXFP4": ("bs32-mxfp4", r"mxfp4|gpt[-_]oss"),
    "NVFP4": ("bs16-nvfp4", r"nvfp4|modelopt"),
    "INT4": ("int4_symmetric-bf16", r"int4|gptq|auto_round"),
    "Q4_0": ("bs32-q4_0", r"ggml|gguf.*(llama|gemma3)\]"),
    "IQ4_NL": ("bs32-iq4_nl", r"ggml|gguf.*qwen3\]"),
}
BITS = {"MXFP4": 4 + 8 / 32, "NVFP4": 4 + 8 / 16, "INT4": 4 + 16 / 32, "Q4_0": 4 + 16 / 32, "IQ4_NL": 4 + 16 / 32}
KERNELS = {
    "decode, bit-equal": "test_dequantize_is_the_reference",
    "forward": "TestLinear::test_within",
    "dgrad": "TestLinearDgrad::test_within",
    "LoRA": "test_with_a_lora_term",
    "experts, forward": "TestGroupedLinear::",
    "experts, dgrad": "TestGroupedLinearDgrad::",
}
FILES = {
    "bit-equal to its own reference": rf"{LAYOUTS}::",
    "load_checkpoint": rf"{CHECKPOINTS}::.*(llama_in_every|experts_are_fused|own_whole)|test_a_gguf_file",
    "from_pretrained": rf"{LOADED}::.*(losslessly|gguf_file)",
    "converted": rf"{CHECKPOINTS}::.*convert|test_a_gguf_file",
}


class Outcomes:
    """A pytest plugin: the outcome of every test, by its name."""

    def __init__(self) -> None:
        self.by_name: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.by_name[report.nodeid] = report.outcome


def cell(outcomes: Mapping[str, str], *patterns: str) -> str:
    found = [outcome for name, outcome in outcomes.items() if all(re.search(pattern, name) for pattern in patterns)]
    counts = collections.Counter(found)
    ran = counts["passed"] + counts["failed"]
    return f"{counts['passed']} of {ran}" if ran else "-"


def table(outcomes: Mapping[str, str]) -> str:
    lines = [f"| format | backend | {' | '.join(KERNELS)} |", f"|{' --- |' * (2 + len(KERNELS))}"]
    for name, (layout, _) in FORMATS.items():
        for backend, ways in BACKENDS.items():
            cells = [cell(outcomes, re.escape(test), rf"\[{ways}", layout) for test in KERNELS.values()]
            lines.append(f"| {name} | {backend} | {' | '.join(cells)} |")
    lines += ["", f"| format | bits a weight | {' | '.join(FILES)} |", f"|{' --- |' * (2 + len(FILES))}"]
    for name, (_, files) in FORMATS.items():
        cells = [cell(outcomes, test, files) for test in FILES.values()]
        lines.append(f"| {name} | {BITS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    outcomes = Outcomes()
    where = [CONTRACT, LAYOUTS, CHECKPOINTS, LOADED]
    status = pytest.main(["-q", "--no-header", *where, *sys.argv[1:]], plugins=[outcomes])
    print(f"\n{table(outcomes.by_name)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
