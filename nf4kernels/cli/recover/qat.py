"""nf4kernels recover qat: train a model through its rounding to 4 bits, and write it in 4 bits."""

import argparse
import sys
from functools import partial

from ..errors import check_cpu_computes, check_installed
from ..fields import take_recipe
from ..meta_model import meta_model

NEEDED = ("transformers", "peft", "accelerate", "trl", "datasets", "matplotlib", "yaml")
VERB = "recover qat"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "qat",
        help="train a model through its rounding to 4 bits",
        usage="nf4kernels recover qat [--config RECIPE.yaml] --model DIR --data FILE ... --output_dir DIR"
        " [--train full|lora] [--FIELD VALUE]",
        description="Train the dense model in DIR on files of examples with its weights rounded to 4 bits in every "
        "step, and write it in 4 bits to OUTPUT_DIR/model, as nf4kernels quantize does, beside log.csv, loss.png, a "
        "model card and the recipe. --train full trains all weights, --train lora adapters that are merged before "
        "each rounding. The same command again goes on from the last checkpoint.",
        epilog="Every FIELD of nf4kernels finetune is one here, in a recipe and as a flag, which wins; --clip is "
        "another. --lora_r and --lora_alpha are of --train lora; the codebook is nf4 or fp4.",
        allow_abbrev=False,
    )
    take_recipe(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes(VERB)
    check_installed(VERB, NEEDED, "finetune")
    from ...stages.finetune.recipe import field_help, read_recipe
    from ...stages.recover.qat import MODEL, QatOptions, qat

    if args.help_fields:
        print(field_help(QatOptions))
        return
    try:
        out = qat(read_recipe(args.config, args.fields, QatOptions), partial(meta_model, verb=VERB))
    except KeyboardInterrupt:
        print("\nthe same command goes on from the last checkpoint", file=sys.stderr)
        raise
    print(f"wrote {out / MODEL}: the model in 4 bits; and log.csv, loss.png and README.md in {out}")
