"""`nf4kernels export`: dense files, bitsandbytes' format, PEFT's safetensors, and llama.cpp's converter."""

import json
import os
import sys

import pytest
from support.llama_directory import all_tensors, command, tree
from support.peft_adapter import save_adapter, torch, transformers

import nf4kernels as nf4
from nf4kernels.cli import main

FAKE = """
import json, sys
from pathlib import Path
config = json.loads((Path(sys.argv[1]) / "config.json").read_text(encoding="utf-8"))
files = sorted(file.name for file in Path(sys.argv[1]).iterdir())
out = Path(sys.argv[sys.argv.index("--outfile") + 1])
out.write_text(json.dumps([sys.argv[1:], config, files]), encoding="utf-8")
if "FAIL" in __file__:
    print("Model LlamaForCausalLM is not supported", file=sys.stderr)
    sys.exit(3)
"""


@pytest.fixture
def quantized(in_dir, tmp_path):
    assert command(in_dir, tmp_path / "quantized") == 0
    return tmp_path / "quantized"


def export(*args):
    return main(["export", *map(str, args)])


def test_4_bits_to_dense_files_of_a_size(quantized, in_dir, tmp_path):
    assert export(quantized, tmp_path / "out", "--to", "safetensors", "--max-shard-size", "40KB") == 0
    expected = all_tensors(in_dir)
    for name in expected:
        if name.endswith("_proj.weight"):
            expected[name] = nf4.dequantize(nf4.quantize(expected[name]), torch.bfloat16)
    found = all_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
    assert not hasattr(model.config, "quantization_config")
    assert "templates/chat.jinja" in tree(tmp_path / "out")


def test_a_model_saved_as_ours_to_bitsandbytes(in_dir, tmp_path):
    from nf4kernels.integrations.transformers import Nf4Config

    ours = transformers.AutoModelForCausalLM.from_pretrained(in_dir, quantization_config=Nf4Config(block_size=32))
    ours.save_pretrained(tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "out", "--to", "bitsandbytes") == 0
    assert command(in_dir, tmp_path / "expected", "--block-size", "32") == 0
    found, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    told, wanted = (
        json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        for name in ("out", "expected")
    )
    skipped = set(wanted.pop("llm_int8_skip_modules"))
    assert {"lm_head"} <= skipped <= set(told.pop("llm_int8_skip_modules"))
    assert told == wanted


def test_a_dense_model_to_bitsandbytes_is_quantized(in_dir, quantized, tmp_path):
    assert export(in_dir, tmp_path / "out", "--to", "bitsandbytes") == 0
    found, expected = all_tensors(tmp_path / "out"), all_tensors(quantized)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_bitsandbytes_has_no_format_for(in_dir, tmp_path, capsys):
    from nf4kernels.integrations.transformers import Nf4Config

    ours = transformers.AutoModelForCausalLM.from_pretrained(in_dir, quantization_config=Nf4Config(codebook="af4"))
    ours.save_pretrained(tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "out", "--to", "bitsandbytes") == 2
    assert "codebook must be 'nf4' or 'fp4' in bitsandbytes' format, got 'af4'" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["in", "ours"]


def test_an_old_adapter_to_safetensors(in_dir, tmp_path):
    old = save_adapter(in_dir, tmp_path / "old", safe=False)
    new = save_adapter(in_dir, tmp_path / "new")
    assert export(old, tmp_path / "out", "--to", "peft") == 0
    assert not list((tmp_path / "out").glob("*.bin"))
    found, expected = all_tensors(tmp_path / "out"), all_tensors(new)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (old / "adapter_config.json").read_bytes()


def converter(directory):
    directory.mkdir(parents=True)
    script = directory / "convert_hf_to_gguf.py"
    script.write_text(f"#!{sys.executable}\n{FAKE}", encoding="utf-8")
    script.chmod(0o755)
    return directory


@pytest.mark.parametrize("on_path", [True, False])
def test_gguf_by_the_converter_of_llama_cpp(on_path, in_dir, quantized, tmp_path, monkeypatch):
    directory = converter(tmp_path / "llama.cpp")
    flags = [] if on_path else ["--llama-cpp", directory]
    monkeypatch.setenv("PATH", str(directory) if on_path else "")
    dense, packed = tmp_path / "dense.gguf", tmp_path / "packed.gguf"
    assert export(in_dir, dense, "--to", "gguf", "--outtype", "f16", *flags) == 0
    (source, *rest), _, _ = json.loads(dense.read_text(encoding="utf-8"))
    assert source == str(in_dir)
    assert rest[0] == "--outfile"
    assert rest[2:] == ["--outtype", "f16"]
    assert export(quantized, packed, "--to", "gguf", *flags) == 0
    (source, *_), config, files = json.loads(packed.read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert {"model.safetensors", "tokenizer.json"} <= set(files)
    assert sorted(os.listdir(tmp_path)) == ["dense.gguf", "in", "llama.cpp", "packed.gguf", "quantized"]


def test_gguf_refused(in_dir, quantized, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    failing, out = converter(tmp_path / "FAIL"), tmp_path / "out.gguf"
    before = tree(tmp_path)
    for source, flags, message in (
        (in_dir, [], "convert_hf_to_gguf.py must be on PATH or in --llama-cpp DIR, got neither"),
        (in_dir, ["--llama-cpp", in_dir], "--llama-cpp must be llama.cpp's directory with convert_hf_to_gguf.py"),
        (in_dir, ["--llama-cpp", failing], "got exit code 3: Model LlamaForCausalLM is not supported"),
        (quantized, ["--llama-cpp", failing], "got exit code 3"),
    ):
        assert export(source, out, "--to", "gguf", *flags) == 2
        assert message in capsys.readouterr().err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("to", ["safetensors", "bitsandbytes", "gguf", "peft"])
def test_existing_output_and_wrong_source(to, in_dir, quantized, tmp_path, capsys):
    adapter = save_adapter(in_dir, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    before = tree(tmp_path)
    source = adapter if to == "peft" else quantized
    assert export(source, tmp_path / "out", "--to", to) == 2
    assert "nf4kernels export: OUT must not exist" in capsys.readouterr().err
    assert export(quantized if to == "peft" else adapter, tmp_path / "new", "--to", to) == 2
    assert "got an adapter" in (said := capsys.readouterr().err) or "DIR must be a directory of PEFT's" in said
    assert tree(tmp_path) == before


def test_a_damaged_model(quantized, tmp_path, capsys):
    file = quantized / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    for to in ("safetensors", "bitsandbytes"):
        assert export(quantized, tmp_path / "out", "--to", to) == 2
        assert "must be a whole safetensors file" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["in", "quantized"]
