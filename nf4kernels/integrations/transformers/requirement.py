"""The oldest transformers that has what this package hooks into, checked before anything of it is imported."""

import re

OLDEST = "5.5.0"


def check_version(version: str | None) -> None:
    """ImportError, with what to install, where transformers is missing (None) or older than OLDEST."""
    numbers = [int(number) for number in re.findall(r"\d+", version or "0")[:3]]
    if numbers < [int(number) for number in OLDEST.split(".")]:
        came = "none is installed" if version is None else f"got {version}"
        raise ImportError(
            f"nf4kernels.integrations.transformers: transformers must be {OLDEST} or newer, {came};"
            f" pip install 'transformers>={OLDEST}'"
        )


try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    check_version(None)
else:
    check_version(transformers.__version__)
