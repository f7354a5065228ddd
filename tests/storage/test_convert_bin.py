"""`nf4kernels convert` of tensors in `.bin` files, adapters' and models', to safetensors; what else a pickle holds."""

import json
import os

import pytest
import torch
from support.directories import dense_directory, load, same_state
from support.llama_directory import all_tensors, tree
from support.peft_adapter import peft, save_adapter

from nf4kernels.cli import main
from nf4kernels.integrations.transformers import Nf4Config

ADAPTER, MODEL = "adapter_model.bin", "pytorch_model.bin"


def convert(*args):
    return main(["convert", *map(str, args)])


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def base(tmp_path):
    return dense_directory(tmp_path / "base")


def test_an_adapter_and_those_inside_of_it(base, tmp_path, capsys):
    old = save_adapter(base, tmp_path / "old", safe=False)
    save_adapter(base, old / "second", seed=2, safe=False)
    expected = torch.load(old / ADAPTER, weights_only=True)
    (old / "optimizer.pt").write_bytes(b"of a checkpoint")
    assert convert(old, tmp_path / "new") == 0
    assert f"{2 * len(expected)} tensors in safetensors, none of them changed" in capsys.readouterr().out
    assert_same_tensors(all_tensors(tmp_path / "new"), expected)
    kept = [name for name in tree(old) if not name.endswith((".bin", ".pt"))]
    assert [name for name in tree(tmp_path / "new") if not name.endswith(".safetensors")] == kept
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "new")
    model.load_adapter(tmp_path / "new" / "second", adapter_name="second")
    before = peft.PeftModel.from_pretrained(load(base), old)
    before.load_adapter(old / "second", adapter_name="second")
    assert same_state(model, before)


def test_an_adapter_that_is_no_lora(base, tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    assert_same_tensors(all_tensors(tmp_path / "new"), torch.load(tmp_path / "old" / ADAPTER, weights_only=True))


def in_bin(directory, shards=1):
    """Its tensors in `.bin` files, those of safetensors removed."""
    tensors = all_tensors(directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(tensors, directory / MODEL)
        return tensors
    file_of = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
    for file in set(file_of.values()):
        torch.save({name: t for name, t in tensors.items() if file_of[name] == file}, directory / file)
    (directory / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": file_of}), encoding="utf-8")
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_dense_model(shards, base, tmp_path, capsys):
    before, expected = load(base), in_bin(base, shards)
    assert convert(base, tmp_path / "out") == 0
    assert "in safetensors, no tensor changed" in capsys.readouterr().out
    assert_same_tensors(all_tensors(tmp_path / "out"), expected)
    assert not [name for name in tree(tmp_path / "out") if ".bin" in name]
    assert main(["quantize", str(base), str(tmp_path / "packed")]) == 2
    assert "must have model.safetensors or its index (nf4kernels convert makes them of .bin files), got" in (
        capsys.readouterr().err
    )
    assert same_state(load(tmp_path / "out"), before)


def test_tensors_that_share_memory(base, tmp_path):
    """A tied model's state has the same tensor under two names, and views have parts of one memory."""
    tensors = in_bin(base)
    both = torch.randn(2, 96, 64).bfloat16()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] = both[0]
    tensors["other"] = both.transpose(1, 2)
    torch.save(tensors, base / MODEL)
    assert convert(base, tmp_path / "out") == 0
    assert_same_tensors(all_tensors(tmp_path / "out"), tensors)


def test_a_4_bit_model(tmp_path):
    """As bitsandbytes' first versions that could save had them."""
    dense_directory(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "theirs")]) == 0
    expected = load(tmp_path / "theirs", quantization_config=Nf4Config())
    in_bin(tmp_path / "theirs", 2)
    assert convert(tmp_path / "theirs", tmp_path / "ours") == 0
    assert same_state(load(tmp_path / "ours"), expected)


class Code:
    def __reduce__(self):
        return os.system, ("touch OWNED",)


def not_whole(file):
    torch.save({"a": torch.zeros(3)}, file)
    file.write_bytes(file.read_bytes()[:-40])


def saved(content):
    return lambda file: torch.save(content, file)


BAD = {
    "code": (saved({"a": Code()}), "must hold tensors alone, got posix.system"),
    "an array": (saved({"a": torch.zeros(3).numpy()}), "must hold tensors alone, got numpy."),
    "a module": (saved(torch.nn.Linear(2, 2)), "must hold tensors alone, got torch.nn.modules.linear.Linear"),
    "a number": (saved({"a": torch.zeros(3), "b": 3}), "must hold tensors by name alone, got b of type int"),
    "a list": (saved([torch.zeros(3)]), "must hold tensors by name, got list"),
    "numbered": (saved({1: torch.zeros(3)}), "must hold tensors by name alone, got the name 1"),
    "sparse": (saved({"a": torch.eye(3).to_sparse()}), "must hold tensors by name alone, got a, a sparse_coo tensor"),
    "on meta": (saved({"a": torch.empty(3, device="meta")}), "must hold tensors by name alone, got a, a meta tensor"),
    "cut": (not_whole, "must hold tensors alone, got a damaged file (PytorchStreamReader failed"),
    "empty": (lambda file: file.write_bytes(b""), "must hold tensors alone, got a damaged file or another kind of one"),
    "a pointer": (lambda file: file.write_bytes(b"version https://git-lfs"), "got a damaged file or another kind"),
}


@pytest.mark.parametrize(("of", "kind"), [*(("adapter", kind) for kind in BAD), ("model", "code"), ("model", "cut")])
def test_refused_in_one_line(of, kind, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, message = BAD[kind]
    if of == "adapter":
        source = save_adapter(base, tmp_path / "old", safe=False)
    else:
        source = base
        in_bin(base)
    write(source / (ADAPTER if of == "adapter" else MODEL))
    before = tree(tmp_path)
    capsys.readouterr()
    assert convert(source, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nf4kernels convert: ")
    assert message in line
    assert tree(tmp_path) == before


def test_an_adapter_is_refused(base, tmp_path, capsys):
    old = save_adapter(base, tmp_path / "old", safe=False)
    for flags, message in (
        (["--to", "bitsandbytes"], "SRC must be a model with --to or --overwrite, got an adapter"),
        (["--overwrite"], "SRC must be a model with --to or --overwrite, got an adapter"),
    ):
        assert convert(old, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert convert(old, tmp_path / "out") == 2
    assert "DST must not exist, got" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    (old / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert convert(old, tmp_path / "out") == 2
    assert "must hold PEFT's configuration with a peft_type, got {}" in capsys.readouterr().err
    (old / ADAPTER).unlink()
    assert convert(old, tmp_path / "out") == 2
    assert "SRC must be a directory of PEFT's with adapter_model.safetensors" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base", "old"]
