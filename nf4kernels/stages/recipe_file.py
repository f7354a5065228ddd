"""The YAML file of a recipe: lines NAME: VALUE."""

from pathlib import Path
from typing import Any

import yaml

from .errors import StageError


def read_yaml(path: Path) -> dict[str, Any]:
    """What the file of --config holds.

    Raises:
        StageError: it cannot be read, or is no mapping from names.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(f"--config must be a YAML file, got {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"--config must be a YAML file, got {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise StageError(f"--config must be a file of lines NAME: VALUE, got {path}")
    return content
