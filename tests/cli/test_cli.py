"""The command line: quantize end to end with transformers and bitsandbytes."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.llama_directory import LAYER_NAMES, all_tensors, assert_only_input, command, tiny_llama, transformers, tree
from support.paths import ROOT

import nf4kernels as nf4
from nf4kernels.cli import main
from nf4kernels.storage import convert
from nf4kernels.storage.layer_choice import left_dense_by_loader


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--codebook", "fp4", "--scale-codebook", "dynamic8"], {"codebook": "fp4", "scale_codebook": "dynamic8"}),
        (["--no-double-quant", "--block-size", "32"], {"double_quant": False, "block_size": 32}),
    ],
)
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_tensors_are_those_of_quantize(flags, options, shard_size, tmp_path, capsys):
    model = tiny_llama(tmp_path / "in", shard_size)
    assert command(tmp_path / "in", tmp_path / "out", *flags) == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    expected = {}
    for name, tensor in model.state_dict().items():
        if name.split(".")[-2] in LAYER_NAMES:
            expected.update(nf4.weight_to_tensors(nf4.quantize(tensor, **options), name, bitsandbytes=True))
        else:
            expected[name] = tensor
    found = all_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "in" / file.name).exists()
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (shard_size == "60KB")
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        assert content["weight_map"].keys() == expected.keys()
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        for name, file in content["weight_map"].items():
            assert name in load_file(tmp_path / "out" / file)
    output = capsys.readouterr().out
    assert "all q_proj (2)" in output
    assert "layers chosen by LlamaForCausalLM; kept dense: 1 an embedding, 1 skip='lm_head'" in output


def test_other_files_come_along(in_dir, tmp_path):
    assert command(in_dir, tmp_path / "out") == 0
    expected = ["config.json", "generation_config.json", "model.safetensors", "templates", "templates/chat.jinja",
                "tokenizer.json"]  # fmt: skip
    assert tree(tmp_path / "out") == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("flags", "dtype", "tied"),
    [
        ([], torch.bfloat16, False),
        (["--scale-codebook", "dynamic8"], torch.float32, True),
        (["--no-double-quant", "--codebook", "fp4", "--block-size", "32"], torch.bfloat16, True),
        (["--dtype", "float32", "--skip", "layers.0.mlp", "--skip", "*.1.*.q_proj"], torch.bfloat16, False),
    ],
)
def test_transformers_and_bitsandbytes_load_the_result(flags, dtype, tied, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the result is not loaded with it")
    model = tiny_llama(tmp_path / "in", "60KB", dtype, tie_word_embeddings=tied)
    assert command(tmp_path / "in", tmp_path / "out", *flags) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = transformers.LlamaForCausalLM(model.config).to(theirs.dtype)
    nf4.load_checkpoint(ours, tmp_path / "out")
    assert theirs.dtype == (torch.float32 if "--dtype" in flags else dtype)
    quantized = {n: m for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantized.keys() == {n for n, m in ours.named_modules() if isinstance(m, nf4.QuantLinear)}
    assert len(quantized) == (10 if "--skip" in flags else 14)
    for name, layer in quantized.items():
        # An eval forward of bitsandbytes repacks its weight in place on some CPUs: the flag and train() keep it off.
        layer.support_avx512bf16_for_cpu = False
        decoded = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        assert torch.equal(ours.get_submodule(name).dequantize(decoded.dtype), decoded), name
    ids = torch.randint(0, 96, (2, 9))
    got, expected = ours.train()(ids).logits, theirs.train()(ids).logits
    assert got.dtype == expected.dtype
    reference = dense_logits(ours, ids)
    error, their_error = (got.double() - reference).norm(), (expected.double() - reference).norm()
    # Both round every intermediate to the dtype: the distance to the exact product is of the same size.
    assert error <= 2 * their_error + torch.finfo(got.dtype).eps * reference.norm()


def dense_logits(model, ids):
    """The logits of the same weights in float64."""
    exact = transformers.LlamaForCausalLM(model.config).double().train()
    state = {name: tensor.double() for name, tensor in model.state_dict().items() if name in exact.state_dict()}
    for name, layer in model.named_modules():
        if isinstance(layer, nf4.QuantLinear):
            state[f"{name}.weight"] = layer.dequantize(torch.float32).double()
    exact.load_state_dict(state)
    return exact(ids).logits


def test_dtype_casts_what_stays_dense(in_dir, tmp_path):
    assert command(in_dir, tmp_path / "out", "--dtype", "float16") == 0
    tensors = all_tensors(tmp_path / "out")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    name = "model.layers.0.mlp.up_proj.weight"
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(name)}
    qweight = nf4.weight_from_tensors(parts, name)
    assert qweight.dtype == torch.float16
    # The stored values are quantized, not their float16 roundings.
    expected = nf4.quantize(all_tensors(in_dir)[name])
    assert torch.equal(qweight.packed, expected.packed)
    assert torch.equal(qweight.absmax, expected.absmax)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"


def test_layers_are_chosen_by_the_model(tmp_path):
    """GPT-2 has no nn.Linear but its head: its Conv1D weights are matrices by name and shape, and transposed."""
    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
    assert command(tmp_path / "in", tmp_path / "out") == 2
    assert_only_input(tmp_path)


def test_tied_head_is_not_quantized_even_unskipped(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "in", tie_word_embeddings=True)
    monkeypatch.setattr(convert, "SKIP", ())
    assert command(tmp_path / "in", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_layer_that_the_loader_would_leave_dense_is_left_dense(tmp_path):
    """transformers reads the skip list as suffixes, too: "fc" in it also stands for "inner.fc"."""
    assert left_dense_by_loader("inner.fc", ["fc"])
    assert left_dense_by_loader("model.layers.1.mlp", ["model.layers.1"])
    assert not left_dense_by_loader("model.layers.11.mlp", ["model.layers.1"])
    should_convert = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    names = ["inner.fc", "fc", "model.layers.1.mlp", "model.layers.11.mlp", "mlp.gate", "mlp.gate_proj", "a.lm_head"]
    for entry in ["fc", "model.layers.1", "model.layers.*", "mlp.gate", "lm_head", "gate"]:
        for name in names:
            assert left_dense_by_loader(name, [entry]) == (not should_convert(name, [entry]))


def test_names_decide_where_transformers_does_not_know_the_model(in_dir, tmp_path, capsys):
    config = json.loads((in_dir / "config.json").read_text(encoding="utf-8"))
    (in_dir / "config.json").write_text(json.dumps({**config, "architectures": ["SomethingNew"]}), encoding="utf-8")
    assert command(in_dir, tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "does not know SomethingNew" in output
    assert "all quantized (14)" in output
    skipped = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "llm_int8_skip_modules"
    ]
    assert skipped == ["lm_head", "model.embed_tokens"]


def test_rows_of_no_whole_number_of_blocks_are_noted(tmp_path, capsys):
    tiny_llama(tmp_path / "in", intermediate_size=100)
    assert command(tmp_path / "in", tmp_path / "out") == 0
    assert "note: in 2 layers (model.layers.0.mlp.down_proj, ...)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["compress"], ["quantize"], ["quantize", "a", "b", "--codebook", "int4"],
     ["quantize", "a", "b", "--block-size", "63"], ["quantize", "a", "b", "--dtype", "int8"]],
)  # fmt: skip
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: nf4kernels" in capsys.readouterr().err


def test_missing_input(tmp_path, capsys):
    assert command(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nf4kernels quantize: IN_DIR must be a Hugging Face model directory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_info_needs_no_framework():
    """In a process of its own, where transformers, matplotlib and peft cannot be imported."""
    program = (
        "import sys\n"
        "for name in ('transformers', 'matplotlib', 'peft', 'bitsandbytes', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['nf4kernels', 'info']\n"
        f"import runpy, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "runpy.run_module('nf4kernels', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nf4kernels {nf4.__version__}\n{nf4.backend_info()}\n"
    assert done.stderr == ""


def test_one_dense_tensor_at_a_time(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "in")
    seen, alive, original = [], [], convert.quantize

    def watching(tensor, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(tensor))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(convert, "quantize", watching)
    assert command(tmp_path / "in", tmp_path / "out") == 0
    assert alive == [0] * 15  # the first call checks the options
