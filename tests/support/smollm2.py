"""SmolLM2-135M-Instruct, in the directory where the demo keeps it."""

from pathlib import Path

import pytest
from support.paths import ROOT

from nf4kernels.demo.smollm2 import FetchError, fetch


def directory() -> Path:
    """Skips the test, by name, where it can neither be found nor fetched."""
    try:
        return fetch(ROOT / ".cache")
    except FetchError as error:
        pytest.skip(f"needs SmolLM2-135M: {error}")
