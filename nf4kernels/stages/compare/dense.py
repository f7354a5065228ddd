"""The dense model of a comparison, and its weights as each variant has them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...functional import dequantize, quantize
from ...model.heads import SKIP
from ...model.plan import plan_layers, unmatched
from ...model.quantize import squared_error
from ...model.training import training_dtype
from ...model.walk import get_submodule
from ...nn.experts_layout import dense_weights
from ...quantized_weight import BLOCK_SIZES
from ..errors import StageError, first_line
from .variants import Variant


def open_device(device: torch.device | str | None) -> torch.device:
    """That device, or the GPU where there is one and None is asked for.

    Raises:
        StageError: it is not there.
    """
    try:
        opened = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=opened)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        raise StageError(f"--device must be one that is there, got {device}: {first_line(error)}") from None
    return opened


def load_dense(path: Path) -> tuple[Any, Any]:
    """The model, evaluating, in its stored dtype on the CPU, and its tokenizer.

    Raises:
        StageError: the directory is none of a causal language model, or one in 4 bits.
    """
    expected = "MODEL must be the directory of a causal language model with its tokenizer"
    if not (path / "config.json").is_file():
        raise StageError(f"{expected}, got {path} without config.json")
    try:
        quantization = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        if quantization:
            method = quantization.get("quant_method")
            raise StageError(f"MODEL must be dense, got one quantized by {method}: compare makes the variants itself")
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)
    except StageError:
        raise
    except Exception as error:  # what transformers raises about a directory has no common type
        first, *_ = str(error).strip().splitlines() or [""]
        raise StageError(f"{expected}, got {path}: {type(error).__name__}: {first}") from None


class DenseWeights:
    """The weights of `model` to quantize, in one copy; `put` sets a variant's Ŵ in their places, leaving a `with` them.

    Layers are those of `nf4kernels.quantize_model`; experts are quantized one by one, so that blocks may be longer
    than their rows. The model is left in `dtype`.

    Attributes:
        layers, weights: how many are to be quantized.

    Args:
        model: in float32, bfloat16 or float16.
        skip: layers to leave dense; they add to the package's own.
        dtype: of the dense parts and of Ŵ; None is bfloat16 where the device is fast in it, else float32, and float32
            for a float32 model.

    Raises:
        StageError: the model has no layer to quantize, or a pattern of `skip` matches none.
    """

    def __init__(self, model: nn.Module, skip: Iterable[str] = (), dtype: torch.dtype | None = None) -> None:
        skip = tuple(skip)
        for pattern in unmatched(model, skip):
            raise StageError(f"--skip must match a layer, got {pattern!r}")
        targets, _ = plan_layers(model, (*SKIP, *skip), BLOCK_SIZES[0])
        if not targets:
            raise StageError("MODEL must have a linear layer to quantize, got none")
        self._model, self._targets = model, targets
        self._dense = {name: tensor.detach().clone() for name, tensor in _matrices(model, targets)}
        self.layers, self.weights = len(self._dense), sum(tensor.numel() for tensor in self._dense.values())
        if dtype is None:
            first = next(iter(self._dense.values()))
            dtype = torch.float32 if first.dtype == torch.float32 else training_dtype(first.device)
        self._dtype = dtype
        model.to(dtype)

    def __enter__(self) -> "DenseWeights":
        return self

    @torch.no_grad()
    def __exit__(self, *raised: object) -> None:
        for name, matrix in _matrices(self._model, self._targets):
            matrix.copy_(self._dense[name])

    @torch.no_grad()
    def put(self, variant: Variant) -> tuple[float, float]:
        """(bits a weight, |Ŵ - W| / |W|) of all weights, each of which is now in the model as the variant has it.

        Raises:
            StageError: a weight is not finite.
        """
        nbytes, error, total = 0, 0.0, 0.0
        for name, matrix in _matrices(self._model, self._targets):
            try:
                qweight = quantize(self._dense[name], **variant.quantize_options())
            except ValueError as problem:
                text = str(problem).removeprefix("nf4kernels.quantize: ")
                raise StageError(f"MODEL: layer {name}: {text}") from None
            of_matrix, of_weight = squared_error(qweight, self._dense[name])
            nbytes, error, total = nbytes + qweight.nbytes, error + of_matrix, total + of_weight
            matrix.copy_(dequantize(qweight, self._dtype))
        return 8 * nbytes / self.weights, math.sqrt(error / total) if total else 0.0


def _matrices(model: nn.Module, targets: Iterable[Sequence[str]]) -> Iterator[tuple[str, Tensor]]:
    """(name, `[N, K]`) of every weight to quantize, of experts each matrix; views of the parameters."""
    for name, *_ in targets:
        module: Any = get_submodule(model, name)
        if isinstance(module, nn.Linear):
            yield name, module.weight
            continue
        for leaf, weight in dense_weights(module).items():
            for expert, matrix in enumerate(weight):
                yield f"{name}.{leaf}.{expert}", matrix
