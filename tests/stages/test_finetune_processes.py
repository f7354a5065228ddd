"""`nf4kernels finetune` on several processes: what is asked of a launcher, and the same numbers as of one process."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.chat_model import chat_model, facts
from support.finetune_run import arguments, names, write_rows
from support.paths import python_path
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

import yaml  # noqa: E402

from nf4kernels.cli import main  # noqa: E402
from nf4kernels.stages.errors import StageError  # noqa: E402
from nf4kernels.stages.finetune import loading, processes  # noqa: E402
from nf4kernels.stages.finetune.processes import load_for_sharding, sharing, tell_launcher  # noqa: E402

STEPS = 4
CHANGES = {"max_steps": STEPS, "lora_dropout": 0.0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("models") / "chat", num_hidden_layers=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"prompt": q, "completion": a} for q, a in facts(32)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def one(model, prompts, tmp_path_factory):
    """A run of one process, with the batch of two."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(arguments(model, prompts, out, **CHANGES, per_device_train_batch_size=4)) == 0
    return out


@pytest.fixture
def launched(monkeypatch):
    """As if by torchrun, on GPUs, with DeepSpeed installed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "find_spec", lambda name: name)
    monkeypatch.setattr(processes, "has_gpu", lambda: True)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_names_of_deepspeeds_stages(launched, name, stage):
    found = sharing(name, None, None, False)
    assert found["deepspeed"]["zero_optimization"]["stage"] == stage
    assert found["deepspeed"]["bf16"] == {"enabled": "auto"}
    for field in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert found["deepspeed"][field] == "auto"
    assert found["fsdp"] is None


def test_a_file_of_deepspeeds_passes_through(launched, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}), encoding="utf-8")
    assert sharing(str(file), None, None, False)["deepspeed"] == str(file)
    with pytest.raises(StageError, match="--deepspeed must be zero2, zero3 or a file"):
        sharing("zero4", None, None, False)


@pytest.mark.parametrize("word", [True, "true", "True"])
def test_a_plain_fsdp_is_fsdp2_by_layers(launched, word):
    found = sharing(None, word, None, False)
    assert found["fsdp"] is True
    assert found["fsdp_config"]["version"] == 2
    assert found["fsdp_config"]["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    given = sharing(None, word, {"version": 2, "fsdp_cpu_offload": True}, False)["fsdp_config"]
    assert given["cpu_offload"]
    assert given["cpu_ram_efficient_loading"]
    assert sharing(None, "false", None, False)["fsdp"] is None


def test_a_file_of_fsdps_is_read(launched, tmp_path):
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"reshard_after_forward": False}), encoding="utf-8")
    found = sharing(None, True, str(file), False)["fsdp_config"]
    assert found["reshard_after_forward"] is False
    assert found["version"] == 2
    given = '{"reshard_after_forward": false}'  # a mapping in a recipe
    assert sharing(None, True, given, False)["fsdp_config"] == found
    with pytest.raises(StageError, match="--fsdp_config must be a mapping or a JSON file that holds one, got nowhere"):
        sharing(None, True, "nowhere.json", False)
    with pytest.raises(StageError, match="--fsdp_config must have version 2, got 1: FSDP1 takes no packed bytes"):
        sharing(None, True, {"fsdp_version": 1}, False)


@pytest.mark.parametrize(("fsdp", "rank", "expected"), [(False, "1", False), (True, "0", True), (True, "1", True)])
def test_what_is_sharded_is_loaded_on_the_cpu(monkeypatch, fsdp, rank, expected):
    """Report's kind: each process puts the whole model on its device before it is sharded."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "False")
    training = SimpleNamespace(fsdp=fsdp, fsdp_config=dict(processes.FSDP))
    assert load_for_sharding(training) is expected
    assert (os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "True") is fsdp


