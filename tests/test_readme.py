"""README, CONTRIBUTING and docs/: their Python runs, block after block, and what they name exists.

A ```python block is run; ```py shows signatures, and ```text what is planned.
"""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from support import directories, published, tiny, words
from support.paths import ROOT

import nf4kernels as nf4
from nf4kernels import cli

DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
OPTIONAL = ("transformers", "peft", "trl", "bitsandbytes")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def python_blocks(document: Path) -> list[str]:
    return [code for language, code in FENCE.findall(document.read_text(encoding="utf-8")) if language == "python"]


def prose(document: Path) -> str:
    """The text without its blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def commands(document: Path) -> list[str]:
    """Lines of shell blocks and code within sentences, comments removed."""
    blocks = [code for language, code in FENCE.findall(document.read_text(encoding="utf-8")) if language == ""]
    code = [*"\n".join(blocks).splitlines(), *re.findall(r"`([^`]+)`", prose(document))]
    return [re.sub(r"\s+#.*", "", " ".join(line.split())) for line in code]


def arguments(document: Path, pattern: str) -> list[str]:
    """What follows `pattern` in the commands that hold it, variables like A=1 in front left out."""
    found = (re.match(rf"(?:\w+=\S+ )*(?:\S*/)?{pattern}(.*)", command) for command in commands(document))
    return [match[1] for match in found if match]


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if python_blocks(path)], ids=lambda path: path.name)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in OPTIONAL:
        if any(name in block for block in python_blocks(document)):
            pytest.importorskip(name, reason=f"{name} is not installed: {document.name} is not run")
    names: dict = {}
    if document.name == "README.md":
        words.directory(tmp_path / "SmolLM2-135M-Instruct")
    if document.name == "published.md":
        class_name, usual = directories.FAMILIES["gpt-oss"]
        published.publish(tmp_path / "gpt-oss-20b", tiny.make(class_name, dtype=torch.bfloat16, **usual), "gpt_oss")
    try:
        for block in python_blocks(document):
            exec(block, names)
    finally:
        if "unpatch" in names or "patch" in names:
            importlib.import_module("nf4kernels.integrations.bitsandbytes").unpatch()
    if document.name == "README.md":
        for directory in ("adapter", "native"):
            assert (tmp_path / directory / "adapter_model.safetensors").exists()
        assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text(encoding="utf-8")
        assert names["y"].shape == (3, 1024)


@each_document
def test_names_of_the_package_exist(document):
    text = re.sub(r"^```text\n.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names = set(re.findall(r"\bnf4\.(\w+)", text))
    assert not {name for name in names if not hasattr(nf4, name)}
    sources = [ROOT / "setup.py", *ROOT.glob("nf4kernels/**/*.py"), *ROOT.glob("tests/**/*.py")]
    known = set(re.findall(r"NF4KERNELS_\w+", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    assert set(re.findall(r"NF4KERNELS_\w+\b(?!\*)", text)) <= known


@each_document
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(document)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(target), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


@each_document
def test_files_that_are_named_exist(document):
    for name in re.findall(r"`([\w./]+/[\w./]+\.(?:py|h|cuh?|cpp|csv|json|md|toml))`", prose(document)):
        assert any((ROOT / room / name).exists() for room in ("", "nf4kernels", "csrc")), name


@each_document
def test_commands_exist(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    verbs = {verb.__name__.rpartition(".")[2] for verb in cli.VERBS}
    assert {rest.split()[0] for rest in arguments(document, "make ")} <= targets
    assert {rest.split()[0] for rest in arguments(document, "nf4kernels ")} <= verbs
    for rest in arguments(document, "python -m "):
        module, *options = rest.split()
        spec = importlib.util.find_spec(module)
        assert spec is not None, rest
        file = Path(spec.origin)
        if ROOT in file.parents:
            source = (file.with_name("__main__.py") if file.name == "__init__.py" else file).read_text(encoding="utf-8")
            assert all(f'"{option}"' in source for option in options if option.startswith("--") and option != "--help")
    for rest in arguments(document, r"python (?=[\w/]+\.py)"):
        assert (ROOT / rest.split()[0]).exists(), rest
    for rest in arguments(document, r"(?:python -m )?pytest (?=tests/)"):
        file, *options = rest.split()
        tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
        selected = options[options.index("-k") + 1] if "-k" in options else "test"
        assert any(selected in name for name in tests), rest


def test_commands_and_links_are_found():
    """What the tests above look for is there to be found."""
    readme = ROOT / "README.md"
    assert {"demo", "test"} <= {rest.split()[0] for rest in arguments(readme, "make ")}
    assert {"info", "quantize", "demo"} <= {rest.split()[0] for rest in arguments(readme, "nf4kernels ")}
    assert any("--docs" in rest for rest in arguments(ROOT / "docs" / "speed.md", "python -m "))
    assert any("-k" in rest for rest in arguments(ROOT / "CONTRIBUTING.md", "python -m pytest "))
    assert len(python_blocks(readme)) == 5
