"""The layer rule of the package, read off its source: imports go downward, at the top of a file, to few packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nf4kernels

PACKAGE = Path(nf4kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}

# First match wins; a folder stands for all that it holds.
LEVELS = {
    "nf4kernels.version": 0,
    "nf4kernels.codebook": 0,
    "nf4kernels.quantized_weight": 0,
    "nf4kernels.published_formats": 0,
    "nf4kernels.reference": 0,
    "nf4kernels.ops": 1,
    "nf4kernels.backends": 2,
    "nf4kernels.modes": 3,
    "nf4kernels.autograd": 3,
    "nf4kernels.autograd_lora": 3,
    "nf4kernels.input_checks": 3,
    "nf4kernels.functional": 3,
    "nf4kernels.grouped": 3,
    "nf4kernels.routing": 3,
    "nf4kernels.nn": 4,
    "nf4kernels.model": 5,
    "nf4kernels.storage": 5,
    "nf4kernels.tuning": 5,
    "nf4kernels.distributed": 5,
    "nf4kernels.optim": 5,
    "nf4kernels.recover": 5,
    "nf4kernels.integrations": 6,
    "nf4kernels.stages": 7,
    "nf4kernels.entry": 8,
    "nf4kernels.cli": 8,
    "nf4kernels.demo": 8,
    "nf4kernels.__main__": 8,
    "nf4kernels": 8,  # the front door: it re-exports, and nothing below imports it
}
# The third-party packages that a folder may import; first match wins, and what has no line may import torch alone.
# Levels 0 to 5 together need torch, numpy, scipy, safetensors and tqdm, which are what pyproject.toml requires.
THIRD_PARTY = {
    "nf4kernels.codebook": {"torch", "scipy"},
    "nf4kernels.backends.triton": {"torch", "triton"},
    "nf4kernels.model": {"torch", "tqdm"},
    "nf4kernels.storage": {"torch", "safetensors", "tqdm"},
    "nf4kernels.tuning": {"torch", "tqdm"},
    "nf4kernels.recover": {"torch", "numpy", "scipy", "tqdm", "safetensors"},
    "nf4kernels.integrations": {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed"},
    "nf4kernels.stages": {
        "torch",
        "numpy",
        "tqdm",
        "safetensors",
        "yaml",
        "transformers",
        "peft",
        "trl",
        "datasets",
        "accelerate",
        "matplotlib",
        "gradio",
        "lm_eval",
        "huggingface_hub",
        "jinja2",
        "PIL",
        "optuna",
    },
    "nf4kernels.cli": {"torch", "transformers", "shtab"},
    "nf4kernels.demo": {"torch", "tqdm", "transformers", "matplotlib"},
}
# Above stages/ only inside a function: every verb of the command line is imported with the others.
FRAMEWORKS = {
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "deepspeed",
    "matplotlib",
    "gguf",
    "gradio",
    "shtab",
    "lm_eval",
    "optuna",
}
OWN = "nf4kernels"
# Imported when it is chosen: it brings Triton, which need not be there.
LATE = {("nf4kernels.backends.select", "nf4kernels.backends.triton")}


def level(module: str) -> int:
    if module == OWN:
        return LEVELS[OWN]
    return next(n for name, n in LEVELS.items() if name != OWN and is_within(module, name))


def is_within(module: str, folder: str) -> bool:
    return (module + ".").startswith(folder + ".")


def third_party(module: str) -> set[str]:
    return next((packages for folder, packages in THIRD_PARTY.items() if is_within(module, folder)), {"torch"})


def imports(module: str, file: Path):
    """(line, imported module, is it inside a function) of every import statement, relative ones resolved."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nested = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node in nested
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in MODULES else source, node in nested


def dynamic_imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno


def violations(module: str, file: Path) -> list[str]:
    own = level(module)
    allowed = third_party(module)
    found = []
    for line, imported, inside in imports(module, file):
        where = f"{file.name}:{line} imports {imported}"
        root = imported.split(".")[0]
        if root == OWN:
            if module != OWN and level(imported) > own:
                found.append(f"{where}: level {level(imported)} from level {own}")
        elif root not in allowed and root not in sys.stdlib_module_names:
            found.append(f"{where}: it may import {', '.join(sorted(allowed))} alone")
        elif root in FRAMEWORKS and own > 7 and not inside:
            found.append(f"{where} outside a function")
        if inside and own <= 5 and (module, imported) not in LATE:
            found.append(f"{where} inside a function")
    if own <= 5:
        found += [f"{file.name}:{line} imports by name at run time" for line in dynamic_imports(file)]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    assert violations(module, MODULES[module]) == []


def test_the_rule_bites(tmp_path):
    source = tmp_path / "reference.py"
    source.write_text(
        "import pandas\n"
        "from .functional import linear\n"
        "from . import model\n"
        "import nf4kernels.cli\n"
        "def f():\n"
        "    from . import codebook\n"
        "    __import__('peft')\n",
        encoding="utf-8",
    )
    found = violations("nf4kernels.reference", source)
    assert [v.split(" imports ")[0].split(":")[1] for v in found] == ["1", "2", "3", "4", "6", "7"]


def test_the_rule_bites_on_frameworks(tmp_path):
    source = tmp_path / "quantize.py"
    source.write_text(
        "import torch\nimport transformers\ndef f():\n    import transformers\n    import peft\n", encoding="utf-8"
    )
    found = violations("nf4kernels.cli.quantize", source)
    assert [v.split(" imports ")[0].split(":")[1] for v in found] == ["2", "5"]
    assert violations("nf4kernels.integrations.peft", source) == []


def test_every_module_has_a_level():
    for module in MODULES:
        assert isinstance(level(module), int)


def test_banned_names():
    for file in FILES:
        assert not {"utils", "misc", "common", "helpers"} & set(file.relative_to(PACKAGE).with_suffix("").parts)


def test_importing_the_package_imports_no_framework():
    """None of the optional frameworks, nor any of their seconds, comes with `import nf4kernels`."""
    code = "import sys, nf4kernels; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    modules = result.stdout.split()
    assert "torch.distributed.tensor" not in modules, "it takes a third of a second"
    loaded = {module.split(".")[0] for module in modules}
    assert "nf4kernels" in loaded
    frameworks = {"transformers", "peft", "bitsandbytes", "matplotlib", "gguf", "pytest", "accelerate", "triton"}
    assert not loaded & frameworks
    assert "torch.distributed.tensor" not in loaded, "a third of a second for what one device does not need"


def reads_by_the_locale(file: Path) -> list[int]:
    """Lines that read or write text in the locale's encoding, which on some machines is ASCII."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = next((word.value for word in node.keywords if word.arg == "mode"), None)
        mode = mode or next((arg for arg in node.args[:2] if isinstance(arg, ast.Constant)), ast.Constant("r"))
        in_text = name == "open" and "b" not in str(getattr(mode, "value", "b"))
        of_os = name == "open" and getattr(getattr(node.func, "value", None), "id", "") in ("os", "Image")
        if name in ("read_text", "write_text") or (in_text and not of_os):
            found.append(node.lineno)
        pipe = getattr(getattr(node.func, "value", None), "id", "") == "subprocess"
        found += [node.lineno for word in node.keywords if pipe and word.arg == "text"]
    return found


@pytest.mark.parametrize("folder", ["nf4kernels", "tests", "benchmarks", ".ci"])
def test_text_names_its_encoding(folder):
    files = sorted((PACKAGE.parent / folder).rglob("*.py"))
    assert files
    assert {str(file): lines for file in files if (lines := reads_by_the_locale(file))} == {}
