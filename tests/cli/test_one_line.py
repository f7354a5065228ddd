"""A wrong variable, file or flag ends every verb in one line and exit code 2, never in a traceback."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from support.paths import ROOT, python_path

from nf4kernels.cli import demo, info, main, quantize
from nf4kernels.demo import pipeline
from nf4kernels.entry import is_command_line

VARIABLES = ("NF4KERNELS_CPU_ISA", "NF4KERNELS_CPU_PRODUCTS", "NF4KERNELS_BACKEND", "NF4KERNELS_CUDA")
SCRIPT = "import sys\nfrom nf4kernels.cli import main\nsys.exit(main())\n"  # what pip writes for the entry point

# Forks after torch and scipy were imported, which take most of the time that a process of its own would.
FORKS = """
    import json, os, runpy, sys
    import scipy.special, torch
    starts, script = json.loads(sys.argv[1]), sys.argv[2]
    for variable, value, entry, arguments in starts:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ[variable] = value
            os.dup2(writing, 1), os.dup2(writing, 2)
            if entry == "module":
                sys.argv = ["-m", *arguments]
                sys.orig_argv = [sys.executable, "-m", "nf4kernels", *arguments]
                runpy._run_module_as_main("nf4kernels")
            else:
                sys.argv = [script, *arguments]
                sys.orig_argv = [sys.executable, *sys.argv]
                runpy.run_path(script, run_name="__main__")
        os.close(writing)
        with os.fdopen(reading) as output:
            text = output.read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


def environment(**changes):
    return {key: value for key, value in os.environ.items() if key not in VARIABLES} | python_path() | changes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_wrong_variable_ends_every_verb_in_one_line(tmp_path):
    script = tmp_path / "nf4kernels"
    script.write_text(SCRIPT, encoding="utf-8")
    # the import fails before any verb is looked at: each variable and each verb twice or so stand for all pairs
    starts = [
        ["NF4KERNELS_CPU_ISA", "foo", "module", ["info"]],
        ["NF4KERNELS_BACKEND", "foo", "module", ["quantize", "in", "out"]],
        ["NF4KERNELS_CUDA", "foo", "module", ["demo", "--steps", "1"]],
        ["NF4KERNELS_CPU_PRODUCTS", "foo", "module", ["info"]],
        ["NF4KERNELS_CPU_ISA", "foo", "script", ["--help"]],
        ["NF4KERNELS_BACKEND", "foo", "script", ["info"]],
    ]
    # a valid word that leaves the CPU without a backend
    starts += [["NF4KERNELS_BACKEND", "triton", "module", ["quantize", "in", "out"]]]
    starts += [["NF4KERNELS_BACKEND", "triton", "script", ["demo"]]]
    starts += [["NF4KERNELS_BACKEND", "triton", "module", ["chat", "model"]]]
    starts += [["NF4KERNELS_BACKEND", "triton", "script", ["recover", "plan"]]]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKS), json.dumps(starts), script],
        capture_output=True, encoding="utf-8", env=environment(), cwd=tmp_path, check=True,
    )  # fmt: skip
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == len(starts)
    for start, (code, text) in zip(starts, ends):
        assert code == 2, (start, text)
        assert len(text.splitlines()) == 1, (start, text)
        assert text.startswith("nf4kernels"), start
        assert f"{start[0]}=triton" in text if start[1] == "triton" else f"{start[0]} must be" in text, start
    assert os.listdir(tmp_path) == ["nf4kernels"]


def test_a_wrong_variable_ends_the_module_in_one_line():
    """As above, by a Python that really was started so."""
    done = subprocess.run(
        [sys.executable, "-m", "nf4kernels", "info"], env=environment(NF4KERNELS_CPU_ISA="foo"), cwd=ROOT,
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("nf4kernels: NF4KERNELS_CPU_ISA must be one of")


def test_a_program_gets_the_error_of_its_import():
    done = subprocess.run(
        [sys.executable, "-c", "import nf4kernels"], env=environment(NF4KERNELS_CUDA="foo"),
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ValueError: nf4kernels: NF4KERNELS_CUDA must be" in done.stderr


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m", "info"], ["python", "-X", "dev", "-m", "nf4kernels", "info"], True),
        (["-m", "info"], ["python", "-mnf4kernels", "info"], True),
        (["-m"], ["python", "-m", "other"], False),
        (["/usr/bin/nf4kernels", "info"], ["python", "/usr/bin/nf4kernels", "info"], True),
        (["/usr/bin/train.py", "nf4kernels"], ["python", "/usr/bin/train.py", "nf4kernels"], False),
        (["-c"], ["python", "-c", "import nf4kernels"], False),
        ([], [], False),
    ],
)
def test_the_command_line_is_known_by_how_it_was_started(argv, orig_argv, expected):
    assert is_command_line(argv, orig_argv) == expected


def write(name, text):
    def change(in_dir):
        path = in_dir / name
        path.unlink(missing_ok=True)
        path.write_bytes(text.encode("latin-1")) if text is not None else path.mkdir()

    return change


