"""NF4KERNELS_PATCH_BITSANDBYTES: patches a program that knows nothing of us, and costs nothing where it is unset."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import nf4kernels
from nf4kernels.integrations.bitsandbytes.startup import VARIABLE, PatchingFinder

PACKAGE = Path(nf4kernels.__file__).parent
PTH = PACKAGE / "integrations/bitsandbytes/nf4kernels_patch_bitsandbytes.pth"
PROGRAM = """
import sys
started_with = {"torch", "nf4kernels", "importlib.util"} & set(sys.modules)
import importlib.util
importlib.util.find_spec("bitsandbytes")  # as transformers asks whether it is there
import bitsandbytes
from bitsandbytes.functional import quantize_4bit
print(sorted(started_with - {"importlib.util"}), quantize_4bit.__module__)
import nf4kernels.integrations.bitsandbytes as ours
print(ours.is_patched())
"""


def test_the_installed_file_runs_startup(tmp_path):
    """In a fresh interpreter that reads a folder with the file twice, as those of virtual environments do."""
    shutil.copy(PTH, tmp_path)
    prelude = f"import site; site.addsitedir({str(tmp_path)!r}); site.addsitedir({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), VARIABLE: "1"}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", f"{prelude}\n{PROGRAM}"]
    process = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert process.stdout.splitlines() == ["[] nf4kernels.integrations.bitsandbytes.replacements", "True"], (
        process.stderr
    )


def test_it_does_nothing_where_the_variable_is_unset(tmp_path, monkeypatch):
    shutil.copy(PTH, tmp_path)
    before = list(sys.meta_path)
    for value in (None, "", "0"):
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        site.addsitedir(str(tmp_path))
        assert sys.meta_path == before
    sys.path.remove(str(tmp_path))


def test_a_wrong_value_is_an_error_of_the_import(monkeypatch):
    monkeypatch.setenv(VARIABLE, "yes")
    finder = PatchingFinder()
    assert finder.find_spec("torch") is None
    spec = finder.find_spec("bitsandbytes")
    monkeypatch.setattr(type(spec.loader), "exec_module", lambda self, module: None)
    with pytest.raises(ValueError, match=f"{VARIABLE} must be 1, 0 or unset, got yes"):
        spec.loader.exec_module(None)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_pip_installs_the_file(tmp_path, editable):
    """Into a virtual environment on top of this one, without a compiler: the tests' own libraries stay."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(PACKAGE, source / "nf4kernels", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PACKAGE.parent / name, source)
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    packages = tmp_path / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (packages / "zz_these.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    options = ["--no-build-isolation", "--no-deps", "--quiet", *(["--editable"] if editable else [])]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": str(tmp_path / "nothing")}
    subprocess.run([python, "-m", "pip", "install", *options, source], env=environment, check=True, capture_output=True)
    for value, module in (("1", "nf4kernels.integrations.bitsandbytes.replacements"), ("0", "bitsandbytes.functional")):
        process = subprocess.run(
            [python, "-c", PROGRAM], cwd=tmp_path, env=environment | {VARIABLE: value}, capture_output=True,
            encoding="utf-8", check=True,
        )  # fmt: skip
        assert process.stdout.splitlines() == [f"[] {module}", str(value == "1")]
