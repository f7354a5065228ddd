"""recover plan from a directory to a plan, its picture and the model that quantize makes of it; and the search."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from support.compared_model import TEXT, small_model, transformers

import nf4kernels.integrations.transformers  # noqa: F401  by which transformers knows the method
from nf4kernels.cli import main
from nf4kernels.recover import Candidate, Option, Plan, Sensitivities, make_plan
from nf4kernels.stages.errors import StageError

optuna = pytest.importorskip("optuna", reason="optuna is not installed: no plan is searched")
from nf4kernels.stages.recover.plan import (  # noqa: E402
    PlanOptions,
    plan_directory,
    read_bytes,
    read_candidate,
)
from nf4kernels.stages.recover.search import search  # noqa: E402

WORDS = ["nf4:64", "nf4:1024", "nf4:16:float32", "dense"]


@pytest.fixture(scope="module", name="directory")
def directory_(tmp_path_factory):
    directory = tmp_path_factory.mktemp("planned")
    small_model(directory / "model", torch.bfloat16)
    (directory / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    return directory


def options(directory, name, **fields):
    usual = {"tokens": 200, "length": 32, "candidates": WORDS, "bits": 5.8}
    files = {"model": str(directory / "model"), "text": str(directory / "text.txt")}
    return PlanOptions(**files, output=str(directory / name), **(usual | fields))


def planned(directory, name, **fields):
    return plan_directory(options(directory, name, **fields), progress=False)


def test_a_plan_is_made_written_drawn_and_quantized(directory, capsys):
    flags = ["--model", directory / "model", "--text", directory / "text.txt", "--output", directory / "plan.json"]
    fields = ["--bits", 5.8, "--tokens", 200, "--length", 32, "--candidates", *WORDS]
    assert main(["recover", "plan", *map(str, flags + fields)]) == 0
    text = capsys.readouterr().out
    assert "the plan" in text
    assert "layers nf4 64" in text
    plan = Plan.load(directory / "plan.json")
    assert 5.4 < plan.bits <= 5.8
    assert (directory / "plan.png").read_bytes()[1:4] == b"PNG"
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        assert plan[f"{attention}.q_proj"] == plan[f"{attention}.k_proj"] == plan[f"{attention}.v_proj"]

    out = directory / "quantized"
    command = ["quantize", directory / "model", out, "--plan", directory / "plan.json"]
    assert main([*map(str, command)]) == 0
    assert "bitsandbytes does not read a plan" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, chosen in plan.items():
        layer = loaded.get_submodule(name)
        if chosen is None:
            assert type(layer) is torch.nn.Linear
        else:
            assert (layer.block_size, layer.scales) == (
                chosen["block_size"], "double" if chosen.get("double_quant", True) else "float32"
            )  # fmt: skip
    assert main(["inspect", str(out)]) == 0


def test_the_lines_are_measured_and_another_budget_measures_no_layer_again(directory, monkeypatch):
    first = planned(directory, "lines.json")
    measured = json.loads((directory / "lines.sensitivity.json").read_text(encoding="utf-8"))
    module = sys.modules["nf4kernels.recover.sensitivity"]
    monkeypatch.setattr(module._Work, "_kl", lambda *args: pytest.fail("it was measured again"))
    second = planned(directory, "lines.json", bits=7.0)
    assert json.loads((directory / "lines.sensitivity.json").read_text(encoding="utf-8")) == measured
    names = ["nf4 64", "nf4 1024", "nf4 16 double_quant=False", "dense", "the plan"]
    assert [line.name for line in first.lines] == names
    dense = first.lines[3]
    assert (dense.bits, dense.measured) == (16.0, 0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    assert dense.nbytes == sum(p.nbytes for p in model.parameters())
    for line in first.lines[:3]:
        assert 0.3 < line.expected / line.measured < 3
    assert second.lines[-1].measured < first.lines[-1].measured
    assert first.lines[-1].bits <= 5.8


def test_bytes_are_of_the_whole_model(directory):
    whole = planned(directory, "whole.json")
    again = planned(directory, "whole.json", bits=None, bytes=str(whole.lines[-1].nbytes))
    assert again.plan.kl == pytest.approx(whole.plan.kl)
    with pytest.raises(StageError, match=r"the budget must be at least \d+ bytes.*--bytes are of the whole model"):
        planned(directory, "whole.json", bits=None, bytes="1k")


def test_below_four_bits_blocks_are_dropped_and_quantize_says_so(directory, capsys):
    with pytest.raises(StageError, match="the budget must be at least"):
        planned(directory, "low.json", bits=3.0)
    done = planned(directory, "dropped.json", bits=3.0, drop=True)
    assert not done.plan.is_plain
    assert done.plan.bits <= 3.0
    assert done.lines[-1].measured > done.lines[0].measured
    command = ["quantize", directory / "model", directory / "none", "--plan", directory / "dropped.json"]
    assert main([*map(str, command)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--plan must leave each layer one layer" in line
    assert not (directory / "none").exists()


def test_time_counts_and_a_search_goes_on(directory, monkeypatch):
    module = sys.modules["nf4kernels.stages.recover.search"]
    monkeypatch.setattr(module, "ROTATED", 1 << 15)
    monkeypatch.setattr(module, "LEAST", 1e-4)
    fields = {"bits": 6.5, "milliseconds": 1e3, "trials": 6}
    done = planned(directory, "searched.json", **fields)
    assert done.lines[-1].seconds > 0
    assert done.lines[-1].measured <= planned(directory, "searched.json", bits=6.5).lines[-1].measured
    monkeypatch.setattr(optuna.Trial, "suggest_categorical", lambda *args: pytest.fail("a trial was run again"))
    again = planned(directory, "searched.json", **fields)
    assert again.plan == done.plan
    with pytest.raises(StageError, match="most_seconds must be at least"):
        planned(directory, "searched.json", bits=6.5, milliseconds=1e-9)


def test_a_search_finds_what_a_sum_does_not_tell():
    """Two layers whose errors cancel: the sum of the KL says otherwise, and so do the exact plan's choices."""
    fine, wide = Candidate({"block_size": 32}), Candidate({"block_size": 512})
    cells = [Option((f"l{i}",), c, size, kl) for i in range(6) for c, size, kl in ((fine, 20, 0.1), (wide, 10, 0.2))]
    found = Sensitivities(600, 1, "measured", tuple(cells))
    start = make_plan(found, nbytes=90)

    def measured(plan):
        return 0.05 if plan.layers["l0"] == plan.layers["l3"] == wide else plan.kl

    tried = search(found, start, 90, None, float("inf"), measured, 60, progress=False)
    assert min(one.kl for one in tried) == 0.05
    assert all(one.plan.nbytes <= 90 for one in tried)
    again = search(found, start, 90, None, float("inf"), measured, 60, progress=False)
    assert [one.plan for one in tried] == [one.plan for one in again]


