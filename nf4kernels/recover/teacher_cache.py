"""What a teacher says, kept on disk: its likeliest classes of each row, found again by what it was asked."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..storage.atomic import replacing, write_json
from .batches import LABELS, Batch, counted, token_ids
from .losses import TopK
from .teacher import LiveTeacher, Teacher, as_teacher

NOTE = "teacher.json"
GIB = 2**30
DTYPES = (torch.float16, torch.float32)


class CachedTeacher:
    """A teacher that `cache_teacher` asked, read from its directory.

    An example is found by its own content, whatever batch it comes in and however that is padded. Hidden states are not
    kept. A loss with `k=None` gets the k that is kept, and so does one with a smaller k, whose rest is added up.

    Raises:
        ValueError: the directory has no teacher.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = directory = Path(directory)
        if not (directory / NOTE).is_file():
            raise ValueError(
                f"nf4kernels.recover.CachedTeacher: directory must have {NOTE}, got {os.fspath(directory)}"
            )
        self.note = json.loads((directory / NOTE).read_text(encoding="utf-8"))
        self.places: dict[str, tuple[Path, int, int]] = {}  # digest -> file, first row, rows
        for file in sorted(directory.glob("*.safetensors")):
            self._add(file)

    def _add(self, file: Path) -> None:
        with safe_open(str(file), "pt") as stored:
            start = 0
            for digest, rows in json.loads(stored.metadata()["examples"]):
                self.places[digest] = (file, start, rows)
                start += rows

    def __len__(self) -> int:
        """Of examples."""
        return len(self.places)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))

    def answer(self, batch: Batch, layers: Sequence[str] = ()) -> "CachedAnswer":
        """Raises ValueError where an example was not asked, or hidden states are wanted."""
        who = "nf4kernels.recover.CachedTeacher"
        if layers:
            raise ValueError(f"{who}: layers must be none, since hidden states are not kept, got {', '.join(layers)}")
        found = []
        for number, digest in enumerate(digests(batch)):
            if digest not in self.places:
                raise ValueError(
                    f"{who}: batch must be of examples that the teacher was asked, got another at {number}"
                )
            file, start, rows = self.places[digest]
            with safe_open(str(file), "pt") as stored:
                names = ("indices", "log_probs", "log_rest")
                found.append([stored.get_slice(name)[start : start + rows] for name in names])
        return CachedAnswer(TopK(*(torch.cat(each) for each in zip(*found))), self.note)

    def after_step(self) -> None:
        pass


class CachedAnswer:
    def __init__(self, stored: TopK, note: dict[str, object]) -> None:
        self.stored, self.note = stored, note
        self.hidden: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.stored.indices)

    def target(self, rows: Tensor, temperature: float, k: int | None) -> TopK:
        who, kept = "nf4kernels.recover.CachedTeacher", self.stored.indices.shape[1]
        if temperature != self.note["temperature"]:
            raise ValueError(f"{who}: temperature must be the stored {self.note['temperature']}, got {temperature}")
        if k is not None and k > kept and kept < self.note["classes"]:  # type: ignore[operator]  # a number
            raise ValueError(f"{who}: k must be at most the stored {kept}, got {k}")
        rows = rows.cpu()
        indices, log_probs, log_rest = (
            each[rows] for each in (self.stored.indices, self.stored.log_probs, self.stored.log_rest)
        )
        if k is None or k >= kept:
            return TopK(indices, log_probs, log_rest)
        left = torch.logaddexp(log_rest, log_probs[:, k:].float().logsumexp(-1))
        return TopK(indices[:, :k], log_probs[:, :k], left)


