"""What 4-bit data types cost a model on a text: loss, KL to the dense model and top-1 agreement, a variant a row."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..codebook import DOUBLE_QUANT_CODEBOOKS, FORMATS
from ..functional import dequantize, quantize
from ..model.heads import SKIP
from ..model.plan import plan_layers, unmatched
from ..model.quantize import squared_error
from ..model.report import table
from ..model.training import training_dtype
from ..model.walk import get_submodule
from ..nn.experts_layout import dense_weights
from ..quantized_weight import BLOCK_SIZES
from .errors import StageError

CODEBOOKS = ("nf4", "fp4", "int4", "af4", "mxfp4", "nvfp4")
SCALES = (*DOUBLE_QUANT_CODEBOOKS, "float32")  # double quantization by that codebook, or none
BATCH_TOKENS = 1024
CHUNK = 256  # tokens whose log-probabilities are in fp32 at a time
LONGEST_TOKEN = 64  # characters: so many times the tokens wanted, and no more of a text is tokenized


@dataclass(frozen=True)
class Variant:
    """One way to store the weights; `scales` is one of SCALES, or the own kind of a format that fixes it."""

    codebook: str
    block_size: int
    scales: str

    def quantize_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"codebook": self.codebook, "block_size": self.block_size}
        if self.codebook not in FORMATS:
            double = self.scales in DOUBLE_QUANT_CODEBOOKS
            options |= {"double_quant": double} | ({"scale_codebook": self.scales} if double else {})
        return options


@dataclass(frozen=True)
class Row:
    """What came of one variant.

    Attributes:
        bits: bits a quantized weight, scales and codebooks included.
        rms_error: |Ŵ - W| / |W| over all quantized weights together.
        loss: nats a token on the text.
        kl: KL(dense || variant), nats a token.
        top1: the share of tokens, 0 to 1, for which both models find the same token likeliest.
        seconds: that quantizing and evaluating took.
    """

    variant: Variant
    bits: float
    rms_error: float
    loss: float
    kl: float
    top1: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    tokens: how many tokens were predicted.
    layers, weights: how many were quantized in each variant.
    dense_loss: of the model as it is stored, nats a token.
    rows: in the order of the variants.
    """

    tokens: int
    layers: int
    weights: int
    dense_loss: float
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [vars(row.variant) | {k: v for k, v in vars(row).items() if k != "variant"} for row in self.rows]
        return {name: value for name, value in vars(self).items() if name != "rows"} | {"variants": rows}

    def __str__(self) -> str:
        rows: list[tuple[str, ...] | None] = [
            ("codebook", "block", "scales", "bits/weight", "RMS error", "loss", "over dense", "KL", "top-1")
        ]
        rows.append(("dense", "", "", "", "", f"{self.dense_loss:.4f}", "", "", ""))
        for row in self.rows:
            its = row.variant
            rows.append((
                its.codebook, str(its.block_size), its.scales, f"{row.bits:.3f}", f"{row.rms_error:.4f}",
                f"{row.loss:.4f}", f"{row.loss - self.dense_loss:+.4f}", f"{row.kl:.5f}", f"{100 * row.top1:.2f} %",
            ))  # fmt: skip
        return table(rows, left=(0, 2))


def variants(codebooks: Iterable[str], block_sizes: Iterable[int], scales: Iterable[str]) -> list[Variant]:
    """Every combination; a codebook whose format fixes block size and scales comes once.

    Raises:
        StageError: a name or a size is none of CODEBOOKS, BLOCK_SIZES and SCALES.
    """
    block_sizes, scales = list(block_sizes), list(scales)
    for given, known, what in ((block_sizes, BLOCK_SIZES, "--block-sizes"), (scales, SCALES, "--scales")):
        for value in given:
            if value not in known:
                raise StageError(f"{what} must be of {', '.join(map(str, known))}, got {value}")
    found = []
    for codebook in codebooks:
        if codebook not in CODEBOOKS:
            raise StageError(f"--codebooks must be of {', '.join(CODEBOOKS)}, got {codebook}")
        if codebook in FORMATS:
            own = FORMATS[codebook]
            found.append(Variant(codebook, own.block_size or 64, own.scale_codebook or own.scales[0]))
        else:
            found += [Variant(codebook, size, scale) for size in block_sizes for scale in scales]
    return list(dict.fromkeys(found))


