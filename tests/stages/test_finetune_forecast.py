"""What `nf4kernels finetune` says of memory and time before and while it trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.chat_model import chat_model, facts
from support.finetune_run import STEPS, arguments, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from nf4kernels.cli import main  # noqa: E402
from nf4kernels.stages import traced_memory  # noqa: E402
from nf4kernels.stages.data.reading import read  # noqa: E402
from nf4kernels.stages.finetune import forecast, run  # noqa: E402
from nf4kernels.stages.finetune.loading import load_tokenizer  # noqa: E402
from nf4kernels.stages.finetune.recipe import read_recipe  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("models") / "chat", num_hidden_layers=2)


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": q, "completion": a} for q, a in facts(32)])


def trainer(model, data, out, **changes):
    recipe = read_recipe(None, arguments(model, data, out, **changes)[1:])
    split = read(recipe.sources, recipe.held_out)
    return run._trainer(recipe, split, load_tokenizer(recipe))


def test_parts_of_the_memory(model, prompts, tmp_path):
    """Weights and adapters are the tensors' bytes, AdamW has two numbers a number, and the model stays as it was."""
    found = trainer(model, prompts, tmp_path / "out", max_length=64)
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    memory = forecast.forecast_memory(found, 10**6)
    adapters = [parameter for parameter in found.model.parameters() if parameter.requires_grad]
    rest = [each for each in found.model.parameters() if not each.requires_grad] + list(found.model.buffers())
    assert memory.trained == 3 * sum(parameter.nbytes for parameter in adapters)
    assert memory.weights == sum(each.nbytes for each in {id(each): each for each in rest}.values())
    assert memory.total == memory.weights + memory.trained + memory.activations + 10**6
    assert memory.machine > memory.total
    after = found.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in found.model.parameters())


def test_activations_follow_the_recipe(model, tmp_path):
    rows = [{"text": f"{q} {a} " * 8} for q, a in facts(16)]
    data = write_rows(tmp_path / "text.jsonl", rows)
    found = trainer(model, data, tmp_path / "out", max_length=48)
    whole = forecast.forecast_memory(found, 0).activations
    with_checkpoints = trainer(model, data, tmp_path / "out", max_length=48, gradient_checkpointing=True)
    assert 0 < forecast.forecast_memory(with_checkpoints, 0).activations < whole
    found.args.max_length = 32
    shorter = forecast.forecast_memory(found, 0).activations
    assert 0 < shorter < whole
    found.args.per_device_train_batch_size = 2
    assert 0 < forecast.forecast_memory(found, 0).activations < shorter


def test_a_gpu_needs_no_copies_of_the_tiles_of_logits(model, prompts, tmp_path):
    found = trainer(model, prompts, tmp_path / "out")
    twin = traced_memory.without_values(found.model).train()
    peaks = []
    for device in ("cpu", "cuda"):
        with forecast._fused_head(device):
            peaks.append(forecast.peak_of_training(twin, 4, 64, 1, forecast._loss).total)
    assert peaks[1] < peaks[0]
    tile = 4 * 63 * 32768 * 4  # bytes of TRL's tile in fp32, the same forward and backward
    assert tile < peaks[1] < 2 * tile


def test_a_model_that_cannot_be_traced_is_trained_all_the_same(model, prompts, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("needs values\nhere")

    monkeypatch.setattr(run, "forecast_memory", refuse)
    monkeypatch.setattr(run, "answers", lambda *_: [])
    assert main(arguments(model, prompts, tmp_path / "out", max_steps=1)) == 0
    assert "memory: no estimate for this llama: needs values\n" in capsys.readouterr().out


def test_memory_and_time_are_said_and_the_bar_shows_them(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "answers", lambda *_: [])
    assert main(arguments(model, prompts, tmp_path / "out", disable_tqdm=False)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"memory: about \d+\.\d\d GiB at the peak \(weights .* this machine has \d+\.\d\d\n", out)
    assert re.search(rf"time: about \d\d:\d\d for {STEPS} steps, [\d.e-]+ s each", out)
    assert re.search(rf"{STEPS}/{STEPS} \[.*loss=[\d.]+, tokens/s=[\d.e+]+, memory=\d+\.\d\d GiB\]", err)
    assert "{'loss'" not in out + err


def test_a_bar_that_goes_on_counts_its_own_steps(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from nf4kernels.stages.finetune.progress import Clock, Progress

    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    state = TrainerState(global_step=90, max_steps=100)
    said = []
    bar, clock = Progress(), Clock(said.append, 30.0)
    for callback in (bar, clock):
        callback.on_train_begin(args, state, TrainerControl())
    for _ in range(4):
        state.global_step += 1
        for callback in (bar, clock):
            callback.on_step_end(args, state, TrainerControl())
    assert (bar.training_bar.initial, bar.training_bar.n) == (90, 94)
    assert len(said) == 1
    assert "for 10 steps" in said[0]
    assert said[0].endswith("and 00:30 for the held-out loss")
    bar.on_train_end(args, state, TrainerControl())


REAL = """
import ctypes, sys
from nf4kernels.stages.finetune import run
from nf4kernels.stages.finetune.recipe import read_recipe

ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system
forecast_memory = run.forecast_memory

def forecast(*args):
    memory = forecast_memory(*args)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    print("told", memory.total)
    return memory

run.forecast_memory = forecast
run.answers = lambda *_: []
run.finetune(read_recipe(None, sys.argv[1:]))
with open("/proc/self/status", encoding="utf-8") as file:
    print("took", next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_smollm2(prompts, tmp_path, checkpointing):
    """Within 10 % of the most that a real run's process had in memory after the forecast."""
    directory = os.environ.get("NF4KERNELS_SMOLLM2", ".cache/SmolLM2-135M-Instruct")
    if not Path(directory, "config.json").exists():
        pytest.skip("SmolLM2-135M-Instruct is not at hand: make demo downloads it")
    rows = [{"prompt": q, "completion": a * 40} for q, a in facts(8)]
    data = write_rows(tmp_path / "long.jsonl", rows)
    changes = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 128, "held_out": 0}
    argv = arguments(directory, data, tmp_path / "out", **changes, gradient_checkpointing=checkpointing)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", REAL, *argv], capture_output=True, encoding="utf-8", check=True, env=environment
    )
    told, took = (int(re.search(rf"{word} (\d+)", ran.stdout)[1]) for word in ("told", "took"))
    assert told == pytest.approx(took, rel=0.1)