INDEX = "model.safetensors.index.json"
BROKEN = {
    "config is a directory": write("config.json", None),
    "config of another shape": write("config.json", '{"architectures": ["LlamaForCausalLM"], "hidden_size": "many"}'),
    "architectures is a number": write("config.json", '{"architectures": 5}'),
    "architectures holds numbers": write("config.json", '{"architectures": [5]}'),
    "architecture is no model": write("config.json", '{"architectures": ["logging"]}'),
    "quantization_config is a word": write("config.json", '{"quantization_config": "gptq"}'),
    "config in latin-1": write("config.json", '{"a": "\xe9"}'),
    "index is a list": write(INDEX, "[]"),
    "index is a directory": write(INDEX, None),
    "index names a number": write(INDEX, '{"weight_map": {"a": 3, "b": "c"}}'),
    "index names a list": write(INDEX, '{"weight_map": {"a": []}}'),
    "index names a directory": write(INDEX, '{"weight_map": {"a": "templates"}}'),
    "a shard is empty": write("model.safetensors", ""),
    "a shard is a directory": write("model.safetensors", None),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_directory(in_dir, tmp_path, capsys, kind):
    BROKEN[kind](in_dir)
    capsys.readouterr()
    assert main(["quantize", str(in_dir), str(tmp_path / "out")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("nf4kernels quantize: "))
    assert "must" in line or "directory" in line
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("out", ["in", "in/config.json", "in/config.json/out", "x" * 300, "."])
def test_an_output_that_cannot_be(in_dir, tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "in", out]) == 2
    assert "nf4kernels quantize: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]


DATA = '{"prompt": "a", "completion": "b"}\n'
FLAGS = {
    "--data": ("no-such-file.jsonl", ".", "binary", "one-line", "x" * 5000),
    "--model": ("no-such-dir", "data.jsonl", "empty", "broken"),
    "--out": (".", "data.jsonl", "data.jsonl/out", "empty/../.."),
    "--cache": ("data.jsonl", "out/in"),
    "--lr": ("nan", "inf", "0", "-1", "1e400", "x"),
    "--steps": ("0", "-1", "1.5", "9" * 30),
    "--byte-steps": ("0", "9" * 30),
    "--batch": ("0", "9" * 30),
    "--rank": ("0", "9" * 30),
    "--seed": ("-1", "9" * 23),
    "--nothing": ("1",),
}


@pytest.fixture
def demo_directory(tmp_path, monkeypatch):
    """Where the demo's stages must not begin, with what its flags name."""
    (tmp_path / "data.jsonl").write_text(DATA + DATA.replace("a", "c"), encoding="utf-8")
    (tmp_path / "one-line").write_text(DATA, encoding="utf-8")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.smollm2, "fetch", lambda cache: pytest.fail("the demo began"))
    return tmp_path


@pytest.mark.parametrize("flag", FLAGS)
def test_a_wrong_flag_of_the_demo(demo_directory, capsys, flag):
    before = sorted(os.listdir())
    for value in FLAGS[flag]:
        data = [] if flag == "--data" else ["--data", "data.jsonl"]
        try:
            code = main(["demo", *data, "--out", "out", flag, value])
        except SystemExit as error:  # argparse's own, after a usage of several lines
            code = error.code
        err = capsys.readouterr().err
        assert code == 2, value
        line = err.splitlines()[-1]
        assert line.startswith("nf4kernels"), (value, err)
        assert flag in line or "too long" in line, (value, line)
        assert sorted(os.listdir()) == before, value


def test_a_model_that_transformers_does_not_load(demo_directory, capsys, monkeypatch):
    """Config and all, but no weights: transformers' error, in one line that begins with the flag."""
    (demo_directory / "empty" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert main(["demo", "--data", "data.jsonl", "--model", "empty", "--out", "out"]) == 2
    assert "nf4kernels demo: --model must be a causal language model" in capsys.readouterr().err
    assert not (demo_directory / "out").exists()


def test_every_verb_that_computes_looks_for_a_backend(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("nf4kernels.backends.select.FORCED", "triton")
    for arguments in (
        ["quantize", str(tmp_path), str(tmp_path / "out")], ["demo"], ["recover", "distill"], ["recover", "qat"],
    ):  # fmt: skip
        assert main(arguments) == 2
        assert "the CPU must have a backend, got none: NF4KERNELS_BACKEND=triton" in capsys.readouterr().err


def test_no_other_verb_computes():
    """A new verb belongs in the tests of this file."""
    from nf4kernels import cli

    names = [verb.__name__.rpartition(".")[2] for verb in cli.VERBS]
    assert names[:8] == ["info", "tune", "estimate", "inspect", "quantize", "convert", "compare", "data"]
    assert names[8:] == ["recipes", "finetune", "recover", "merge", "export", "chat", "demo", "completion"]
    assert {demo, quantize} < set(cli.VERBS)
    assert torch.get_default_device().type == "cpu"


def test_an_error_of_the_system_ends_in_one_line(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(info, "run", full)
    assert main(["info"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"nf4kernels info: [Errno {errno.ENOSPC}] No space left on device: '{tmp_path}'"


def test_a_reader_that_has_enough_is_told_of_nothing():
    command = f"{sys.executable} -m nf4kernels info | true"
    ran = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True, encoding="utf-8", check=False)
    assert (ran.stdout, ran.stderr) == ("", "")
