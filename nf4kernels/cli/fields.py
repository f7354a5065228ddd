"""Flags that a verb hands on: the fields of a recipe, hundreds of them, which the stage knows."""

import argparse
from pathlib import Path
from typing import Any


def keep_other_flags(parser: argparse.ArgumentParser) -> None:
    """Leave what `parser` does not know in `fields` of its result, in order, where it would be an error."""
    parse: Any = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, found.fields = parse(args, namespace)
        return found, []

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def take_recipe(parser: argparse.ArgumentParser) -> None:
    """--config and --help-fields, and every other flag as a field of the recipe."""
    parser.add_argument("--config", metavar="RECIPE.yaml", type=Path, help="lines FIELD: VALUE")
    parser.add_argument("--help-fields", action="store_true", help="print every FIELD with what it does")
    keep_other_flags(parser)
