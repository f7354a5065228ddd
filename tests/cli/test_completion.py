"""`nf4kernels completion` and `info --json`: the command line described for shells and for programs."""

import json
import shutil
import subprocess

import pytest

import nf4kernels
from nf4kernels.cli import VERBS, main
from nf4kernels.cli.completion import SHELLS

pytest.importorskip("shtab")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_is_completed(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb in VERBS:
        assert verb.__name__.rpartition(".")[2] in script
    assert "double-quant" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_it(tmp_path, capsys):
    main(["completion", "bash"])
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    ask = (
        f"source {script}; complete -p nf4kernels; COMP_WORDS=(nf4kernels qua); COMP_CWORD=1; "
        "$(complete -p nf4kernels | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1].strip() == "quantize", done


def test_completion_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("nf4kernels.cli.errors.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    error = capsys.readouterr().err
    assert error == "nf4kernels completion: shtab must be installed, run: pip install 'nf4kernels[completion]'\n"


def test_info_for_programs(capsys):
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["nf4kernels"] == nf4kernels.__version__
    assert set(told["devices"]) == set(nf4kernels.backend_info().devices)
    assert told["cpu_isas"] == nf4kernels.backend_info().cpu_isas
