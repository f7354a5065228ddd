"""Opening what others publish in 4 bits: a directory by its config.json, a GGUF file by its own metadata."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from ..names import listed
from ..tensor_files import TensorFiles, checkpoint_files
from .files import PublishedFiles, dtype_of, quantization_of
from .gguf_file import GgufFile
from .gguf_tensors import GgufTensors
from .layouts import gguf_layout, layout_of

GGUF = ".gguf"


@contextmanager
def open_published(path: Path, model: nn.Module | None, who: str) -> Iterator[PublishedFiles | None]:
    """What is at `path` by our names, or None for a checkpoint of our own, of bitsandbytes' or dense.

    Warns of scales of activations, which are left out. ValueError where the layout is not read or a file is damaged.
    """
    fields = quantization_of(path) if path.is_dir() else None
    if fields is None and not (path.suffix == GGUF and path.is_file()):
        yield None
        return
    try:
        with ExitStack() as stack:
            if fields is None:
                tensors = GgufTensors(GgufFile(path), dtype_of(path.parent))
                published = PublishedFiles(tensors, gguf_layout(), model, dtype_of(path.parent))
            else:
                layout = layout_of(fields)
                files = stack.enter_context(TensorFiles(checkpoint_files(path, who), who))
                published = PublishedFiles(files, layout, model, dtype_of(path))
            if published.ignored:
                names = listed(published.ignored)
                warnings.warn(f"{who}: scales of activations are left out: {names}", stacklevel=4)
            yield published
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(who) else f"{who}: {path}: {text}") from None
