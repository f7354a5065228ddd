"""nf4kernels recover distill: train LoRA adapters on weights in 4 bits to say what a teacher says."""

import argparse
import sys

from ..errors import check_cpu_computes, check_installed
from ..fields import take_recipe
from ..finetune import NEEDED


def add_parser(actions) -> None:
    parser = actions.add_parser(
        "distill",
        help="train LoRA adapters to say what the 16-bit model, or another teacher, says",
        usage="nf4kernels recover distill [--config RECIPE.yaml] --model DIR [--teacher DIR ...] [--data FILE ...] "
        "[--text FILE ...] [--samples N] --output_dir DIR [--FIELD VALUE]",
        description="Train LoRA adapters on the model in DIR with its weights in 4 bits so that its next-token "
        "probabilities are the teacher's: the same model in 16 bits, unless --teacher names others. No data of a task "
        "is needed: --text takes any text, and --samples lets the teacher write. The adapters, log.csv, loss.png, a "
        "model card and the recipe go to OUTPUT_DIR; the same command again goes on from the last checkpoint.",
        epilog="Every field of nf4kernels finetune is a FIELD here, too, in a recipe and as a flag, which wins. Those "
        "of the losses: --soft --temperature --top_k --hard --cosine --hint --contrastive --layers --answers_only; of "
        "the teacher: --teacher_weights --teacher_cache --cache_top_k --cache_gib; of the text: --text_tokens "
        "--sample_temperature.",
        allow_abbrev=False,
    )
    take_recipe(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    check_cpu_computes("recover distill")
    check_installed("recover distill", NEEDED, "finetune")
    from ...stages.finetune.recipe import field_help, read_recipe
    from ...stages.recover.distill import DistillOptions, distill_directory

    if args.help_fields:
        print(field_help(DistillOptions))
        return
    try:
        out = distill_directory(read_recipe(args.config, args.fields, DistillOptions, needs_data=False))
    except KeyboardInterrupt:
        print("\nthe same command goes on from the last checkpoint", file=sys.stderr)
        raise
    print(f"wrote {out}: adapters, log.csv, loss.png and README.md")
