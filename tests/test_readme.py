"""The README's Python runs, block after block, as a reader would type it."""

import re

from support.paths import ROOT

README = ROOT / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert names["y"].shape == (3, 1024)


def test_names_in_the_readme_exist():
    import nf4kernels as nf4

    for name in re.findall(r"`nf4\.(\w+)", README.read_text()):
        assert hasattr(nf4, name), name
    for row in re.findall(r"^\| (`.+?) \|", README.read_text(), flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", row):
            assert name.startswith("NF4KERNELS_") or hasattr(nf4, name), name
