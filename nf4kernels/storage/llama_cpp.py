"""llama.cpp's converter from a Hugging Face directory to a GGUF file: finding it and running it."""

import shutil
import subprocess
import sys
from pathlib import Path

from .atomic import replacing

SCRIPT = "convert_hf_to_gguf.py"


def find_converter(directory: Path | None, who: str) -> Path:
    """The script in `directory`, or on PATH; ValueError where there is none."""
    if directory is not None:
        script = directory if directory.is_file() else directory / SCRIPT
        if not script.is_file():
            raise ValueError(f"{who}: --llama-cpp must be llama.cpp's directory with {SCRIPT}, got {directory}")
        return script.resolve()
    found = shutil.which(SCRIPT)
    if found is None:
        raise ValueError(
            f"{who}: llama.cpp's {SCRIPT} must be on PATH or in --llama-cpp DIR, got neither; it comes with"
            " https://github.com/ggml-org/llama.cpp"
        )
    return Path(found).resolve()


def convert_to_gguf(script: Path, source: Path, out_file: Path, outtype: str, who: str) -> None:
    """Run the converter on a dense directory; the file appears when complete. ValueError where the script fails."""
    with replacing(out_file) as partial:
        command = [sys.executable, str(script), str(source), "--outfile", str(partial), "--outtype", outtype]
        done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
            raise ValueError(f"{who}: {script} must convert {source}, got exit code {done.returncode}: {last}")
        if not partial.stat().st_size:
            raise ValueError(f"{who}: {script} must write the file that it is told, got none")