def cache_teacher(
    teacher: Teacher | nn.Module, batches: Sequence[Batch], directory: str | Path, *, k: int = 64,
    temperature: float = 1.0, dtype: torch.dtype = torch.float16, limit: int = 4 * GIB, identity: str | None = None,
    chunk: int = 256, progress: bool = False,
) -> CachedTeacher:  # fmt: skip
    """Ask the teacher every batch once, and keep its k likeliest classes of each row in `directory`.

    A file a batch, whole or not at all; a call that was stopped goes on, and examples that are there are not asked
    again. A row takes k * (4 + 2) + 4 bytes: log-probabilities in fp16 (of classes that matter, near 0, they are more
    precise there than logits), int32 classes and the fp32 logarithm of the rest.

    Args:
        limit: bytes. What all batches take is known after the first one, and refused where it is more.
        identity: of the teacher, in words or as a digest; None is a digest of the weights of a `LiveTeacher` or module.

    Raises:
        ValueError: the directory is of another teacher, k, temperature or dtype, or the limit is too low; or `identity`
            is None where it cannot be computed.
    """
    who = "nf4kernels.recover.cache_teacher"
    directory = Path(directory)
    if not len(batches):
        raise ValueError(f"{who}: batches must be one or more, got none")
    if k < 1 or dtype not in DTYPES:
        raise ValueError(f"{who}: k must be 1 or more, and dtype float16 or float32, got {k} and {dtype}")
    teacher = as_teacher(teacher)
    answer = teacher.answer(batches[0])
    first = answer.target(torch.zeros(1, dtype=torch.long), temperature, None)
    assert isinstance(first, Tensor)  # who is asked has all classes
    k = min(k, first.shape[-1])
    note = {
        "identity": _identity(teacher, who) if identity is None else identity, "k": k, "temperature": temperature,
        "dtype": str(dtype).removeprefix("torch."), "classes": first.shape[-1],
    }  # fmt: skip
    wanted = sum(_rows(batch, batches[0], len(answer)) for batch in batches) * (k * (4 + dtype.itemsize) + 4)
    if wanted > limit:
        raise ValueError(f"{who}: limit must be at least the {wanted} bytes of these batches at k={k}, got {limit}")
    _note(directory, note, who)
    cached = CachedTeacher(directory)
    for number, batch in enumerate(tqdm(batches, desc="teacher", unit="batch", disable=not progress)):
        names = digests(batch)
        if all(name in cached.places for name in names):
            continue
        answer = answer if number == 0 else teacher.answer(batch)
        counts = _counts(batch, len(answer))
        parts = [
            answer.target(rows, temperature, k) for rows in torch.arange(len(answer)).split(chunk) if len(rows)
        ]  # fmt: skip
        if any(part.log_probs.isnan().any() for part in parts):  # type: ignore[union-attr]  # of k
            raise ValueError(f"{who}: teacher must give finite logits, got NaN in batch {number}")
        made = {
            "indices": torch.cat([part.indices.int().cpu() for part in parts]),  # type: ignore[union-attr]  # of k
            "log_probs": torch.cat([part.log_probs.to(dtype).cpu() for part in parts]),  # type: ignore[union-attr]
            "log_rest": torch.cat([part.log_rest.float().cpu() for part in parts]),  # type: ignore[union-attr]
        }
        path = directory / f"{hashlib.sha256(''.join(names).encode()).hexdigest()[:32]}.safetensors"
        with replacing(path) as partial:
            save_file(made, partial, {"examples": json.dumps(list(zip(names, counts)))})
        cached._add(path)
    return cached


def _note(directory: Path, note: dict[str, object], who: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / NOTE).exists():
        write_json(directory / NOTE, note)
        return
    stored = json.loads((directory / NOTE).read_text(encoding="utf-8"))
    for name, value in note.items():
        if stored.get(name) != value:
            raise ValueError(f"{who}: directory must be of this teacher, got {os.fspath(directory)}, whose {name} is"
                             f" {stored.get(name)} where this one's is {value}")  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a model's state."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _identity(teacher: Teacher, who: str) -> str:
    if type(teacher) is not LiveTeacher:
        raise ValueError(f"{who}: identity must be given for a {type(teacher).__name__}, got none")
    if teacher.within is not nullcontext:
        raise ValueError(f"{who}: identity must be given for a LiveTeacher with `within`, which changes it, got none")
    parts = [f"{weight} {fingerprint(model)}" for weight, model in zip(teacher.weights, teacher.models)]
    return parts[0].partition(" ")[2] if len(parts) == 1 else hashlib.sha256(";".join(parts).encode()).hexdigest()


def digests(batch: Batch) -> list[str]:
    """SHA-256 of each example: of all that the model reads of it, without its padding and its label."""
    named = batch if isinstance(batch, Mapping) else dict(_numbered(batch))
    tensors = {name: each for name, each in sorted(named.items()) if isinstance(each, Tensor) and name != LABELS}
    ids, mask = token_ids(batch), tensors.pop("attention_mask", None)
    if mask is not None and (ids is None or mask.shape != ids.shape):
        tensors["attention_mask"], mask = mask, None
    found = []
    for row in range(len(next(iter(tensors.values())))):
        digest = hashlib.sha256()
        for name, each in tensors.items():
            own = each[row]
            if mask is not None and own.shape == mask[row].shape:
                own = own[mask[row].bool()]
            digest.update(f"{name} {own.dtype} {tuple(own.shape)};".encode())
            digest.update(_bytes(own))
        found.append(digest.hexdigest())
    return found


def _numbered(batch: Sequence[Tensor] | Tensor) -> Iterator[tuple[str, Tensor]]:
    for number, each in enumerate([batch] if isinstance(batch, Tensor) else batch):
        yield str(number), each


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _causal(batch: Batch) -> list[int] | None:
    """Rows of each example where the model predicts each next token; None where the batch has no token ids."""
    ids = token_ids(batch)
    if ids is None:
        return None
    kept = counted(torch.empty(*ids.shape, 0, device=ids.device), batch)
    return None if kept is None else kept.sum(1).tolist()


def _counts(batch: Batch, rows: int) -> list[int]:
    """Of each example, of a batch whose answer has so many."""
    causal, examples = _causal(batch), len(digests(batch))
    return causal if causal is not None and sum(causal) == rows else [rows // examples] * examples


def _rows(batch: Batch, first: Batch, rows: int) -> int:
    """Of a batch's answer, without asking, where the first batch's has `rows`."""
    causal, of_first = _causal(batch), _causal(first)
    if causal is not None and of_first is not None and sum(of_first) == rows:
        return sum(causal)
    return rows * len(digests(batch)) // len(digests(first))
