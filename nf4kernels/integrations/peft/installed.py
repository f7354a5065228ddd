"""Whether PEFT is there, and new enough."""

from importlib.metadata import PackageNotFoundError, version

OLDEST = (0, 18, 1)


def check_installed() -> None:
    """ImportError that says what to install."""
    try:
        found = version("peft")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(
            f"nf4kernels.integrations.peft: PEFT must be {needed} or newer (pip install 'peft>={needed}'), got {found}"
        )


check_installed()
