"""nf4kernels recover prune: directories that load, as small as they must be, and what ends in one line."""

import json
import os

import pytest
import torch
from support.compared_model import TEXT, small_model, transformers

from nf4kernels import QuantLinear
from nf4kernels.cli import main
from nf4kernels.recover import share_of_zeros
from nf4kernels.recover.pruning.prune import prunable
from nf4kernels.stages.causal_model import load_causal_model
from nf4kernels.stages.recover import prune as stage

pytest.importorskip("yaml", reason="pyyaml is not installed: no recipe is read")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The directory "in", a text beside it, and the test in the folder of both."""
    monkeypatch.chdir(tmp_path)
    made = small_model(tmp_path / "in")
    (tmp_path / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    return made


def command(*flags, out="out"):
    return main(["recover", "prune", "--model", "in", "--output_dir", out, "--tokens", "256", *map(str, flags)])


def size(directory):
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def loaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gradient"])
def test_zeros_that_a_loaded_model_has(model, tmp_path, capsys, method):
    assert command("--pattern", "2:4", "--method", method, "--text", "text.txt") == 0
    said = capsys.readouterr().out
    assert "50.0 % of the weights of the layers are zero" in said
    assert "zeros do not make a file smaller" in said
    assert size(tmp_path / "out") == size(tmp_path / "in")
    found = loaded(tmp_path / "out")
    for layer in prunable(found).values():
        assert (layer.weight.reshape(-1, 4) != 0).sum(1).eq(2).all()
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "text.txt"]


# of one block: q 64x64, k and v 32x64, o 64x64, and three of 64x128
BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64  # two norms


@pytest.mark.parametrize(
    ("pattern", "method", "share", "gone", "config"),
    [
        ("heads", "wanda", 0.5, 2 * (64 * 64 + 32 * 64), {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("channels", "gradient", 0.5, 2 * 3 * 64 * 64, {"intermediate_size": 64}),
        ("layers", "influence", 0.5, BLOCK, {"num_hidden_layers": 1}),
    ],
)
def test_what_is_cut_is_gone_from_the_file(model, tmp_path, capsys, pattern, method, share, gone, config):
    flags = ("--pattern", pattern, "--method", method, "--share", share, "--text", "text.txt")
    assert command(*flags, "--held_out", "text.txt") == 0
    said = capsys.readouterr().out
    assert "1 of 2" in said or "64 of 128" in said
    assert "KL to the model as it was" in said
    found = loaded(tmp_path / "out")
    assert {name: getattr(found.config, name) for name in config} == config
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in found.parameters()) == gone
    assert size(tmp_path / "in") - size(tmp_path / "out") == pytest.approx(4 * gone, abs=2048), "beside the names"
    ids = torch.arange(12)[None]
    found.generate(ids, max_new_tokens=3, do_sample=False)
    assert main(["compare", "out", "--text", "text.txt", "--tokens", "64", "--codebooks", "nf4"]) == 0


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_in_4_bits_as_quantize_writes_it(model, tmp_path, pattern):
    assert command("--pattern", pattern, "--share", "0.5", "--quantize") == 0
    found = load_causal_model(tmp_path / "out")
    layers = prunable(found)
    assert all(isinstance(layer, QuantLinear) for layer in layers.values())
    assert (share_of_zeros(found, layers) >= 0.5) == (pattern == "unstructured")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "text.txt"]


def test_in_steps_with_retraining(model, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: wanda\nshare: 0.6\nsteps: 2\nretrain: 10\nlearning_rate: 3e-3\nskip: [k_proj]\n",
        encoding="utf-8",
    )
    texts = ("--text", "text.txt", "--held_out", "text.txt")
    assert command("--config", "recipe.yaml", *texts) == 0
    trained = float(capsys.readouterr().out.partition("KL to the model as it was ")[2].split()[0])
    assert command("--config", "recipe.yaml", *texts, "--retrain", "0", out="untrained") == 0
    untrained = float(capsys.readouterr().out.partition("KL to the model as it was ")[2].split()[0])
    assert trained < untrained
    found = loaded(tmp_path / "out")
    assert share_of_zeros(found, prunable(found, ["k_proj"])) == pytest.approx(0.6, abs=0.01)
    assert (found.model.layers[0].self_attn.k_proj.weight != 0).all()


def test_an_interrupted_run_goes_on_after_its_last_step(model, tmp_path, monkeypatch):
    flags = ("--pattern", "channels", "--share", "0.5", "--steps", "3", "--multiple", "8")
    pruned = stage._pruned
    shares = []

    def interrupted(model, options, structure, share, *rest):
        shares.append(share)
        if len(shares) == 3:
            raise KeyboardInterrupt
        return pruned(model, options, structure, share, *rest)

    monkeypatch.setattr(stage, "_pruned", interrupted)
    assert command(*flags) == 130
    assert not (tmp_path / "out").exists()
    assert command(*flags) == 0
    assert shares == pytest.approx([0.5 * (1 - (2 / 3) ** 3), 0.5 * (1 - (1 / 3) ** 3), 0.5, 0.5])
    assert loaded(tmp_path / "out").config.intermediate_size == 64
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "text.txt"]


BAD = {
    "no model": (["--model", "nowhere", "--share", "0.5"], "--model must be a Hugging Face model directory"),
    "no share": ([], "--share must be given with --pattern unstructured"),
    "share": (["--share", "1.5"], "--share must be in [0, 1)"),
    "share of 2:4": (["--pattern", "2:4", "--share", "0.25"], "share must be 0.5 or None"),
    "pattern": (["--pattern", "neurons", "--share", "0.5"], "pattern must be"),
    "method": (["--share", "0.5", "--method", "kl"], "--method must be one of magnitude, wanda, gradient"),
    "no text": (["--share", "0.5", "--method", "wanda"], "--text must be a file for --method wanda"),
    "missing text": (["--share", "0.5", "--text", "none.txt"], "--text must be a file that can be read"),
    "steps": (["--share", "0.5", "--steps", "0"], "--steps must be at least 1"),
    "steps of 2:4": (["--pattern", "2:4", "--steps", "2"], "--steps must be 1"),
    "skip": (["--share", "0.5", "--skip", "nothing"], "skip must match"),
    "scope of a cut": (["--pattern", "channels", "--share", "0.5", "--scope", "row"], "--scope must come with"),
    "codebook of 16 bits": (["--share", "0.5", "--codebook", "fp4"], "--codebook must come with --quantize, got fp4"),
    "multiple": (["--pattern", "channels", "--share", "0.5", "--multiple", "999"], "multiple must be"),
    "codebook": (["--share", "0.5", "--quantize", "--codebook", "af4"], "--codebook and --block_size must be nf4"),
    "unknown": (["--share", "0.5", "--shares", "1"], "did you mean --share?"),
    "a word": (["--share", "half"], "share: invalid float value"),
    "recipe": (["--config", "none.yaml"], "--config must be a YAML file"),
    "recipe's field": (["--config", "bad.yaml"], "--config bad.yaml: shares must be one of the fields"),
    "recipe's value": (["--config", "word.yaml"], "--config word.yaml: --share: invalid float value"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_ends_in_one_line(model, tmp_path, capsys, kind):
    (tmp_path / "bad.yaml").write_text("shares: 0.5\n", encoding="utf-8")
    (tmp_path / "word.yaml").write_text("share: half\n", encoding="utf-8")
    before = sorted(os.listdir(tmp_path))
    flags, message = BAD[kind]
    capsys.readouterr()
    assert command(*flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nf4kernels recover: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(os.listdir(tmp_path)) == before


def test_a_directory_that_is_there_or_in_4_bits(model, tmp_path, capsys):
    assert command("--share", "0.5") == 0
    assert command("--share", "0.5") == 2
    assert "--output_dir must not exist (or say --overwrite)" in capsys.readouterr().err
    assert command("--share", "0.5", "--overwrite") == 0
    assert main(["quantize", "in", "four"]) == 0
    assert command("--share", "0.5", "--model", "four", out="other") == 2
    assert "--model must be dense, got one in 4 bits" in capsys.readouterr().err


def family(kind, directory):
    """A tiny model of another family over the tokenizer that is there."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    kinds = {
        "qwen3": lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **sizes, num_key_value_heads=2, head_dim=32, intermediate_size=128, use_sliding_window=True,
                max_window_layers=1, sliding_window=8,
            )
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4)
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    made = kinds[kind]().eval()
    made.save_pretrained(directory)
    return made