def read_documents(path: Path, most: int) -> Iterator[str]:
    """The documents of a text file: all of a .txt, or the `text` of each line of a .jsonl; about `most` characters.

    Raises:
        StageError: the file is missing, empty or not UTF-8, or a line is not an object with `text` (its number is
            named).
    """
    lines = path.suffix in (".jsonl", ".json")
    try:
        with path.open(encoding="utf-8-sig") as file:
            if not lines:
                text = file.read(most)
                if not text.strip():
                    raise StageError(f"{path} must hold text, got an empty file")
                yield text
                return
            read = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                yield _text_of(line, f"{path} line {number}")
                read += len(line)
                if read >= most:
                    return
            if not read:
                raise StageError(f"{path} must hold text, got an empty file")
    except UnicodeDecodeError as error:
        raise StageError(f"{path} must be UTF-8, got {error}") from None
    except OSError as error:
        raise StageError(f"--text must be a file that can be read, got {error}") from None


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise StageError(f"{where}: must hold JSON, got {error}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        came = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise StageError(f'{where}: must be an object with a string "text", got {came}')
    return text


def windows(documents: Iterable[str], tokenizer: Any, length: int, tokens: int) -> list[list[int]]:
    """Token ids, cut into windows of at most `length`, until `tokens` of them are to be predicted.

    A document begins with what the tokenizer begins a text with. The first token of each window is context alone, so
    that a window of n tokens has n - 1 to predict; windows of one token are left out. Too few tokens are all of them.
    """
    found: list[list[int]] = []
    left = tokens
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        for start in range(0, len(ids), length):
            window = ids[start : start + length][: left + 1]
            if len(window) >= 2:
                found.append(window)
                left -= len(window) - 1
            if left <= 0:
                return found
    return found


@dataclass(frozen=True)
class Batch:
    """ids, mask: `[B, T]`, padded on the right; `mask` is 1 on tokens of the text.

    predicts: bool `[B, T-1]`, the positions whose next token is to be predicted.
    """

    ids: Tensor
    mask: Tensor
    predicts: Tensor


def batches_of(
    rows: Sequence[list[int]], device: torch.device, has_loss: Sequence[Sequence[bool]] | None = None
) -> list[Batch]:
    """Every window once, those of similar length together, at most BATCH_TOKENS a batch or one window.

    `has_loss` says of each token whether it is to be predicted; None is all of them.
    """
    groups: list[list[tuple[list[int], Sequence[bool]]]] = []
    pairs = zip(rows, [[True] * len(row) for row in rows] if has_loss is None else has_loss)
    for pair in sorted(pairs, key=lambda pair: len(pair[0])):
        if not groups or (len(groups[-1]) + 1) * len(pair[0]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(pair)
    return [_collated(group, device) for group in groups]


def _collated(rows: list[tuple[list[int], Sequence[bool]]], device: torch.device) -> Batch:
    width = max(len(row) for row, _ in rows)
    ids, mask, predicts = torch.zeros(3, len(rows), width, dtype=torch.long)
    for i, (row, has_loss) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        predicts[i, : len(row)] = torch.tensor(has_loss)
    return Batch(ids.to(device), mask.to(device), predicts[:, 1:].bool().to(device))


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Nats a token to predict, over all batches together; NaN where there is none."""
    tokens = sum(int(batch.predicts.sum()) for batch in batches)
    return sum(_losses(_logits(model, batch), _next(batch)) for batch in batches) / tokens if tokens else math.nan


def compare_directory(
    path: str | Path,
    text: str | Path,
    compared: Sequence[Variant],
    tokens: int = 2048,
    length: int = 512,
    skip: Iterable[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Comparison:
    """`compare_model` of the dense model in `path` on the first `tokens` tokens of a text file.

    Args:
        path: a Hugging Face directory of a causal language model, not quantized.
        text: a .txt file, one document, or a .jsonl of objects with `text`, a document a line.
        compared: as `variants` makes them.
        tokens: how many to predict, at most. The dense model's logits for all of them are kept.
        length: of a window, in tokens.
        skip: layers to leave dense, as in `nf4kernels.quantize_model`; they add to its own.
        device: None is the GPU where there is one.
        progress: show a progress bar on stderr.

    Raises:
        StageError: an argument, the model or the text is not as it must be.
    """
    path, text = Path(path), Path(text)
    if tokens < 1 or length < 2:
        raise StageError(f"--tokens and --length must be at least 1 and 2, got {tokens} and {length}")
    documents = list(read_documents(text, tokens * LONGEST_TOKEN))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails an assertion
        raise StageError(f"--device must be one that is there, got {device}: {str(error).splitlines()[0]}") from None
    model, tokenizer = _loaded(path)
    rows = windows(documents, tokenizer, length, tokens)
    if not rows:
        raise StageError(f"{text} must hold at least two tokens, got fewer")
    return compare_model(model.to(device), batches_of(rows, device), compared, skip, progress=progress)


def _loaded(path: Path) -> tuple[Any, Any]:
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


@torch.no_grad()
def compare_model(
    model: nn.Module,
    batches: Sequence[Batch],
    compared: Sequence[Variant],
    skip: Iterable[str] = (),
    compute_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Comparison:
    """Loss, KL and agreement of each variant, whose weights Ŵ take the places of the dense ones in turn.

    The dense model's logits are computed once and kept, `[tokens, vocabulary]` in `compute_dtype`; of the dense
    weights to quantize there is one copy. Layers are those of `nf4kernels.quantize_model`; experts are quantized one
    by one, so that blocks may be longer than their rows. The model is left in `compute_dtype` with its dense weights.

    Args:
        model: whose call gives `.logits` `[B, T, vocabulary]`, evaluating, in float32, bfloat16 or float16.
        batches: on the model's device.
        compared: as `variants` makes them.
        skip: layers to leave dense.
        compute_dtype: of the dense parts and of Ŵ; None is bfloat16 where the device is fast in it, else float32, and
            float32 for a float32 model.
        progress: show a progress bar on stderr.

    Raises:
        StageError: the model has no layer to quantize, a weight is not finite, or the dense model's loss is not.
    """
    skip = tuple(skip)
    for pattern in unmatched(model, skip):
        raise StageError(f"--skip must match a layer, got {pattern!r}")
    targets, _ = plan_layers(model, (*SKIP, *skip), BLOCK_SIZES[0])
    if not targets:
        raise StageError("MODEL must have a linear layer to quantize, got none")
    dense = {name: tensor.detach().clone() for name, tensor in _matrices(model, targets)}
    weights = sum(tensor.numel() for tensor in dense.values())
    if compute_dtype is None:
        first = next(iter(dense.values()))
        compute_dtype = torch.float32 if first.dtype == torch.float32 else training_dtype(first.device)
    model.to(compute_dtype)
    tokens = sum(int(batch.predicts.sum()) for batch in batches)
    references = [_logits(model, batch) for batch in batches]
    dense_loss = sum(_losses(logits, _next(batch)) for logits, batch in zip(references, batches)) / tokens
    if not math.isfinite(dense_loss):
        raise StageError(f"MODEL must have a finite loss on the text, got {dense_loss}")
    rows = []
    with _restored(model, targets, dense):
        for variant in tqdm(compared, desc="compare", unit="variant", disable=not progress):
            began = time.perf_counter()
            nbytes, rms_error = _put(model, targets, dense, variant, compute_dtype)
            loss = kl = agree = 0.0
            for batch, reference in zip(batches, references):
                logits = _logits(model, batch)
                loss += _losses(logits, _next(batch))
                kl += _divergences(reference, logits)
                agree += int((reference.argmax(-1) == logits.argmax(-1)).sum())
            measured = (loss / tokens, kl / tokens, agree / tokens)
            rows.append(Row(variant, 8 * nbytes / weights, rms_error, *measured, time.perf_counter() - began))
    return Comparison(tokens, len(dense), weights, dense_loss, rows)


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


@contextmanager
def _restored(model: nn.Module, targets: Sequence[Sequence[str]], dense: dict[str, Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        for name, matrix in _matrices(model, targets):
            matrix.copy_(dense[name])


def _put(
    model: nn.Module, targets: Sequence[Sequence[str]], dense: dict[str, Tensor], variant: Variant, dtype: torch.dtype
) -> tuple[int, float]:
    """(bytes, |Ŵ - W| / |W|) of all weights, each of which is now in the model as the variant has it."""
    nbytes, error, total = 0, 0.0, 0.0
    for name, matrix in _matrices(model, targets):
        try:
            qweight = quantize(dense[name], **variant.quantize_options())
        except ValueError as problem:
            text = str(problem).removeprefix("nf4kernels.quantize: ")
            raise StageError(f"MODEL: layer {name}: {text}") from None
        of_matrix, of_weight = squared_error(qweight, dense[name])
        nbytes, error, total = nbytes + qweight.nbytes, error + of_matrix, total + of_weight
        matrix.copy_(dequantize(qweight, dtype))
    return nbytes, math.sqrt(error / total) if total else 0.0


def _logits(model: Any, batch: Batch) -> Tensor:
    """`[tokens to predict, vocabulary]`."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return logits[:, :-1][batch.predicts]


def _next(batch: Batch) -> Tensor:
    return batch.ids[:, 1:][batch.predicts]


def _losses(logits: Tensor, targets: Tensor) -> float:
    """The sum of -log p(target) over tokens: log-softmax in fp32, sums in fp64."""
    total = 0.0
    for part, target in zip(logits.split(CHUNK), targets.split(CHUNK)):
        chosen = part.float().log_softmax(-1).gather(1, target[:, None])
        total -= chosen.double().sum().item()
    return total


def _divergences(reference: Tensor, logits: Tensor) -> float:
    """The sum of KL(reference || logits) over tokens: log-softmax in fp32, sums over tokens in fp64."""
    total = 0.0
    for left, right in zip(reference.split(CHUNK), logits.split(CHUNK)):
        p, q = left.float().log_softmax(-1), right.float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum(-1).double().sum().item()
    return total
