"""nf4kernels recover prune: fewer weights, by zeros or by heads, channels and layers that are cut out."""

import argparse
import sys
from typing import Any

from ..errors import check_cpu_computes, check_installed
from ..fields import take_recipe
from ..meta_model import meta_model

VERB = "recover prune"
NEEDED = ("transformers", "yaml")
ZEROS = (
    "note: zeros do not make a file smaller, nor a product faster: they are stored as any other weight. heads, channels"
    " and layers are what shrinks"
)


def add_parser(actions: Any) -> None:
    parser = actions.add_parser(
        "prune",
        help="zeros in a model's weights, or heads, channels and layers cut out of it",
        usage="nf4kernels recover prune [--config RECIPE.yaml] --model DIR --pattern PATTERN --method METHOD --share"
        " SHARE [--text FILE] --output_dir DIR [--FIELD VALUE]",
        description="Prune the dense model in DIR and write it to OUTPUT_DIR, in 16 bits or with --quantize in 4. "
        "--pattern unstructured and 2:4 put zeros in the weights with the smallest scores, which leaves the file as "
        "large as it was; heads, channels and layers are cut out, which shrinks it. --method magnitude, wanda or "
        "gradient says which, of layers magnitude, gradient, influence or kl; all but magnitude run the model on "
        "--text. --steps N --retrain M prunes in N steps along a cubic schedule and trains LoRA for M steps after "
        "each, towards the model as it was. The same command again goes on after the last of several steps.",
        epilog="Every FIELD may stand in a recipe, too, and a flag wins: --help-fields prints them.",
        allow_abbrev=False,
    )
    take_recipe(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    check_cpu_computes(VERB)
    check_installed(VERB, NEEDED, "finetune")
    from ...stages.recover.options import field_help, read_options
    from ...stages.recover.prune import ALIASES, PruneOptions, prune

    if args.help_fields:
        print(field_help(PruneOptions, f"nf4kernels {VERB}", ALIASES))
        return 0
    options = read_options(PruneOptions, args.config, args.fields, ALIASES)
    try:
        done = prune(options, meta_model)
    except KeyboardInterrupt:
        if options.steps > 1:
            print("\nthe same command goes on after the last step", file=sys.stderr)
        raise
    if done.left is None:
        print(f"{100 * (done.zeros or 0):.1f} % of the weights of the layers are zero, {options.pattern}")
        print(ZEROS)
    else:
        what = {"heads": "kv heads of each layer, with their query heads", "channels": "channels of each MLP"}
        print(f"{done.left} of {done.of} {what.get(options.pattern, 'layers')} are left")
    if done.measured is not None:
        found = done.measured
        print(f"in 16 bits on {found.rows} tokens of {options.held_out}: loss {found.loss:.4f}, KL to the model as it"
              f" was {found.kl:.4f} nats a token, top-1 {100 * found.top1:.1f} %")  # fmt: skip
    sizes = f"{done.bytes_after / 2**20:.1f} MiB of tensors' files, {done.bytes_before / 2**20:.1f} before"
    print(f"wrote {done.out}: {sizes}")
    return 0
