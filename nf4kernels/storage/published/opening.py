"""Opening what others publish in 4 bits: a directory by its config.json, a GGUF file by its own metadata."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from ..atomic import TargetError
from ..tensor_files import TensorFiles, checkpoint_files
from .files import PublishedFiles, dtype_of, quantization_of
from .gguf_file import GgufFile
from .gguf_tensors import GgufTensors
from .layouts import gguf_layout, layout_of

GGUF = ".gguf"


def is_gguf(path: Path) -> bool:
    return path.suffix == GGUF and path.is_file()


@contextmanager
def open_published(
    path: Path, model: nn.Module | None, who: str, dtype: torch.dtype | None = None
) -> Iterator[PublishedFiles | None]:
    """What is at `path` by our names, or None for a checkpoint of our own, of bitsandbytes' or dense.

    `dtype` is that of dense weights, None what the config.json beside them says. ValueError where the layout is not
    read or a file is damaged.
    """
    fields = quantization_of(path) if path.is_dir() else None
    if fields is None and not is_gguf(path):
        yield None
        return
    try:
        with ExitStack() as stack:
            if fields is None:
                tensors = GgufTensors(GgufFile(path))
                published = PublishedFiles(tensors, gguf_layout(), model, dtype or dtype_of(path.parent))
            else:
                layout = layout_of(fields)
                files = stack.enter_context(TensorFiles(checkpoint_files(path, who), who))
                published = PublishedFiles(files, layout, model, dtype or dtype_of(path))
            yield published
    except TargetError:  # of what the caller writes
        raise
    except ValueError as error:
        text = str(error)
        text = text if text.startswith((who, str(path))) else f"{path}: {text}"
        raise ValueError(text if text.startswith(who) else f"{who}: {text}") from None
