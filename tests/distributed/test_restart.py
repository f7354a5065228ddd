"""`nf4kernels finetune` under torchrun: killed and started again, on other numbers of processes, refused."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.chat_model import chat_model, facts
from support.finetune_run import arguments, write_rows
from support.paths import TESTS, python_path

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from nf4kernels.cli import main  # noqa: E402
from nf4kernels.stages.errors import StageError  # noqa: E402
from nf4kernels.stages.finetune.processes import meet  # noqa: E402

EXAMPLES = 31  # 28 of them to train on: the last step of an epoch is whole on each number of processes
BATCH, LIMIT = 4, "--ddp_timeout=60"
KILLED = ["rank 1 in a step", "rank 0 in a checkpoint", "rank 1 at the end"]
REFUSED = ["version", "recipe", "few examples", "another batch"]


def torchrun(ranks: int, *target: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *target]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=400)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran


def flags(folder: Path, ranks: int, **changes) -> list[str]:
    changes["train_sampling_strategy"] = "group_by_length"  # whose order is drawn by the size of a step
    argv = arguments(
        folder / "chat", folder / "prompts.jsonl", "", per_device_train_batch_size=BATCH // ranks, **changes
    )
    return [*(each for each in argv if not each.startswith("--output_dir")), LIMIT]


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What torchrun said, and the folder of all runs."""
    folder = tmp_path_factory.mktemp("runs")
    chat_model(folder / "chat", num_hidden_layers=1)
    rows = [{"prompt": q, "completion": " ".join([a] * (1 + i % 5))} for i, (q, a) in enumerate(facts(EXAMPLES))]
    write_rows(folder / "prompts.jsonl", rows)
    script = str(TESTS / "support" / "restart_steps.py")
    return torchrun(2, f"--max-restarts={len(KILLED)}", script, str(folder), *flags(folder, 2), cwd=folder), folder


def of(kind: str, said: str) -> list[str]:
    return [line.removeprefix(f"{kind}: ") for line in said.splitlines() if line.startswith(f"{kind}: ")]


@pytest.mark.slow
def test_killed_processes_go_on_by_themselves(killed):
    """In a step, in the midst of a checkpoint and after the end; the log is that of a run that nothing stopped."""
    ran, folder = killed
    assert of("killed", ran.stdout) == KILLED
    assert ran.stdout.count(f"going on from {folder / 'killed' / 'checkpoint-4'}") == 2
    assert ran.stdout.count("finished before the restart") == 1
    assert (folder / "killed" / "log.csv").read_bytes() == (folder / "whole" / "log.csv").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes(killed, capsys):
    """With as many examples a step, the same losses as of one process that nothing stopped."""
    _, folder = killed
    plain = flags(folder, 1, lora_dropout=0.0)
    assert main([*plain, f"--output_dir={folder / 'never'}"]) == 0
    expected = losses(folder / "never")
    for name, part in (("one", "ddp_part"), ("four", "ddp_part"), ("fsdp_four", "fsdp_part")):
        shutil.copytree(folder / part, folder / name)
    assert main([*plain, f"--output_dir={folder / 'one'}"]) == 0
    assert f"going on from {folder / 'one' / 'checkpoint-4'}" in capsys.readouterr().out
    script = str(TESTS / "support" / "resume_steps.py")
    said = torchrun(4, script, str(folder), *flags(folder, 4, lora_dropout=0.0), cwd=folder).stdout
    for name in ("four", "fsdp_four"):
        assert said.count(f"going on from {folder / name / 'checkpoint-4'}") == 1
    for name in ("one", "ddp_two", "four", "fsdp_two", "fsdp_four"):
        assert losses(folder / name) == pytest.approx(expected, rel=1e-4), name  # sums in another order
    assert (folder / "fsdp_part" / "checkpoint-4" / "optimizer_0" / ".metadata").is_file()  # shares, not gathered


@pytest.mark.slow
def test_unlike_processes_are_refused_on_each(killed):
    """By the sentence that each leaves for torchrun; the first says it. One that does not come ends the wait."""
    ran, _ = killed
    assert of("refused", ran.stdout) == REFUSED
    said = [line for line in ran.stderr.splitlines() if line.startswith("nf4kernels finetune: ")]
    assert sum("must have the same nf4kernels, got 0.0.0 on rank 0 and 0.0.1 on rank 1" in line for line in said) == 1
    assert sum("must come to each exchange within --ddp_timeout, 3 s" in line for line in said) == 1


def test_another_batch_is_refused_with_its_numbers(tmp_path, capsys):
    """On one process, a directory of two: nothing is loaded before."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("per_device_train_batch_size: 2\n", encoding="utf-8")
    (out / "started.json").write_text('{"batch": 4, "processes": 2}', encoding="utf-8")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a", "completion": "b"}] * 20)
    argv = ["finetune", "--model=nowhere", f"--data={rows}", f"--output_dir={out}", "--per_device_train_batch_size=2"]
    assert main(argv) == 2
    expected = (
        f"--output_dir must hold a run with as many examples a step, got {out}, whose run has 4 (2 processes) where"
        " this one has 2 (2 per_device_train_batch_size x 1 gradient_accumulation_steps x 1 processes)"
    )
    assert expected in capsys.readouterr().err


def test_a_process_that_does_not_start_ends_the_wait(monkeypatch):
    """The launcher's store is there, the other process is not."""
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match="within --ddp_timeout, 1 s, got nothing from another"):
        meet(True, None, 1.0)
    assert not dist.is_initialized()