@pytest.mark.parametrize(
    ("flags", "size", "expected"),
    [
        (["--fsdp"], None, "--fsdp needs a process for each GPU, run: torchrun --nproc-per-node N -m"),
        (["--fsdp", "--use_cpu=true"], "2", "--fsdp needs GPUs"),
        (["--deepspeed=zero2"], "2", "--deepspeed needs DeepSpeed, run: pip install deepspeed"),
        (["--deepspeed=nowhere.json"], "2", "or a file of DeepSpeed's, got nowhere.json"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said(model, prompts, tmp_path, capsys, monkeypatch, flags, size, expected):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    had = names(tmp_path)
    assert main(arguments(model, prompts, tmp_path / "out") + flags) == 2
    assert expected in capsys.readouterr().err
    assert names(tmp_path) == had


def test_torchrun_finds_the_whole_sentence_or_none(tmp_path, monkeypatch):
    """It ends processes in the midst of a file, and reads it then: pytorch's own record_exception leaves a half."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def end(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", end)
        with pytest.raises(KeyboardInterrupt):
            tell_launcher(StageError("a sentence"))
    assert not list(tmp_path.iterdir())
    tell_launcher(StageError("a sentence"))
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert failure.message["message"] == "StageError: a sentence"
    assert failure.timestamp > 0


@pytest.mark.parametrize("is_zero3", [False, True])
def test_under_zero3_the_model_is_loaded_to_no_device(monkeypatch, is_zero3):
    """transformers refuses a device_map there: DeepSpeed takes each process' part to its device by itself."""
    given = {}

    def from_pretrained(where, **options):
        given.update(options)
        raise OSError("no model")

    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: is_zero3)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    asked = SimpleNamespace(model_name_or_path="somewhere", model_revision=None, attn_implementation=None)
    training = SimpleNamespace(fsdp=[], trust_remote_code=False, device=torch.device("cuda", 1))
    recipe = SimpleNamespace(model=asked, training=training, quantization=None, dtype=torch.bfloat16)
    with pytest.raises(StageError, match="no model"):
        loading.load_model(recipe)
    assert ("device_map" not in given) == is_zero3


def test_only_the_first_process_says_what_is_wrong(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(arguments(model, tmp_path / "missing.jsonl", tmp_path / "out")) == 2
    assert capsys.readouterr().err == ""


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    with pytest.raises(StageError, match="--nproc-per-node must be at most the number of GPUs, 2, got 3"):
        processes.meet(False, None, 1.0)


def test_the_process_that_differs_is_named(monkeypatch):
    def gather(everyone, own):
        everyone[:] = [own, own, {**own, "examples in --data": 7}]

    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(StageError, match="the same examples in --data, got 8 on rank 0 and 7 on rank 2"):
        processes.check_alike(1.0, {"examples in --data": 8, "torch": "2"})


# accelerate knows FSDP on GPUs alone: here it is told that there are some, and so are we.
FSDP_ON_CPUS = """
import sys
from support import fsdp_on_cpus

fsdp_on_cpus.pretend()
from accelerate import Accelerator
from nf4kernels.cli import main

def gathers_the_base(*args, **options):
    raise AssertionError("accelerate gathers the base, too")

Accelerator.get_state_dict = gathers_the_base
sys.exit(main(sys.argv[1:]))
"""


# DeepSpeed would compile collectives over shared memory for a minute, where gloo does as well. Argument 1 is the step
# after whose checkpoint all processes end, as if killed.
DEEPSPEED_ON_CPUS = """
import os, sys
import deepspeed, torch.distributed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from nf4kernels.cli import main
from nf4kernels.stages.finetune import trainer

save, last = trainer.Keeper.on_save, int(sys.argv.pop(1))

def on_save(self, args, state, control, **kwargs):
    save(self, args, state, control, **kwargs)
    torch.distributed.barrier()
    if state.global_step == last:
        os._exit(3)

trainer.Keeper.on_save = on_save
sys.exit(main(sys.argv[1:]))
"""


def launch(argv: list[str], script: str | None = None, folder=None, is_killed: bool = False) -> str:
    target = ["-m", "nf4kernels"]
    if script is not None:
        (folder / "launched.py").write_text(script, encoding="utf-8")
        target = [str(folder / "launched.py")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *target, *argv]
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=240)
    assert (ran.returncode != 0) == is_killed, ran.stderr[-20000:]
    return ran.stdout


def read_log(out) -> list[dict[str, str]]:
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_log(one, two) -> None:
    """The same losses and norms of gradients, whose sums differ by where they are cut."""
    rows = [row for row in read_log(two) if row["loss"]]
    assert len(rows) == STEPS
    for expected, got in zip(read_log(one), rows):
        for column in ("loss", "grad_norm"):
            assert float(got[column]) == pytest.approx(float(expected[column]), rel=1e-4), (expected, got)


def same_adapters(one, two) -> None:
    """The same tensors, whole, and none of the frozen base; their values differ as AdamW's steps of tiny sums do."""
    expected, got = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    assert {name: each.shape for name, each in got.items()} == {name: each.shape for name, each in expected.items()}
    assert all(each.abs().max() > 0 for each in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["whole", "recipe"])
def test_two_processes_train_as_one_does(model, prompts, one, tmp_path, sharing):
    """The same losses and gradients as of one process with the batch of both, and one voice.

    By FSDP2 the second process reads nothing; the recipe's parameters are on the CPU between uses, and stay gathered
    after the forward.
    """
    two = tmp_path / "two"
    argv = arguments(model, prompts, two, **CHANGES, per_device_train_batch_size=2)
    if sharing == "recipe":
        recipe = {"fsdp": True, "fsdp_config": {"cpu_offload": True, "reshard_after_forward": False}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        argv += [f"--config={tmp_path / 'recipe.yaml'}"]
    said = launch(argv) if sharing == "whole" else launch(argv, FSDP_ON_CPUS, tmp_path)
    for line in ("training: 29 examples", "held-out loss before", "held-out loss after", f"wrote {two}"):
        assert said.count(line) == 1, line
    check_log(one, two)
    assert {"adapter_model.safetensors", "loss.png", "README.md", "recipe.yaml"} <= set(names(two))
    same_adapters(one, two)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed: no weights are shared by it")
@pytest.mark.parametrize(("zero", "killed_after"), [("zero2", STEPS), ("zero3", STEPS // 2)])
def test_deepspeed_trains_as_one_process_does_and_goes_on(model, prompts, one, tmp_path, zero, killed_after):
    """Killed between two steps, or after the last: what goes on ends with the losses of one process."""
    two = tmp_path / "two"
    argv = [*arguments(model, prompts, two, **CHANGES, per_device_train_batch_size=2), f"--deepspeed={zero}"]
    launch([str(killed_after), *argv], DEEPSPEED_ON_CPUS, tmp_path, is_killed=True)
    assert not (two / "adapter_model.safetensors").exists()
    said = launch(["0", *argv], DEEPSPEED_ON_CPUS, tmp_path)
    for line in (f"going on from {two / f'checkpoint-{killed_after}'}", "held-out loss after", f"wrote {two}"):
        assert said.count(line) == 1, line
    check_log(one, two)
    same_adapters(one, two)
