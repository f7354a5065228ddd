"""Whether the library that an integration is for is installed in a release that it knows, asked before its import."""

import re
from importlib.metadata import PackageNotFoundError, version

# package -> (the oldest release that the integration works with, the first that it does not know)
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "transformers": ("5.5.0", None),
    "peft": ("0.18.1", None),
    "bitsandbytes": ("0.49.0", "0.51.0"),
}


def require(package: str) -> None:
    """ImportError, with what to install, where `package` is missing or outside of SUPPORTED."""
    oldest, unknown = SUPPORTED[package]
    try:
        found = version(package)
    except PackageNotFoundError:
        found = None
    if found is not None and _numbers(oldest) <= _numbers(found) < _numbers(unknown or "9999"):
        return
    wanted = f"{package}>={oldest}" + (f",<{unknown}" if unknown else "")
    raise ImportError(
        f"nf4kernels.integrations.{package}: {wanted} must be installed, got {found or 'none'}: pip install '{wanted}'"
    )


def _numbers(release: str) -> list[int]:
    """[5, 24, 0] of "5.24.0.dev0"."""
    return [int(number) for number in re.findall(r"\d+", release)[:3]]
