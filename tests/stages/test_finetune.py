"""`nf4kernels finetune` on a small random Llama with a tokenizer of its own: it learns, resumes and refuses."""

import csv
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from support.chat_model import CHAT_TEMPLATE, chat_model, facts
from support.finetune_run import FIELDS, STEPS, arguments, names, train_in_child, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from nf4kernels import LoraConfig  # noqa: E402
from nf4kernels.cli import main  # noqa: E402
from nf4kernels.recover import Candidate, Plan  # noqa: E402
from nf4kernels.stages.data.reading import Source, read  # noqa: E402
from nf4kernels.stages.errors import StageError  # noqa: E402
from nf4kernels.stages.finetune import recipe as recipes  # noqa: E402
from nf4kernels.stages.finetune import run  # noqa: E402
from nf4kernels.stages.finetune.answers import answers  # noqa: E402
from nf4kernels.stages.finetune.loading import load_tokenizer  # noqa: E402
from nf4kernels.stages.finetune.outputs import LOG  # noqa: E402
from nf4kernels.stages.finetune.recipe import read_recipe  # noqa: E402
from nf4kernels.stages.finetune.trainer import WHOLE  # noqa: E402

ADAPTERS = "adapter_model.safetensors"
# From a process that has imported everything and computed nothing: OpenMP's threads do not outlive a fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["support.finetune_run", "nf4kernels.stages.finetune.run"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    chat_model(directory / "chat", num_hidden_layers=1)
    chat_model(directory / "base", template=None, num_hidden_layers=1)
    return directory


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": q, "completion": a} for q, a in facts(32)])


def conversations(count: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in facts(count)
    ]


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / LOG).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns_and_writes_what_it_says(models, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(models / "chat", prompts, out)) == 0
    said = capsys.readouterr().out
    assert "training: 29 examples" in said
    assert "held out: 3 examples" in said
    assert "<|im_start|>assistant\n⟦The " in said
    assert ".<|im_end|>⟧" in said.replace("\n⟧", "⟧")
    assert said.count("answered: ") == 3
    before, after = (float(said.split(f"loss {when}: ")[1].split()[0]) for when in ("before", "after"))
    assert after < before - 0.2
    losses = [float(row["loss"]) for row in read_log(out)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text(encoding="utf-8")
    for part in (f"{before:.4f}", f"{after:.4f}", "max_steps: 8", "base_model:", "answered:"):
        assert part in card
    assert yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))["lora_r"] == 4
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    assert main(arguments(models / "chat", prompts, out)) == 2, "a finished run is not trained again"
    assert "finished" in capsys.readouterr().err


def killed(argv: list[str], out: Path, when, killed_at: str | None = None) -> bool:
    """Run it in a process that is killed as soon as `when()` holds, or at that function; False where it ended."""
    child = FORKS.Process(target=train_in_child, args=(argv, out.with_name("child.txt"), killed_at))
    child.start()
    while child.is_alive() and not when():
        time.sleep(0.002)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_killed_and_resumed_it_gives_the_same_log(models, prompts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(models / "chat", prompts, whole)) == 0
    argv = arguments(models / "chat", prompts, out)
    assert killed(argv, out, lambda: (out / "checkpoint-4" / WHOLE).exists())
    assert not (out / "loss.png").exists()
    assert main(argv) == 0
    assert (out / LOG).read_bytes() == (whole / LOG).read_bytes()
    assert (out / ADAPTERS).read_bytes() == (whole / ADAPTERS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.exhaustive),
        {"packing": True, "max_length": 64},
    ],
)
def test_killed_at_ten_random_moments(models, prompts, tmp_path, changes):
    whole, out = tmp_path / "whole", tmp_path / "out"
    changes = {**changes, "max_steps": 60, "save_steps": 1}
    assert main(arguments(models / "chat", prompts, whole, **changes)) == 0
    argv, draw, kills = arguments(models / "chat", prompts, out, **changes), random.Random(0), 0
    for turn in range(10):
        moment = Moment(out, draw.uniform(0, 0.4), True) if turn < 2 else Moment(out, draw.uniform(0, 0.1), False)
        kills += killed(argv, out, moment.has_come)
        if (out / "loss.png").exists():
            break
    assert kills >= 8
    assert last_step(out) > 0
    assert main(argv) == 0
    assert (out / LOG).read_bytes() == (whole / LOG).read_bytes()
    assert (out / ADAPTERS).read_bytes() == (whole / ADAPTERS).read_bytes()


def last_step(out: Path) -> int:
    return max((int(file.parent.name.rpartition("-")[2]) for file in out.glob(f"checkpoint-*/{WHOLE}")), default=0)


