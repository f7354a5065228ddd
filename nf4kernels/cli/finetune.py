"""nf4kernels finetune: train LoRA adapters on a model's weights in 4 bits."""

import argparse
import sys

from ..stages.errors import StageError
from .errors import check_cpu_computes, check_installed
from .fields import take_recipe

NEEDED = ("transformers", "peft", "accelerate", "trl", "datasets", "matplotlib", "yaml")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="train LoRA adapters on a model's weights in 4 bits",
        usage="nf4kernels finetune [--config RECIPE.yaml] --model DIR --data FILE ... --output_dir DIR [--FIELD VALUE]",
        description="Train LoRA adapters on the model in DIR with its weights in 4 bits, on files of examples, and "
        "write them to OUTPUT_DIR with log.csv, loss.png, a model card and the recipe. The same command again goes on "
        "from the last checkpoint.",
        epilog="Every field of TRL's SFTConfig and ModelConfig and of PEFT's LoraConfig is a FIELD, in a recipe and as "
        "a flag, which wins: --learning_rate 2e-4 --num_train_epochs 3 --max_length 1024 --packing true --lora_r 16 "
        "--save_steps 100. Ours are --data, --weights, --held_out, --split_seed, --codebook, --block_size, "
        "--double_quant, --scale_codebook, --skip, --plan and --adapter. --attn sdpa is short for "
        "--attn_implementation. On several GPUs: torchrun --nproc-per-node N -m nf4kernels finetune ..., "
        "each with the whole model, or with --fsdp or --deepspeed zero2 (zero3, or a file of DeepSpeed's), which share "
        "it. nf4kernels recipes lists ready recipes.",
        allow_abbrev=False,
    )
    take_recipe(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    check_cpu_computes("finetune")
    check_installed("finetune", NEEDED, "finetune")
    from ..stages.finetune.processes import is_main, tell_launcher
    from ..stages.finetune.recipe import field_help, read_recipe
    from ..stages.finetune.run import finetune

    if args.help_fields:
        print(field_help())
        return 0
    try:
        out = finetune(read_recipe(args.config, args.fields))
    except KeyboardInterrupt:
        print("\nthe same command goes on from the last checkpoint", file=sys.stderr)
        raise
    except StageError as error:
        tell_launcher(error)
        if is_main():
            raise
        return 2  # of several processes one says what is wrong; torchrun's report has the others' sentences
    if is_main():
        print(f"wrote {out}: adapters, log.csv, loss.png and README.md")
    return 0