@pytest.mark.parametrize(
    ("kind", "pattern", "field", "left"),
    [
        ("qwen3", "heads", "num_key_value_heads", 1), ("qwen3", "layers", "num_hidden_layers", 2),
        ("opt", "channels", "ffn_dim", 64), ("opt", "layers", "num_hidden_layers", 2),
    ],
)  # fmt: skip
def test_other_families(model, tmp_path, kind, pattern, field, left):
    made = family(kind, tmp_path / "in")
    assert command("--pattern", pattern, "--share", "0.4", "--method", "gradient", "--text", "text.txt") == 0
    found = loaded(tmp_path / "out")
    assert getattr(found.config, field) == left
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in made.parameters())
    if kind == "qwen3":
        assert len(found.config.layer_types) == found.config.num_hidden_layers


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("gpt2", "channels", "--model: model must have an nn.ModuleList of blocks with layers named"),
        ("opt", "heads", "--model must load with what was cut"),  # OPT's configuration has no width of a head
    ],
)
def test_what_cannot_be_cut_is_refused(model, tmp_path, capsys, kind, pattern, message):
    family(kind, tmp_path / "in")
    assert command("--pattern", pattern, "--share", "0.5") == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["in", "text.txt"]


def test_the_fields_are_told(capsys):
    assert main(["recover", "prune", "--help-fields"]) == 0
    assert "--retrain" in capsys.readouterr().out
