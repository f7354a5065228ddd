"""What goes wrong around whole models: files that change underneath, wrappers, frozen adapters, odd arguments."""

import shutil

import pytest
import torch
from torch import nn

import nf4kernels as nf4
from nf4kernels.demo.settings import Settings


def quantized(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    nf4.quantize_model(model, progress=False)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_loaded_model_does_not_change_with_its_file(tmp_path, device):
    nf4.save_checkpoint(quantized(0), tmp_path / "a")
    nf4.save_checkpoint(quantized(1), tmp_path / "b")
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    nf4.load_checkpoint(model, tmp_path / "a")
    x = torch.randn(3, 64)
    before = model(x)
    shutil.copyfile(tmp_path / "b", tmp_path / "a")  # in place: the same inode, as cp and rsync --inplace write
    assert torch.equal(model(x), before)


def test_buffers_left_on_meta_are_named(tmp_path):
    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 32)
            self.register_buffer("table", torch.zeros(3), persistent=False)

    source = WithTable()
    nf4.quantize_model(source, progress=False)
    nf4.save_checkpoint(source, tmp_path / "a")
    with torch.device("meta"):
        model = WithTable()
    with pytest.warns(UserWarning, match="meta device.*table"):
        nf4.load_checkpoint(model, tmp_path / "a")


def test_skip_may_be_a_generator():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nf4.quantize_model(model, skip=(name for name in ["1"]), progress=False)
    assert [type(layer) for layer in model] == [nf4.QuantLinear, nn.Linear]
    with pytest.raises(TypeError, match=r"quantize_model: skip must be .*None"):
        nf4.quantize_model(model, skip=None)


def test_propagate_checks_dtypes_first():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double())
    with pytest.raises(TypeError, match="the weight of 1 must be"):
        nf4.quantize_model(model, progress=False, nonfinite="propagate", double_quant=False)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_loaded_adapters_are_trainable(tmp_path):
    model = quantized(0)
    model[0].add_lora(nf4.LoraConfig(r=2))
    nf4.save_adapters(model, tmp_path)
    for parameter in model[0].lora_A.parameters():
        parameter.requires_grad_(False)
    nf4.load_adapters(model, tmp_path)
    assert model[0].lora_A.weight.requires_grad
    assert model[0].lora_B.weight.requires_grad


def test_a_compiled_model_saves_and_merges_as_the_one_inside(tmp_path):
    model = quantized(0)
    nf4.save_checkpoint(torch.compile(model), tmp_path / "compiled")
    nf4.load_checkpoint(quantized(1), tmp_path / "compiled")
    base = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    assert nf4.merge_model(torch.compile(model), base=base) == ["0"]
    assert type(model[0]) is nn.Linear


def test_a_wrapper_of_replicas_is_refused_by_name(tmp_path):
    wrapped = nn.DataParallel(quantized(0))
    for call in (
        lambda: nf4.save_checkpoint(wrapped, tmp_path / "a"),
        lambda: nf4.save_adapters(wrapped, tmp_path),
        lambda: nf4.merge_model(wrapped),
    ):
        with pytest.raises(ValueError, match=r"pass \.module, got DataParallel"):
            call()
    assert not list(tmp_path.iterdir())


def test_the_demo_does_not_replace_what_it_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "out" / "merged"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="--model must lie outside --out"):
        Settings(out=tmp_path / "out", model=inside)
    with pytest.raises(ValueError, match="--out must be a directory of its own"):
        Settings(out=tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="--out must be a directory that can be made"):
        Settings(out=tmp_path / "file" / "out")
