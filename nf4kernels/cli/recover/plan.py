"""nf4kernels recover plan: which layer to store how, so that least is lost within so many bytes."""

import argparse
import sys
from typing import Any

from ..errors import check_cpu_computes, check_installed
from ..fields import take_recipe

VERB = "recover plan"
NEEDED = ("transformers", "yaml", "matplotlib", "optuna")


def add_parser(actions: Any) -> None:
    parser = actions.add_parser(
        "plan",
        help="which layer to store how, so that least is lost within so many bytes",
        usage="nf4kernels recover plan [--config RECIPE.yaml] --model DIR --text FILE (--bits N | --bytes N)"
        " --output PLAN.json [--FIELD VALUE]",
        description="Measures on --text what each layer of the dense model in DIR costs when it alone is rounded, and "
        "writes the plan with the least sum of that within --bits a weight of the layers, or --bytes of the whole"
        " model, and a picture of it. nf4kernels quantize --plan PLAN.json then writes such a model. The same command"
        " again goes on where it was stopped, and with another budget measures nothing twice.",
        epilog="Every FIELD may stand in a recipe, too, and a flag wins: --help-fields prints them. --drop lets whole"
        " blocks go, which is what there is below 4 bits; apply_plan in Python makes such a plan. --milliseconds N is a"
        " limit of time for a token's products on this device, and --trials N has an evolutionary search measure so"
        " many plans.",
        allow_abbrev=False,
    )
    take_recipe(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    check_cpu_computes(VERB)
    check_installed(VERB, NEEDED, "recover")
    from ...stages.recover.options import field_help, read_options
    from ...stages.recover.plan import ALIASES, PlanOptions, plan_directory

    if args.help_fields:
        print(field_help(PlanOptions, f"nf4kernels {VERB}", ALIASES))
        return 0
    options = read_options(PlanOptions, args.config, args.fields, ALIASES)
    try:
        done = plan_directory(options)
    except KeyboardInterrupt:
        print("\nthe same command goes on where it was", file=sys.stderr)
        raise
    print(f"{options.model} on {done.tokens} tokens of {options.text}; KL to the dense model, nats a token\n\n{done}\n")
    print("; ".join(f"{count} layers {name}" for name, count in done.plan.counts().items()))
    if not done.plan.is_plain:
        print("note: layers that are dropped or of low rank are made by nf4kernels.recover.apply_plan, in Python;"
              " nf4kernels quantize --plan refuses them")  # fmt: skip
    print(f"wrote {done.output} and {done.picture}")
    return 0
