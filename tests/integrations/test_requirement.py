"""The release of a library that an integration needs: one sentence, at the import, where it is another one."""

import importlib.metadata
import subprocess
import sys

import pytest
from support.paths import python_path

from nf4kernels.integrations import requirement

RELEASES = {
    "transformers": (["5.5.0", "5.24.0", "10.0.0.dev0"], ["4.57.1", "5.4.9", "5"]),
    "peft": (["0.18.1", "0.21.2.dev0"], ["0.17.1", "0.18.0"]),
    "bitsandbytes": (["0.49.0", "0.50.2", "0.50.3.dev0"], ["0.48.2", "0.51.0", "1.0"]),
}
IMPORTS = """
import importlib, importlib.metadata
importlib.metadata.version = lambda package: "0.1"
for package in ("transformers", "peft", "bitsandbytes"):
    try:
        importlib.import_module(f"nf4kernels.integrations.{package}")
    except ImportError as error:
        print(error)
"""


def test_every_integration_has_a_requirement():
    assert RELEASES.keys() == requirement.SUPPORTED.keys()


@pytest.mark.parametrize("package", RELEASES)
def test_releases(package, monkeypatch):
    taken, refused = RELEASES[package]
    for release in taken:
        monkeypatch.setattr(requirement, "version", lambda package, release=release: release)
        requirement.require(package)
    for release in refused:
        monkeypatch.setattr(requirement, "version", lambda package, release=release: release)
        with pytest.raises(ImportError, match=rf"integrations\.{package}: .*>=.* must be installed, got {release}: "):
            requirement.require(package)


def test_a_library_that_is_not_there(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(requirement, "version", missing)
    message = r"bitsandbytes>=0.49.0,<0.51.0 must be installed, got none: pip install 'bitsandbytes>=0.49.0,<0.51.0'"
    with pytest.raises(ImportError, match=message):
        requirement.require("bitsandbytes")


def test_the_import_says_it():
    """Before anything of the library is imported."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=python_path(), capture_output=True, encoding="utf-8", check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(RELEASES)
    for package, line in zip(RELEASES, lines):
        assert line.startswith(f"nf4kernels.integrations.{package}: {package}>=")
        assert ", got 0.1: pip install '" in line
