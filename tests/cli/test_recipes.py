"""`nf4kernels recipes` lists and copies recipes, and each of them is one that finetune takes."""

import pytest
import yaml

from nf4kernels.cli import main
from nf4kernels.stages.finetune.shipped import recipes


def test_every_recipe_is_listed_with_what_it_is_for(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for recipe in recipes():
        assert recipe.name in listed
        assert recipe.about in listed
    assert {"qlora-7b", "qlora-13b", "qlora-33b", "qlora-65b", "cpu-small", "mixture-of-experts"} == {
        recipe.name for recipe in recipes()
    }


def test_a_recipe_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "qlora-7b"]) == 0
    assert yaml.safe_load((tmp_path / "qlora-7b.yaml").read_text(encoding="utf-8"))["r"] == 64
    assert main(["recipes", "copy", "qlora-7b"]) == 2
    assert main(["recipes", "copy", "qlora-8b"]) == 2
    assert main(["recipes", "copy", "qlora-7b", "no/such/directory.yaml"]) == 2
    assert "nf4kernels recipes: FILE must be in a directory that exists" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_finetune_takes_it(recipe, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: no recipe is read")
    from nf4kernels.stages.finetune.recipe import read_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.text, encoding="utf-8")
    read = read_recipe(path, ["--model", "m", "--data", "d", "--output_dir", str(tmp_path / "out"), "--use_cpu=true"])
    if recipe.name.startswith("qlora"):
        size = int(recipe.name.removeprefix("qlora-").removesuffix("b"))
        assert read.training.learning_rate == (2e-4 if size <= 13 else 1e-4)
        assert read.lora.lora_dropout == (0.1 if size <= 13 else 0.05)
        assert (read.lora.r, read.lora.lora_alpha, read.lora.target_modules) == (64, 16, "all-linear")
        training = read.training
        assert (training.max_steps, training.max_length, training.max_grad_norm) == (1875, 512, 0.3)
        assert (training.adam_beta2, training.weight_decay, training.lr_scheduler_type) == (0.999, 0.0, "constant")
        assert (training.optim, training.train_sampling_strategy) == ("paged_adamw_32bit", "group_by_length")
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    if recipe.name == "mixture-of-experts":
        assert read.lora.target_parameters


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [("paged_adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao"), ("adamw_torch_4bit", "torchao")],
)
def test_an_optimizer_of_a_package_that_is_not_there(optimizer, package, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed: no recipe is read")
    from nf4kernels.stages.finetune import recipe as reading

    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    argv = ["finetune", "--model", "m", "--data", "d", "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--optim", optimizer]) == 2
    needs = f"--optim {optimizer} needs {package}, run: pip install {package}, or say adamw_torch"
    assert f"nf4kernels finetune: {needs}\n" in capsys.readouterr().err
    reading.read_recipe(None, [*argv[1:], "--optim", "paged_adamw_32bit"])  # which is ours


def test_activations_are_not_offloaded_on_a_cpu(tmp_path, capsys):
    pytest.importorskip("trl", reason="trl is not installed: no recipe is read")
    argv = ["finetune", "--model", "m", "--data", "d", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert main([*argv, "--activation_offloading", "true"]) == 2
    assert "--activation_offloading must be left out on a CPU" in capsys.readouterr().err