def test_a_search_that_was_interrupted_ends_and_another_text_is_searched_anew(tmp_path):
    fine, wide = Candidate({"block_size": 32}), Candidate({"block_size": 512})
    cells = [Option((f"l{i}",), c, size, kl) for i in range(6) for c, size, kl in ((fine, 20, 0.1), (wide, 10, 0.2))]
    found, log, calls = Sensitivities(600, 1, "measured", tuple(cells)), tmp_path / "log", []
    start = make_plan(found, nbytes=90)

    def measured(plan):
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plan.kl

    with pytest.raises(KeyboardInterrupt):
        search(found, start, 90, None, float("inf"), measured, 8, storage=log, progress=False)
    tried = search(found, start, 90, None, float("inf"), measured, 8, storage=log, progress=False)
    assert 0 < len(tried) <= 8
    assert start in [one.plan for one in tried]
    other = Sensitivities(600, 1, "measured", tuple(replace(each, kl=2 * each.kl) for each in cells))
    calls.clear()
    calls += [None] * 3  # no further interrupt
    search(other, make_plan(other, nbytes=90), 90, None, float("inf"), measured, 4, storage=log, progress=False)
    assert len(calls) > 3


def test_words_of_candidates():
    assert read_candidate("fp4").options == {"codebook": "fp4"}
    assert read_candidate("nf4:128:dynamic8").options == {
        "codebook": "nf4", "block_size": 128, "double_quant": True, "scale_codebook": "dynamic8",
    }  # fmt: skip
    assert read_candidate("nf4:64+r8").options["lora"].r == 8
    assert read_candidate("rank12/nf4:64").rank == 12
    assert read_candidate("rank12/dense") == Candidate(rank=12)
    for word in ("nf5", "nf4:65", "nf4:64:fp8", "nf4:64:e4m3:3", "nf4+8", "rankx/nf4", "rank0/nf4", "dense+r3", ""):
        with pytest.raises(StageError, match="--candidates must be of"):
            read_candidate(word)
    assert [read_bytes(word) for word in ("90M", "1.5Gi", "12", "3kB")] == [90_000_000, 3 << 29, 12, 3000]
    for word in ("M", "3X", "", "1.2.3"):
        with pytest.raises(StageError, match="--bytes must be a number"):
            read_bytes(word)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": None}, "--text must be given, got none"),
        ({"bytes": "3M"}, "--bits or --bytes must be given, got both"),
        ({"bits": None}, "--bits or --bytes must be given, got neither"),
        ({"output": "plan.yaml"}, "--output must be a .json"),
        ({"output": "no-such-directory/plan.json"}, "--output must be a .json"),
        ({"method": "guess"}, "--method must be one of measured"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"tokens": 0}, "--tokens and --length must be at least"),
        ({"milliseconds": 0.0}, "--trials and --milliseconds must be above 0"),
        ({"model": "no-such-directory"}, "MODEL must be the directory"),
    ],
)
def test_wrong_fields(directory, fields, message):
    wrong = options(directory, "wrong.json")
    for name, value in fields.items():
        setattr(wrong, name, value)
    with pytest.raises(StageError, match=message):
        plan_directory(wrong, progress=False)
    assert not (directory / "wrong.json").exists()
