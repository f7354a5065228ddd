"""nf4kernels recipes: the ready recipes for nf4kernels finetune, listed and copied."""

import argparse
from pathlib import Path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "recipes",
        help="ready recipes for finetune",
        description="List the ready recipes, or copy one to a file to change and to give to nf4kernels finetune "
        "--config.",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action")
    copy = actions.add_parser("copy", help="write a recipe to a file", description="Write the recipe NAME to FILE.")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("file", metavar="FILE", type=Path, nargs="?", help="default NAME.yaml here")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    from ..stages.finetune.shipped import copy_recipe, recipes

    if args.action == "copy":
        path = copy_recipe(args.name, args.file)
        print(f"wrote {path}; next: nf4kernels finetune --config {path} --data FILE --output_dir DIR")
        return
    found = recipes()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:{width}}  {recipe.about}")
    print("\nnf4kernels recipes copy NAME writes one to NAME.yaml")