class Moment:
    """`wait` seconds after now, or after the run in `out` has a checkpoint more than now."""

    def __init__(self, out: Path, wait: float, is_from_now: bool) -> None:
        self.out, self.wait, self.had = out, wait, last_step(out)
        self.since = time.monotonic() if is_from_now else None

    def has_come(self) -> bool:
        if self.since is None and last_step(self.out) > self.had:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() > self.since + self.wait


@pytest.mark.slow
@pytest.mark.parametrize("ends_with", ["last", "best"])
def test_killed_after_its_last_step_it_only_finishes(ends_with, models, prompts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    changes = {"max_steps": 4}
    if ends_with == "best":  # the greatest loss, which is the first
        changes |= {
            "load_best_model_at_end": True,
            "greater_is_better": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
        }
    assert main(arguments(models / "chat", prompts, whole, **changes)) == 0
    argv = arguments(models / "chat", prompts, out, **changes)
    assert killed(argv, out, lambda: False, "write_picture")
    if ends_with == "best":
        first, last = ((whole / f"checkpoint-{step}" / ADAPTERS).read_bytes() for step in (2, 4))
        assert (whole / ADAPTERS).read_bytes() == first != last
    else:
        shutil.rmtree(out / "checkpoint-2")
    (out / ADAPTERS).unlink()
    assert main(argv) == 0
    for name in (LOG, ADAPTERS, "README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes().replace(b"/whole", b"/out"), name


def test_packed_examples_do_not_see_each_other(models, prompts, tmp_path):
    recipe = read_recipe(None, arguments(models / "chat", prompts, tmp_path / "out", packing=True, max_length=64)[1:])
    split = read(recipe.sources, recipe.held_out)
    trainer = run._trainer(recipe, split, load_tokenizer(recipe))
    model, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = model(input_ids=ids[:, starts[1] : starts[2]], use_cache=False).logits
        mixed = model(input_ids=ids[:, : starts[2]], use_cache=False).logits[:, starts[1] :]
    assert torch.allclose(together[:, starts[1] : starts[2]], alone, atol=1e-5)
    assert not torch.allclose(mixed, alone, atol=1e-3), "the check does not tell one from the other"


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(models, prompts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(models / "chat", prompts, whole, max_steps=4)) == 0
    argv = arguments(models / "chat", prompts, out, max_steps=4)
    assert killed(argv, out, lambda: (out / "checkpoint-2" / WHOLE).exists())
    partial = out / "checkpoint-9"
    partial.mkdir()
    (partial / "trainer_state.json").write_text("{", encoding="utf-8")
    assert main(argv) == 0
    assert not partial.exists()
    assert (out / LOG).read_bytes() == (whole / LOG).read_bytes()


def test_messages_learn_the_answers_alone(models, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in facts(16)]
    data, out = write_rows(tmp_path / "messages.jsonl", rows), tmp_path / "out"
    assert main(arguments(models / "chat", data, out, max_steps=1)) == 0
    said = capsys.readouterr().out
    assert "assistant\n⟦The " in said
    assert "<|im_end|>⟧" in said


def test_plain_text_gets_both_ends_and_all_of_it_is_learned(models, tmp_path, capsys):
    data = write_rows(tmp_path / "text.jsonl", [{"text": f"{q} {a}"} for q, a in facts(16)])
    assert main(arguments(models / "base", data, tmp_path / "out", max_steps=1, max_length=12)) == 0
    said = capsys.readouterr().out
    assert "⟦<|begin|>" in said
    examples, tokens = map(
        int, re.search(r"training: (\d+) examples, (\d+) tokens, \1 of them cut to 12", said).groups()
    )
    assert tokens == 12 * examples


def test_prompts_for_a_base_model_end_in_eos(models, prompts, tmp_path, capsys):
    assert main(arguments(models / "base", prompts, tmp_path / "out", max_steps=1)) == 0
    shown = capsys.readouterr().out.split("between ⟦ and ⟧:\n")[1].splitlines()[0]
    assert shown.startswith("<|begin|>")
    assert shown.endswith("<|end|>⟧")
    assert "⟦The" in shown


def test_a_recipe_and_flags_that_win_over_it(models, prompts, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    fields = {**FIELDS, "model": str(models / "chat"), "data": [str(prompts)], "weights": [1.0], "max_steps": 9, "r": 2}
    fields.update(learning_rate="1e-3", target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3}, codebook="fp4")
    recipe.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert main(["finetune", "--config", str(recipe), "--output_dir", str(out), "--max_steps", "1"]) == 0
    adapter = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], adapter["rank_pattern"]) == (2, {"q_proj": 3})
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    assert len(read_log(out)) == 1
    assert "fp4" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lerning_rate": 1}, "did you mean --learning_rate?"),
        ({"load_in_4bit": True}, "must be left out"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"lora_r": "2.5"}, "invalid int value: '2.5'"),
        ({"rank_pattern": "[1]"}, "rank_pattern"),
        ({"codebook": "nf5"}, "codebook must be"),
        ({"weights": "1 2"}, "weights"),
        ({"held_out": -1}, "--held_out must be"),
        ({"save_total_limit": 1}, "--save_total_limit must be 2 or more"),
        ({"model": "nowhere/at/all"}, "--model_name_or_path must be"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"assistant_only_loss": True}, "--assistant_only_loss must be left out"),
        ({"target_modules": "no_such_layer"}, "no_such_layer"),
        ({"max_length": -1}, "--max_length must be 1 or more"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"held_out": "nan"}, "--held_out must be"),
        ({"save_only_model": True}, "must be left out: a run could not go on"),
        ({"chat_template_path": "."}, "--chat_template_path must be a Jinja file"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(models, prompts, tmp_path, capsys, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    had = names(tmp_path)
    assert main(arguments(models / "chat", prompts, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("nf4kernels finetune: ")
    assert expected in error
    assert names(tmp_path) == had


@pytest.mark.parametrize(("has_gpu", "flags", "scales"), [
    (True, ["--dtype=float16"], True), (True, ["--dtype=bfloat16"], False), (True, ["--dtype=float32"], False),
    (True, ["--dtype=float16", "--bf16=true"], False), (False, ["--dtype=float16"], False),
])  # fmt: skip
def test_float16_on_a_gpu_scales_the_loss(monkeypatch, tmp_path, has_gpu, flags, scales):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(recipes, "meet", lambda *_: None)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    recipe = read_recipe(None, ["--model=m", "--data=d", f"--output_dir={tmp_path / 'out'}", *flags])
    assert recipe.training.fp16 == scales


def test_an_adapter_tells_the_revision_of_its_base(tmp_path):
    recipe = read_recipe(None, ["--model=m", "--data=d", f"--output_dir={tmp_path / 'out'}", "--model_revision=v2"])
    assert recipe.lora.revision == "v2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1\n", "did you mean learning_rate?"),
        ("learning_rate: fast\n", "invalid float value"),
        ("- 1\n", "lines NAME: VALUE"),
        ("a: [1\n", "must be a YAML file"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, capsys, text, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    assert main(["finetune", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml" in error
    assert expected in error


def test_answers_beyond_max_length_are_counted_and_never_all(models, tmp_path, capsys):
    rows = [{"prompt": q * (6 if i % 2 else 1), "completion": a} for i, (q, a) in enumerate(facts(16))]
    data = write_rows(tmp_path / "data.jsonl", rows)
    changes = {"max_steps": 1, "held_out": 0}
    assert main(arguments(models / "chat", data, tmp_path / "out", **changes, max_length=40)) == 0
    assert "8 of them cut to 40, 8 left out" in capsys.readouterr().out
    had = names(tmp_path)
    assert main(arguments(models / "chat", data, tmp_path / "none", **changes, max_length=8)) == 2
    assert "--max_length must leave something to learn, got 8" in capsys.readouterr().err
    assert names(tmp_path) == had


def test_bad_data_changes_nothing(models, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n', encoding="utf-8")
    assert main(arguments(models / "chat", data, tmp_path / "out")) == 2
    assert "line 2" in capsys.readouterr().err
    assert names(tmp_path) == ["data.jsonl"]


def test_messages_without_a_template_are_refused(models, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in facts(16)]
    data = write_rows(tmp_path / "messages.jsonl", rows)
    assert main(arguments(models / "base", data, tmp_path / "out")) == 2
    assert "--chat_template_path must be" in capsys.readouterr().err
    assert names(tmp_path) == ["messages.jsonl"]


def test_messages_for_a_model_without_a_template_take_the_given_one(models, tmp_path, capsys):
    data, out = write_rows(tmp_path / "messages.jsonl", conversations(16)), tmp_path / "out"
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    assert main(arguments(models / "base", data, out, max_steps=1, chat_template_path=template)) == 0
    assert "assistant\n⟦The " in capsys.readouterr().out
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.jinja", None, "--chat_template_path must be"),
        ("broken.jinja", "{% for message in messages %}", "template"),
        ("unmarked.jinja", "{% for message in messages %}{{ message['content'] }}{% endfor %}", "generation"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(models, tmp_path, capsys, monkeypatch, name, content, expected):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data, template = write_rows(tmp_path / "messages.jsonl", conversations(16)), tmp_path / name
    if content is not None:
        template.write_text(content, encoding="utf-8")
    had = names(tmp_path)
    assert main(arguments(models / "base", data, tmp_path / "out", chat_template_path=template)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nf4kernels finetune: ")
    assert expected in error
    assert names(tmp_path) == had


@pytest.mark.slow
def test_smollm2_learns_from_messages_by_either_remedy(tmp_path, capsys, monkeypatch):
    """Its template has no {% generation %}: a template with it, or a loss on all turns."""
    directory = Path(os.environ.get("NF4KERNELS_SMOLLM2", ".cache/SmolLM2-135M-Instruct"))
    if not (directory / "config.json").exists():
        pytest.skip("SmolLM2-135M-Instruct is not at hand: make demo downloads it")
    monkeypatch.setattr(run, "answers", lambda *_: [])
    data = write_rows(tmp_path / "messages.jsonl", conversations(4))
    fields = {"max_steps": 1, "held_out": 0, "per_device_train_batch_size": 1}
    assert main(arguments(directory, data, tmp_path / "refused", **fields)) == 2
    error = capsys.readouterr().err
    assert "--chat_template_path" in error
    assert "--assistant_only_loss false" in error
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    assert main(arguments(directory, data, tmp_path / "marked", **fields, chat_template_path=template)) == 0
    assert "<|im_start|>assistant\n⟦The apple is red.<|im_end|>⟧" in capsys.readouterr().out
    assert main(arguments(directory, data, tmp_path / "all", **fields, assistant_only_loss=False)) == 0
    assert "⟦<|im_start|>system" in capsys.readouterr().out


def test_another_recipe_in_the_directory_is_refused(models, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert killed(arguments(models / "chat", prompts, out), out, lambda: (out / "checkpoint-2" / WHOLE).exists())
    had = names(tmp_path)
    assert main(arguments(models / "chat", prompts, out, lora_r=8)) == 2
    assert "whose run has lora_r=4 where this one has 8" in capsys.readouterr().err
    assert names(tmp_path) == had
    lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
    prompts.write_text("".join(reversed(lines)), encoding="utf-8")  # other rows are held out of as many
    assert main(arguments(models / "chat", prompts, out)) == 2
    assert "--output_dir must hold a run on the same data" in capsys.readouterr().err


def test_a_loss_that_was_no_number_is_read_as_one(models, prompts, tmp_path):
    recipe = read_recipe(None, arguments(models / "chat", prompts, tmp_path / "out")[1:])
    recipe.out.mkdir()
    (recipe.out / "recipe.yaml").write_text(yaml.safe_dump(recipe.given), encoding="utf-8")
    (recipe.out / run.START).write_text('{"held_out_loss_after": NaN, "finished": true}', encoding="utf-8")
    assert math.isnan(run.finished(recipe)["held_out_loss_after"])


def test_no_answer_is_asked_for_a_prompt_that_is_too_long(models, tmp_path):
    rows = [{"prompt": q * (40 if i == 0 else 1), "completion": a} for i, (q, a) in enumerate(facts(8))]
    split = read([Source(write_rows(tmp_path / "data.jsonl", rows))], 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "chat")
    asked = [asked for asked, _, _ in answers(model, split, tokenizer, 3, max_length=64)]
    assert asked == [row["prompt"] for row in rows[1:4]]
    model.config.max_position_embeddings = 65
    assert answers(model, split, tokenizer, 3) == []


def test_options_of_weights_are_refused_for_a_model_in_4_bits(models, prompts, tmp_path, capsys):
    assert main(["quantize", str(models / "chat"), str(tmp_path / "ours")]) == 0
    assert main(arguments(tmp_path / "ours", prompts, tmp_path / "out", block_size=128)) == 2
    assert "--block_size must be left out for a model that is stored in 4 bits" in capsys.readouterr().err


def test_a_plan_is_for_the_weights_beside_the_adapters(models, prompts, tmp_path):
    wide, file = Candidate({"codebook": "fp4", "block_size": 128}), tmp_path / "plan.json"
    Plan({"model.layers.0.mlp.up_proj": wide, "model.layers.0.mlp.down_proj": Candidate()}, 1, 1, 0.0).save(file)
    flags = arguments(models / "chat", prompts, tmp_path / "out", plan=file)[1:]
    recipe = read_recipe(None, flags)
    assert recipe.quantization.plan == {
        "model.layers.0.mlp.up_proj": {"codebook": "fp4", "block_size": 128}, "model.layers.0.mlp.down_proj": None,
    }  # fmt: skip
    with pytest.raises(StageError, match="--plan must be left out with --codebook dense"):
        read_recipe(None, [*flags, "--codebook", "dense"])
    for candidate in (Candidate(dropped=True), Candidate({"lora": LoraConfig(r=2, init="loftq")})):
        Plan({"model.layers.0.mlp.up_proj": candidate}, 1, 1, 0.0).save(file)
        with pytest.raises(StageError, match="--plan must leave each layer one layer without an adapter"):
            read_recipe(None, flags)
    with pytest.raises(StageError, match=r"--plan: .* must be a file that can be read"):
        read_recipe(None, [*flags, "--plan", str(tmp_path / "none.json")])
