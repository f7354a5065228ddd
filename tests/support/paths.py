"""Where the repository and its tests lie, and the environment for a python of a test's own."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def python_path(*folders: Path) -> dict[str, str]:
    """PYTHONPATH for a process that imports `support`, `executor`, `nf4kernels` and what lies in `folders`."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (*folders, TESTS, ROOT)))}
