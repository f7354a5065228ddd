"""`nf4kernels recover distill` on a small random Llama: it learns from its teacher, resumes, caches and refuses."""

import csv
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from support.chat_model import chat_model, facts
from support.finetune_run import FIELDS, names, train_in_child, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is distilled")

from transformers import AutoModelForCausalLM, TrainingArguments  # noqa: E402

import nf4kernels as nf4  # noqa: E402
from nf4kernels.cli import main  # noqa: E402
from nf4kernels.recover import DistillLoss, EarlierSelf, Hint, LiveTeacher, agreement  # noqa: E402
from nf4kernels.recover.heads import HeadReader  # noqa: E402
from nf4kernels.stages.finetune.trainer import WHOLE  # noqa: E402
from nf4kernels.stages.recover.distill_trainer import DistillTrainer  # noqa: E402

ADAPTERS = "adapter_model.safetensors"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["support.finetune_run", "nf4kernels.stages.recover.distill"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`peaked` says something: its head is scaled up, so that rounding it costs."""
    directory = tmp_path_factory.mktemp("models")
    for name, seed in (("peaked", 0), ("other", 1)):
        chat_model(directory / name, seed=seed, template=None)
        model = AutoModelForCausalLM.from_pretrained(directory / name)
        with torch.no_grad():
            model.lm_head.weight *= 30
        model.save_pretrained(directory / name)
    chat_model(directory / "wide", template=None, hidden_size=96, num_hidden_layers=1)
    return directory


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": f"{q} {a}"} for q, a in facts(32)])


def arguments(model, out, /, **changes) -> list[str]:
    fields = {"model": model, "output_dir": out, **FIELDS, "max_length": 32, "per_device_eval_batch_size": 4, **changes}
    argv = ["recover", "distill"]
    for name, value in fields.items():
        argv += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return argv


def log(out):
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def divergences(said):
    return [float(said.split(f"KL to the teacher {when}: ")[1].split()[0]) for when in ("before", "after")]


def test_it_learns_what_the_16_bit_model_says(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(models / "peaked", out, data=texts, max_steps=20, learning_rate=1e-3, lora_dropout=0)) == 0
    said = capsys.readouterr().out
    before, after = divergences(said)
    assert 0 < after < 0.8 * before
    rows = log(out)
    assert len(rows) == 20
    assert all(row["soft"] == row["loss"] or float(row["soft"]) == pytest.approx(float(row["loss"]), rel=0.01)
               for row in rows)  # fmt: skip
    picture = (out / "loss.png").read_bytes()  # KL and loss below each other: 7 inches of 120 dots
    assert int.from_bytes(picture[20:24], "big") == 840
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| KL to the teacher after | {after:.4f} |" in card
    assert "`nf4kernels recover distill --config recipe.yaml` runs it again" in card
    assert "| rank | 4 |" in card
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4


def from_adapter(model, out, adapter, /, **changes) -> list[str]:
    argv = [each for each in arguments(model, out, **changes) if not each.startswith("--lora_")]
    return [*argv, f"--adapter={adapter}"]


def test_it_goes_on_from_the_adapter_that_a_rounding_left(models, texts, tmp_path, capsys):
    start, out = tmp_path / "start", tmp_path / "out"
    made = ["--text", str(texts), "--tokens", "800", "--length", "32", "--method", "lq-lora+gptq", "--rank", "8"]
    assert main(["recover", "round", str(models / "peaked"), str(start), *made]) == 0
    assert main(arguments(models / "peaked", tmp_path / "plain", data=texts, max_steps=1)) == 0
    plain, _ = divergences(capsys.readouterr().out)
    changes = {"data": texts, "teacher": models / "peaked", "max_steps": 10, "learning_rate": 2e-4}
    assert main(from_adapter(start, out, start / "adapter", **changes)) == 0
    before, after = divergences(capsys.readouterr().out)
    assert before < 0.5 * plain
    assert after < before
    stored = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (stored["r"], stored["base_model_name_or_path"]) == (8, str(start))
    # what is wrong with an adapter
    argv = from_adapter(models / "peaked", tmp_path / "new", start / "adapter", data=texts)
    assert main(argv) == 2
    assert f"--adapter must be of the model {models / 'peaked'}, got one of {start}" in capsys.readouterr().err
    for flag, came in (("--lora_r=16", "16"), ("--use-dora", "True")):  # defaults, too
        assert main([*argv, flag]) == 2
        assert f"with --adapter, which has its own, got {came}" in capsys.readouterr().err
    assert main(from_adapter(models / "peaked", tmp_path / "new", tmp_path, data=texts)) == 2
    assert f"--adapter must be a directory with an adapter of PEFT, got {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow  # three trainings, one of them killed
def test_killed_and_resumed_it_gives_the_same_bytes(models, texts, tmp_path):
    changes = {"data": texts, "hard": 0.1, "hint": 0.1, "layers": "model.layers.0:model.layers.0", "max_steps": 6,
               "teacher": models / "wide"}  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(models / "peaked", whole, **changes)) == 0
    argv = arguments(models / "peaked", out, **changes)
    child = FORKS.Process(target=train_in_child, args=(argv, tmp_path / "child.txt"))
    child.start()
    while child.is_alive() and not (out / "checkpoint-2" / WHOLE).exists():
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert main(argv) == 0
    for name in ("log.csv", ADAPTERS):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {"soft", "hard", "hint"} < set(log(out)[0])


def test_text_of_any_kind_and_the_teachers_own(models, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"{q} {a}" for q, a in facts(40)), encoding="utf-8")
    out = tmp_path / "out"
    changes = {"text": text, "text_tokens": 400, "samples": 20, "max_steps": 2, "max_length": 24}
    assert main(arguments(models / "peaked", out, **changes)) == 0
    said = capsys.readouterr().out
    assert "book.txt: 18 texts of at most 24 tokens" in said
    assert "the teacher wrote 20 texts of 24 tokens" in said
    files = sorted((out / ".made").iterdir())
    assert [file.name.partition("-")[0] for file in files] == ["samples", "samples", "text"]
    rows = [json.loads(line) for file in files[:2] for line in file.read_text(encoding="utf-8").splitlines()]
    assert 15 <= len(rows) <= 20
    assert len({row["text"] for row in rows}) > 10
    assert "training: " in said


def test_a_cached_teacher_trains_as_the_live_one(models, texts, tmp_path, capsys):
    live, cached = tmp_path / "live", tmp_path / "cached"
    changes = {"data": texts, "max_steps": 4, "temperature": 2.0}
    assert main(arguments(models / "peaked", live, **changes)) == 0
    of_live = divergences(capsys.readouterr().out)
    changes.update(teacher_cache=tmp_path / "cache", cache_top_k=384)
    assert main(arguments(models / "peaked", cached, **changes)) == 0
    said = capsys.readouterr().out
    assert "teacher's 384 likeliest tokens of 32 examples: " in said
    assert divergences(said) == pytest.approx(of_live, rel=0.01)
    for ours, theirs in zip(log(cached), log(live)):
        assert float(ours["soft"]) == pytest.approx(float(theirs["soft"]), rel=0.01)


def test_several_teachers(models, texts, tmp_path):
    changes = {"data": texts, "max_steps": 1, "teacher": [models / "peaked", models / "other"]}
    assert main(arguments(models / "peaked", tmp_path / "out", **changes, teacher_weights=[3, 1])) == 0
    assert float(log(tmp_path / "out")[0]["soft"]) > 0.05


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": None}, "--data, --text or --samples must say what to learn on"),
        ({"teacher": "nowhere/at/all"}, "--teacher must be a model that can be loaded, got nowhere/at/all"),
        ({"teacher_weights": [1, 2]}, "--teacher_weights must be one a teacher, 1, got 2"),
        ({"soft": 0}, "weights must be 0 or more and one of them above 0"),
        ({"temperature": -1}, "temperature must be above 0"),
        ({"cosine": 1}, "--layers must be STUDENT:TEACHER"),
        ({"layers": "a:b"}, "--layers must be STUDENT:TEACHER"),
        ({"cosine": 1, "layers": "no.layer:no.layer", "max_steps": 1}, "layer must name one module"),
        (
            {"packing": True, "teacher_cache": "c"},
            "--packing and --padding_free must be left out with --teacher_cache",
        ),
        ({"dataloader_drop_last": True, "teacher_cache": "c"}, "--dataloader_drop_last must be left out"),
        ({"top_k": 128, "teacher_cache": "c"}, "--top_k must be at most --cache_top_k, 64, got 128"),
        ({"cache_top_k": 8}, "--cache_top_k must come with --teacher_cache, got 8 without"),
        (
            {"samples": 1, "sample_temperature": 0.0},
            "--samples and --sample_temperature must be 0 or more, and above 0",
        ),
        (
            {"hint": 1, "layers": "model.layers.0:model.layers.0", "teacher_cache": "c"},
            "--teacher_cache must come with",
        ),
        ({"text": "no.txt"}, "--text must be a file that can be read"),
        ({"top_p": 1}, "did you mean --top_k?"),
    ],
)
def test_what_is_wrong_is_said(models, texts, tmp_path, capsys, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fields = {name: value for name, value in {"data": texts, **changes}.items() if value is not None}
    had = names(tmp_path)
    assert main(arguments(models / "peaked", tmp_path / "out", **fields)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nf4kernels recover: ")
    assert expected in error
    if "no.layer:no.layer" not in changes.values():
        assert names(tmp_path) == had


def test_a_model_in_4_bits_needs_another_teacher(models, texts, tmp_path, capsys):
    assert main(["quantize", str(models / "peaked"), str(tmp_path / "small")]) == 0
    assert main(arguments(tmp_path / "small", tmp_path / "out", data=texts)) == 2
    assert "--teacher must be named for a model that is stored in 4 bits" in capsys.readouterr().err
    changes = {"data": texts, "teacher": models / "peaked", "max_steps": 1}
    assert main(arguments(tmp_path / "small", tmp_path / "out", **changes)) == 0


def test_the_plain_trainer_of_transformers(models, tmp_path):
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(models / "peaked")
    student = AutoModelForCausalLM.from_pretrained(models / "peaked")
    nf4.quantize_model(student, lora=nf4.LoraConfig(r=4, alpha=8), progress=False)
    nf4.prepare_for_training(student, checkpointing=False)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 380, (16, 12))]
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    assert HeadReader(student).rows(batch).head is student.lm_head, "logits in chunks"
    average = EarlierSelf(student, decay=0.5)
    started = {parameter: kept.clone() for parameter, kept in average.kept.items()}
    loss = DistillLoss(layers=[Hint("layers.1", "layers.1", (64, 64), weight=0.01)])
    first = loss.layers[0].project.weight.detach().clone()
    before = agreement(student, teacher, [batch]).kl
    for guide, steps in ((LiveTeacher(teacher), 12), (average, 3)):
        trainer = DistillTrainer(
            student, TrainingArguments(
                str(tmp_path), max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=8, report_to=[],
                use_cpu=True, save_strategy="no", logging_steps=1, eval_strategy="no", disable_tqdm=True,
            ), train_dataset=rows, eval_dataset=rows, distill_loss=loss, teacher=guide,
        )  # fmt: skip
        trainer.train()
        if guide is not average:
            assert agreement(student, teacher, [batch]).kl < before
            found = trainer.evaluate()
            assert found["eval_kl"] == pytest.approx(agreement(student, teacher, [batch]).kl, rel=1e-3)
            assert found["eval_loss"] == pytest.approx(agreement(student, teacher, [batch]).loss, rel=1e-3)
    assert not torch.equal(first, loss.layers[0].project.weight)
    assert any(not torch.equal(started[parameter], kept) for parameter, kept in average.kept.items())
