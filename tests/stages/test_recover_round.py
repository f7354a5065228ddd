"""`nf4kernels recover round`: a directory that loads again with the weights that were chosen, and what is refused."""

import json

import pytest
import torch
from support.compared_model import TEXT, small_model, transformers

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.cli.recover import round as command
from nf4kernels.recover import Candidate, Plan, agreement
from nf4kernels.stages.recover import round as stage
from nf4kernels.stages.recover.round import METHODS
from nf4kernels.stages.text_loss import batches_of, windows_of


@pytest.fixture
def paths(tmp_path):
    small_model(tmp_path / "model", torch.bfloat16)
    (tmp_path / "a.txt").write_text(TEXT * 8, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "Another text, with other words in it."}\n' * 20, encoding="utf-8")
    return tmp_path


def run(paths, *arguments):
    files = ["--text", str(paths / "a.txt"), str(paths / "b.jsonl"), "--tokens", "500", "--length", "32"]
    return main(["recover", "round", str(paths / "model"), str(paths / "out"), *files, *arguments])


@pytest.mark.parametrize("method", METHODS)
def test_the_directory_holds_the_model_that_the_rounding_makes(paths, method, capsys):
    adapter = ("--rank", "8", "--alpha", "16") if method in stage.WITH_ADAPTER else ()
    assert run(paths, "--method", method, *adapter) == 0
    said = capsys.readouterr().out
    written = float(said.split(f"wrote {paths / 'out'}: ")[1].split(" MiB")[0])
    assert written == pytest.approx((paths / "out" / "model.safetensors").stat().st_size / 2**20, abs=0.06)
    load = transformers.AutoModelForCausalLM.from_pretrained
    made, dense = load(paths / "out").eval(), load(paths / "model", dtype=torch.bfloat16).eval()
    plain = load(paths / "model", dtype=torch.bfloat16).eval()
    nf4.quantize_model(plain, progress=False)
    assert sum(isinstance(module, nf4.QuantLinear) for module in made.modules()) == 14
    assert made.config.use_cache
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths / "out")
    options = stage.RoundOptions(method, [paths / "a.txt", paths / "b.jsonl"], 500, 32)
    found = [window for file in options.text for window in windows_of(file, tokenizer, 32, 250)]
    batches = [{"input_ids": b.ids, "attention_mask": b.mask} for b in batches_of(found, torch.device("cpu"))]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) > 400
    expected = load(paths / "model", dtype=torch.bfloat16).eval()
    lora = nf4.LoraConfig(8, 16) if method in stage.WITH_ADAPTER else None
    nf4.quantize_model(expected, progress=False, rounding=METHODS[method](batches), lora=lora)
    for name, tensor in expected.state_dict().items():
        assert "lora_" in name or torch.equal(made.state_dict()[name], tensor), name
    if lora is not None:
        assert f"MiB and, with which the error above is, {paths / 'out' / stage.ADAPTER}" in said
        assert not any("lora_" in name for name in made.state_dict())
        config = json.loads((paths / "out" / stage.ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["modules_to_save"], config["bias"]) == (None, "none")
        nf4.load_adapters(made, paths / "out" / stage.ADAPTER)
        with torch.no_grad():
            said, wanted = (model(**batches[0]).logits for model in (made, expected))
        assert torch.equal(said, wanted)
    for name, module in made.named_modules():
        if isinstance(module, nf4.QuantLinear):
            assert module.qweight.nbytes == plain.get_submodule(name).qweight.nbytes
    if method == "gptq":
        assert agreement(made, dense, batches).kl < 0.7 * agreement(plain, dense, batches).kl


def test_a_plan_and_a_rounding_go_together(paths):
    names = [f"model.layers.0.mlp.{each}_proj" for each in ("gate", "up", "down")]
    chosen = Candidate({"codebook": "int8"}), Candidate({"codebook": "nf4", "block_size": 32}), Candidate()
    Plan(dict(zip(names, chosen)), 1, 1, 0.0).save(paths / "plan.json")
    assert run(paths, "--method", "gptq+levels", "--plan", str(paths / "plan.json")) == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(paths / "out")
    gate, up, down = (made.get_submodule(name) for name in names)
    assert (gate.qweight.codebook, up.qweight.codebook, up.qweight.block_size) == ("int8", "custom", 32)
    assert isinstance(down, torch.nn.Linear)
    others = [m.qweight for m in made.modules() if isinstance(m, nf4.QuantLinear) and m not in (gate, up)]
    assert {(each.codebook, each.block_size) for each in others} == {("custom", 64)}


def test_levels_of_each_layer_keep_their_block_size(paths):
    assert run(paths, "--method", "levels", "--block-size", "128") == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(paths / "out")
    weights = [module.qweight for module in made.modules() if isinstance(module, nf4.QuantLinear)]
    assert {(each.codebook, each.block_size) for each in weights} == {("custom", 128)}


def test_a_held_out_text_measures_what_was_written(paths, capsys):
    assert run(paths, "--held-out", str(paths / "b.jsonl"), "--method", "lq-lora", "--rank", "8") == 0
    rows = [line.split() for line in capsys.readouterr().out.split("held-out tokens")[1].splitlines()[2:5]]
    found = {row[-5:][0]: [float(number) for number in row[-4:-1]] for row in rows}
    load = transformers.AutoModelForCausalLM.from_pretrained
    dense, plain = (load(paths / "model", dtype=torch.bfloat16) for _ in range(2))
    nf4.quantize_model(plain, progress=False)
    made = load(paths / "out")
    nf4.load_adapters(made, paths / "out" / stage.ADAPTER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths / "out")
    held = stage._batches(windows_of(paths / "b.jsonl", tokenizer, 32, 500), torch.device("cpu"))
    for name, model in (("bits", dense), ("level", plain), ("lq-lora", made)):
        expected = agreement(model, dense, held)
        assert found[name] == [round(expected.loss, 4), round(expected.kl, 4), round(100 * expected.top1, 1)], name


def test_choices_are_the_stage_s():
    assert set(command.METHODS) == set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--length", "1"], "--length must be at least 2, got 1"),
        (["--rank", "8"], "--rank must come with --method lq-lora or lq-lora+gptq, got 8 without"),
        (["--no-double-quant", "--scale-codebook", "dynamic8"], "--scale_codebook must come with 8-bit scales"),
        (["--skip", "nothing"], "skip must match a layer, got 'nothing'"),
        (["--plan", "gone.json"], "--plan: nf4kernels.recover.Plan: path must be a file that can be read"),
        (["--text", "gone.txt"], "--text must be a file that can be read"),
        (["--held-out", "gone.txt"], "--held-out must be a file that can be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(paths, arguments, message, capsys):
    assert run(paths, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nf4kernels recover")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (paths / "out").exists()


def test_a_directory_that_is_there_is_kept(paths, capsys):
    (paths / "out").mkdir()
    assert run(paths) == 2
    assert "OUT_DIR must not exist (or say --overwrite)" in capsys.readouterr().err
    assert run(paths, "--overwrite") == 2
    assert "without model files" in capsys.readouterr().err
