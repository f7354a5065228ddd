"""The releases of bitsandbytes that this package knows."""

import re

SUPPORTED = "bitsandbytes>=0.49,<0.51"
WHO = "nf4kernels.integrations.bitsandbytes"

try:
    import bitsandbytes
except ModuleNotFoundError as error:
    if error.name != "bitsandbytes":
        raise
    raise ModuleNotFoundError(f"{WHO}: bitsandbytes must be installed: pip install '{SUPPORTED}'") from None


def check_version(version: str) -> None:
    """ImportError for a release of bitsandbytes whose insides are not those that `patch` knows."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not (0, 49) <= numbers < (0, 51):
        raise ImportError(f"{WHO}: bitsandbytes must be 0.49 or 0.50, got {version}: pip install '{SUPPORTED}'")


check_version(bitsandbytes.__version__)
