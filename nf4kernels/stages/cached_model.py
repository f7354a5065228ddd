"""Models that are on this machine by their name on the Hub; nothing is downloaded."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The directory of huggingface_hub's cache that holds the model; None where there is none."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None
