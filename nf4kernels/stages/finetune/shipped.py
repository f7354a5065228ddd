"""The ready recipes that come with the package."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ...storage.atomic import replacing
from ..errors import StageError

SUFFIX = ".yaml"


@dataclass(frozen=True)
class Recipe:
    """A ready recipe: `about` is its first line, a comment in the file."""

    name: str
    about: str
    text: str


def recipes() -> list[Recipe]:
    found = []
    for file in sorted(files(__package__).joinpath("recipes").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(SUFFIX):
            text = file.read_text(encoding="utf-8")
            found.append(Recipe(file.name.removesuffix(SUFFIX), text.partition("\n")[0].lstrip("# "), text))
    return found


def copy_recipe(name: str, path: Path | None = None) -> Path:
    """Write the recipe `name` to `path`, which is NAME.yaml in the current directory where it is None; returns it.

    Raises:
        StageError: there is no such recipe, or `path` exists.
    """
    found = {recipe.name: recipe for recipe in recipes()}
    if name not in found:
        raise StageError(f"NAME must be one of {', '.join(found)}, got {name!r}")
    path = Path(name + SUFFIX) if path is None else path
    if path.exists():
        raise StageError(f"FILE must not exist yet, got {path}")
    if not path.parent.is_dir():
        raise StageError(f"FILE must be in a directory that exists, got {path}")
    with replacing(path) as partial:
        partial.write_text(found[name].text, encoding="utf-8")
    return path
