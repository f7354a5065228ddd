"""`nf4kernels compare --finetune` on a small random Llama: the runs are fine-tunes that differ in weights alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import smollm2
from support.chat_model import chat_model, facts

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from safetensors.torch import load_file  # noqa: E402

from nf4kernels.cli import main  # noqa: E402
from nf4kernels.stages.compare import finetunes  # noqa: E402
from nf4kernels.stages.compare.losses import Run, TunedComparison, TunedVariant  # noqa: E402
from nf4kernels.stages.compare.variants import Variant  # noqa: E402
from nf4kernels.stages.finetune import run as finetune_run  # noqa: E402
from nf4kernels.stages.finetune.loading import load_tokenizer  # noqa: E402
from nf4kernels.stages.finetune.recipe import read_recipe  # noqa: E402

FIELDS = [
    "--max_steps=2", "--learning_rate=5e-3", "--logging_steps=1", "--per_device_train_batch_size=4", "--lora_r=4",
    "--gradient_checkpointing=false", "--disable_tqdm=true", "--dtype=float32",
]  # fmt: skip
RUNS = ("dense-seed0", "dense-seed1", "nf4-64-e4m3-seed0", "nf4-64-e4m3-seed1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "chat"
    chat_model(directory, num_hidden_layers=1)
    return directory


def write_facts(path: Path, count: int = 16) -> Path:
    rows = [{"prompt": question, "completion": answer} for question, answer in facts(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(model, data, out, *flags: str) -> list[str]:
    ours = ["--codebooks", "nf4", "--seeds", "0", "1"]
    return ["compare", str(model), "--finetune", str(data), "--output", str(out), *ours, *FIELDS, *flags]


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """A finished comparison; a test that changes it copies it first."""
    directory = tmp_path_factory.mktemp("compared")
    data = write_facts(directory / "facts.jsonl")
    assert main(command(model, data, directory / "out")) == 0
    return directory


def result_of(out: Path) -> dict:
    return json.loads((out / finetunes.RESULT).read_text(encoding="utf-8"))


def started(out: Path, name: str) -> dict:
    return json.loads((out / name / finetune_run.START).read_text(encoding="utf-8"))


def test_each_run_is_a_fine_tune_of_its_own(model, compared, tmp_path, capsys):
    """What the table says of a run is what `nf4kernels finetune` finds with the same seed, weights and recipe."""
    out = compared / "out"
    assert sorted(entry.name for entry in out.iterdir() if entry.is_dir()) == sorted(RUNS)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    alone = ["--seed=1", "--split_seed=42", f"--output_dir={tmp_path / 'alone'}", "--codebook=nf4", "--block_size=64"]
    files = [f"--model={model}", f"--data={compared / 'facts.jsonl'}"]
    assert main(["finetune", *files, *alone, *FIELDS]) == 0
    capsys.readouterr()
    expected = started(tmp_path, "alone")
    _, nf4 = result_of(out)["variants"]
    assert nf4["runs"][1] == {
        "seed": 1, "before": expected["held_out_loss"], "after": expected["held_out_loss_after"]
    }  # fmt: skip
    assert nf4["after"] == pytest.approx(sum(run["after"] for run in nf4["runs"]) / 2)


def test_runs_differ_in_weights_and_seed_alone(compared):
    """The same held-out loss before for every seed; other weights, another loss; after LoRA it is lower."""
    dense, nf4 = result_of(compared / "out")["variants"]
    for row in (dense, nf4):
        first, second = row["runs"]
        assert first["before"] == second["before"]
        assert first["after"] != second["after"]
        assert row["after_max"] < row["before"]
    assert dense["before"] != nf4["before"]
    assert len({started(compared / "out", name)["tokens"] for name in RUNS}) == 1


def test_adapters_begin_the_same_on_dense_and_4_bit_weights(model, compared, tmp_path):
    def adapters(codebook: str, seed: int) -> dict[str, torch.Tensor]:
        flags = [f"--model={model}", f"--data={compared / 'facts.jsonl'}", f"--output_dir={tmp_path / 'none'}"]
        recipe = read_recipe(None, [*flags, f"--codebook={codebook}", f"--seed={seed}", *FIELDS])
        split = finetune_run.read(recipe.sources, recipe.held_out, 0)
        trainer = finetune_run._trainer(recipe, split, load_tokenizer(recipe))
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}

    dense, nf4, other = adapters("dense", 0), adapters("nf4", 0), adapters("dense", 1)
    assert list(dense) == list(nf4)
    assert len(dense) == 2 * 7
    assert all(torch.equal(dense[name], nf4[name]) and dense[name].dtype == nf4[name].dtype for name in dense)
    assert not torch.equal(next(iter(dense.values())), next(iter(other.values())))


def test_dense_adapters_are_peft_s(model, compared):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), compared / "out" / "dense-seed0")
    stored = load_file(compared / "out" / "dense-seed0" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in tuned.named_parameters() if "lora_" in name}
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name]) for name in stored)
    assert "dense" in (compared / "out" / "dense-seed0" / "README.md").read_text(encoding="utf-8")


def test_goes_on_where_it_was_killed(model, compared, tmp_path, monkeypatch, capsys):
    """An interrupt in the second run's training: the first is kept as it is, and the result is the same."""
    out = tmp_path / "out"
    data = compared / "facts.jsonl"
    trained = []
    finetune = finetunes.finetune

    def interrupted(recipe, **options):
        trained.append(recipe.out.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return finetune(recipe, **options)

    monkeypatch.setattr(finetunes, "finetune", interrupted)
    assert main(command(model, data, out)) == 130
    kept = (out / RUNS[0] / finetune_run.START).stat().st_mtime_ns
    capsys.readouterr()
    assert main(command(model, data, out, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["finetune"].items() <= result_of(out).items()
    assert trained == [RUNS[0], RUNS[1], *RUNS[1:]]
    assert (out / RUNS[0] / finetune_run.START).stat().st_mtime_ns == kept
    assert result_of(out) == result_of(compared / "out")
    trained.clear()
    assert main(command(model, data, out)) == 0  # all is there: nothing is trained
    assert main([*command(model, data, out), "--seeds", "1"]) == 0
    assert trained == []
    assert [run["seed"] for run in result_of(out)["variants"][0]["runs"]] == [1]


def test_output_of_another_recipe_or_data_is_refused(model, compared, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for changed, expected in (
        (command(model, compared / "facts.jsonl", out, "--lora_r=8"), "--output must hold a run of this recipe, got "),
        (command(model, write_facts(compared / "fewer.jsonl", 12), out), "whose run has data="),
    ):
        assert main(changed) == 2
        assert expected in capsys.readouterr().err
    data = shutil.copy(compared / "facts.jsonl", tmp_path / "facts.jsonl")
    assert main(command(model, data, tmp_path / "mine", "--seeds", "0", "--max_steps=1")) == 0
    data.write_text(data.read_text(encoding="utf-8").replace("red", "dull"), encoding="utf-8")
    capsys.readouterr()
    assert main(command(model, data, tmp_path / "mine", "--seeds", "0", "--max_steps=1")) == 2
    assert "--output must hold runs on this data, got " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seeds", "1", "1"], "--seeds must be different numbers from 0 on, got 1 1"),
        (["--seed=3"], "--seed must be left out: say --seeds"),
        (["--codebook", "fp4"], "--codebook must be left out: say --codebooks"),
        (["--held_out=0"], "--held_out must be above 0"),
        (["--lora_rank=3"], "--lora_rank=3 must be a field of SFTConfig"),
        (["--plot", "a.png"], "--plot must come with --text"),
        (["--tasks-limit", "3"], "--tasks-limit must come with --tasks"),
        (["--finetune", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_refused(model, tmp_path, capsys, flags, expected):
    data = write_facts(tmp_path / "facts.jsonl")
    assert main(command(model, data, tmp_path / "out", *flags)) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("nf4kernels compare: ")
    assert expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--text FILE, --tasks NAME or --finetune DATA must be given"),
        (["--finetune", "a.jsonl"], "--output must be a directory to write, for --finetune, got none"),
        (["--text", "a.txt", "--max_steps", "3"], "--max_steps must come with --finetune"),
        (["--finetune", "a.jsonl", "--output", "out", "--device", "cuda:1"], "--device must be cpu or cuda with"),
        pytest.param(
            ["--finetune", "a.jsonl", "--output", "out", "--device", "cuda"],
            "--device must be one that is there",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_flags_that_miss_another(model, tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(model), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_data_and_a_foreign_output_leave_everything(model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n', encoding="utf-8")
    assert main(command(model, bad, tmp_path / "out")) == 2
    assert "bad.jsonl line 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(command(model, write_facts(tmp_path / "facts.jsonl"), tmp_path / "mine")) == 2
    assert "--output must be new or hold runs of this comparison" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_table_and_json_have_the_spread_over_seeds():
    variant = Variant("fp4", 32, "float32")
    rows = [
        TunedVariant(None, [Run(0, 3.0, 1.0), Run(1, 3.0, 2.0), Run(2, 3.0, 3.0)]),
        TunedVariant(variant, [Run(0, 4.0, 1.5), Run(1, 4.0, 2.0), Run(2, 4.0, 4.0)]),
    ]
    comparison = TunedComparison(10, 100, 2, "float32", rows)
    dense, fp4 = comparison.as_dict()["variants"]
    assert (dense["codebook"], dense["after"], dense["after_std"], dense["over_dense"]) == ("dense", 2.0, 1.0, 0.0)
    assert (fp4["codebook"], fp4["block_size"], fp4["after_min"], fp4["after_max"]) == ("fp4", 32, 1.5, 4.0)
    assert (fp4["over_dense"], fp4["over_dense_std"]) == (0.5, 0.5)
    *_, line = str(comparison).splitlines()
    assert " ".join(line.split()) == "fp4 32 float32 4.0000 2.5000 1.3229 1.5000 .. 4.0000 +0.5000 0.5000"
    single = TunedComparison(10, 100, 2, "float32", [TunedVariant(row.variant, row.runs[:1]) for row in rows])
    assert single.as_dict()["variants"][1]["after_std"] is None
    assert str(single).splitlines()[-1].split()[-1] == "-"


def test_variants_come_from_flags_or_the_recipe(model, tmp_path):
    data = [write_facts(tmp_path / "facts.jsonl")]
    config = tmp_path / "recipe.yaml"
    config.write_text("block_size: 128\ndouble_quant: false\nseed: 7\ncodebook: af4\n", encoding="utf-8")

    def plan(codebooks, sizes=None, scales=None):
        return finetunes.plan_finetunes(model, data, tmp_path / "out", codebooks, sizes, scales, [3], config, [])

    dense, nf4, mxfp4 = plan(["nf4", "mxfp4"])
    assert dense.recipe.quantization is None
    assert [each.recipe.out.name for each in (dense, nf4, mxfp4)] == [
        "dense-seed3", "nf4-128-float32-seed3", "mxfp4-32-e8m0-seed3"
    ]  # fmt: skip
    for each in (nf4, mxfp4):
        assert each.recipe.quantization.quant_options["block_size"] == each.variant.block_size
        assert each.recipe.quantization.codebook_name == each.variant.codebook
        assert (each.recipe.training.seed, each.recipe.split_seed) == (3, 7)
    assert not nf4.recipe.quantization.double_quant
    _, *others = plan(["int4"], [64], ["dynamic8", "e4m3"])
    assert [(o.recipe.quantization.double_quant, o.recipe.quantization.scale_codebook) for o in others] == [
        (True, "dynamic8"), (True, "e4m3")
    ]  # fmt: skip


@pytest.mark.slow
def test_smollm2(tmp_path):
    """LoRA on a real model: NF4 costs something before, and training lowers the loss on both kinds of weights."""
    from nf4kernels.demo.data import definitions

    directory = smollm2.directory()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in definitions()[:48]), encoding="utf-8")
    fields = ["--max_steps=4", "--per_device_train_batch_size=4", "--lora_r=8", "--held_out=8"]
    flags = ["--codebooks", "nf4", "--seeds", "0", *fields, "--learning_rate=1e-3", "--gradient_checkpointing=false"]
    out = tmp_path / "out"
    assert main(["compare", str(directory), "--finetune", str(data), "--output", str(out), *flags]) == 0
    dense, nf4 = result_of(out)["variants"]
    assert dense["before"] < nf4["before"] < dense["before"] + 1
    assert dense["after"] < dense["before"] - 0.05
    assert nf4["after"] < nf4["before"] - 0.05
