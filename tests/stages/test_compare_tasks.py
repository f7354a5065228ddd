"""`nf4kernels compare --tasks`: lm-evaluation-harness on a task file written here, with the network not asked."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: no task is run")
from support.chat_model import chat_model, facts

import nf4kernels
from nf4kernels.cli import main
from nf4kernels.stages.compare import tasks
from nf4kernels.stages.compare.variants import Variant

transformers = pytest.importorskip("transformers")
ANSWERS = ("red", "green", "blue", "yellow")


@pytest.fixture
def model(tmp_path):
    return chat_model(tmp_path / "model", num_hidden_layers=1, initializer_range=0.3)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A directory with the task `colours`: 40 questions with four answers each."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "tasks"
    directory.mkdir()
    rows = [{"question": q, "choices": list(ANSWERS), "gold": i % 4} for i, (q, _) in enumerate(facts(40))]
    data = directory / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "colours.yaml").write_text(
        f"""
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data))}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: brier_score
    higher_is_better: false
metadata:
  version: 1
""",
        encoding="utf-8",
    )
    (directory / "group.yaml").write_text(
        "group: paints\ntask: [colours]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 1}\n",
        encoding="utf-8",
    )
    return directory


def measured(model, tokenizer, count: int) -> tuple[float, float]:
    """Accuracy and Brier score, by the sums of log-probabilities of each question's answers."""
    right = brier = 0.0
    for i, (question, _) in enumerate(facts(count)):
        sums = []
        for answer in ANSWERS:
            texts = (question, f"{question} {answer}")
            asked, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logits[p - 1, whole[p]].item() for p in range(len(asked), len(whole))))
        right += sums.index(max(sums)) == i % 4
        chances = torch.tensor(sums).softmax(0)
        chances[i % 4] -= 1
        brier += chances.square().sum().item()
    return right / count, brier / count


def test_metrics_are_those_of_the_dense_and_the_quantized_model(model, task):
    compared = [Variant("nf4", 64, "e4m3"), Variant("int4", 64, "float32")]
    got = tasks.compare_tasks(model, ["colours"], compared, task, progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = []
    for variant in (None, *compared):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        if variant is not None:
            nf4kernels.quantize_model(loaded, progress=False, **variant.quantize_options())
        expected.append(measured(loaded, tokenizer, 40))
    for row, (share, brier) in zip(got.rows, expected):
        accuracy, score = row.metrics
        assert (accuracy.task, accuracy.name, accuracy.value) == ("colours", "acc", share)
        assert accuracy.stderr == pytest.approx(math.sqrt(share * (1 - share) / 39))
        assert (score.name, score.value) == ("brier_score", pytest.approx(brier, rel=1e-3))
    assert 0 < expected[0][0] < 1
    assert all(abs(brier / expected[0][1] - 1) > 0.01 for _, brier in expected[1:])
    assert [row.variant for row in got.rows] == [None, *compared]
    assert got.rows[0].bits is None
    assert got.rows[1].bits > 4


def test_command(model, task, capsys):
    flags = ["--codebooks", "nf4", "--scales", "e4m3", "--tasks-path", str(task), "--tasks-limit", "4"]
    assert main(["compare", str(model), "--tasks", "paints", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["tasks"]
    assert (result["tasks"], result["limit"]) == (["paints"], 4)
    dense, nf4 = result["variants"]
    assert (dense["codebook"], nf4["codebook"], nf4["block_size"]) == ("dense", "nf4", 64)
    assert {metric["task"] for metric in nf4["metrics"]} == {"paints", "colours"}
    assert all(metric["value"] * 4 == int(metric["value"] * 4) for metric in nf4["metrics"] if metric["name"] == "acc")
    text = task.parent / "text.txt"
    text.write_text(" ".join(question for question, _ in facts(8)), encoding="utf-8")
    assert main(["compare", str(model), "--text", str(text), "--tasks", "paints", *flags]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    heading = next(line for line in out.splitlines() if "paints acc" in line)
    assert "colours" not in heading
    assert out.splitlines()[-1].startswith("nf4 ")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tasks-limit", "0"], "--tasks-limit must be at least 1, got 0"),
        (["--tasks-fewshot", "-1"], "--tasks-fewshot must be 0 or more, got -1"),
        (["--tasks-path", "absent"], "--tasks-path must be a directory of task files, got absent"),
    ],
)
def test_refused(model, task, capsys, flags, expected):
    assert main(["compare", str(model), "--tasks", "colours", "--tasks-path", str(task), *flags]) == 2
    assert expected in capsys.readouterr().err


def test_a_task_without_its_data_is_refused_in_a_line(model, task, capsys):
    (task / "colours.jsonl").unlink()
    assert main(["compare", str(model), "--tasks", "colours", "--tasks-path", str(task)]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("nf4kernels compare: --tasks must be loadable, got FileNotFoundError: ")


@pytest.mark.slow
def test_unknown_task_is_refused(model, task, capsys):
    """Slow: the harness reads its own thousands of files first."""
    assert main(["compare", str(model), "--tasks", "colors", "--tasks-path", str(task)]) == 2
    assert (
        "--tasks must be of lm-evaluation-harness or of a file in --tasks-path, got colors" in capsys.readouterr().err
    )


def test_a_missing_harness_is_named(model, capsys, monkeypatch):
    from nf4kernels.cli import errors

    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "lm_eval" else name)
    assert main(["compare", str(model), "--tasks", "colours"]) == 2
    assert "lm_eval must be installed for --tasks, run: pip install lm_eval" in capsys.readouterr().err
