"""What a recipe that goes on from an adapter takes from it, and what it says of LoRA beside it."""

import json

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing is fine-tuned")

from peft import LoraConfig

from nf4kernels.stages.errors import StageError
from nf4kernels.stages.finetune.recipe import read_recipe
from nf4kernels.stages.finetune.shipped import copy_recipe


@pytest.fixture
def adapter(tmp_path):
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def flags(tmp_path, *more: str) -> list[str]:
    return ["--model", "base", "--data", "data.jsonl", "--output_dir", str(tmp_path / "out"), *more]


def changed(adapter, **fields) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_the_flag_wins_over_what_a_ready_recipe_says_of_lora(adapter, tmp_path):
    copy_recipe("cpu-small", tmp_path / "recipe.yaml")
    alone = read_recipe(tmp_path / "recipe.yaml", flags(tmp_path))
    recipe = read_recipe(tmp_path / "recipe.yaml", flags(tmp_path, "--adapter", str(adapter)))
    assert (alone.lora.r, alone.lora.lora_alpha) != (3, 7)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (3, 7, {"q_proj"})
    of_lora = {"r", "lora_alpha", "lora_dropout", "target_modules"}
    assert of_lora <= alone.given.keys()
    assert recipe.given.keys() == alone.given.keys() - of_lora | {"adapter"}


@pytest.mark.parametrize("said", ["--lora_r=16", "--lora-alpha=7", "--target_modules=q_proj"])
def test_a_flag_beside_it_is_refused_even_where_it_says_the_same(adapter, tmp_path, said):
    name = said.partition("=")[0].removeprefix("--").replace("-", "_")
    with pytest.raises(StageError, match=f"--{name} must be left out with --adapter, which has its own"):
        read_recipe(None, flags(tmp_path, "--adapter", str(adapter), said))


def test_one_file_cannot_have_both(adapter, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"adapter: {adapter}\nr: 3\n", encoding="utf-8")
    with pytest.raises(StageError, match="--r must be left out with --adapter"):
        read_recipe(tmp_path / "recipe.yaml", flags(tmp_path))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "--adapter must have begun beside the base weight.* got 'pissa'"),
        ({"init_lora_weights": "olora"}, "--adapter must have begun beside the base weight.* got 'olora'"),
        ({"task_type": "SEQ_CLS"}, "--adapter must be of a causal language model"),
        ({"peft_type": "LOHA"}, "--adapter must be a LoRA adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(adapter, tmp_path, fields, expected):
    changed(adapter, **fields)
    with pytest.raises(StageError, match=expected):
        read_recipe(None, flags(tmp_path, "--adapter", str(adapter)))
