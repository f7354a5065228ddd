"""Blocks compiled one by one: every walker sees through torch.compile's wrapper."""

import pytest
import torch
from safetensors import safe_open
from support import tiny
from torch import nn

import nf4kernels as nf4

CONFIG = nf4.LoraConfig(r=4)
IDS = torch.arange(10).view(2, 5)


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def quantized(lora=None, compiled=False):
    torch.manual_seed(0)
    model = tiny.Net()
    nf4.quantize_model(model, lora=lora, progress=False)
    return compiled_blocks(tiny.fill_adapters(model)) if compiled else tiny.fill_adapters(model)


def plain_names(names):
    assert not any("_orig_mod" in name for name in names), names
    return list(names)


def test_the_report_has_the_models_names():
    """Report's kind: names with _orig_mod in them that match nothing elsewhere."""
    model = compiled_blocks(tiny.Net())
    report = nf4.quantize_model(model, progress=False)
    assert len(report.layers) == 4
    plain_names([layer.name for layer in report.layers])


def test_skip_means_the_models_names():
    """Report's kind: skip=["blocks.0.2"] no longer matches once the block is compiled."""
    model = compiled_blocks(tiny.Net())
    nf4.quantize_model(model, skip=["blocks.0.2"], progress=False)
    assert len(tiny.layers(model)) == 3


def test_merging_into_a_base_finds_the_layers():
    """Report's kind: "base must have a layer blocks.0._orig_mod.0, got none"."""
    torch.manual_seed(0)
    base = tiny.Net()
    names = nf4.merge_model(quantized(CONFIG, compiled=True), base=base)
    assert len(plain_names(names)) == 4
    nf4.merge_model(quantized(CONFIG), base=compiled_blocks(base))


def test_checkpoints_have_the_models_names(tmp_path):
    """Report's kind: a file whose keys hold _orig_mod loads nowhere else."""
    model = quantized(compiled=True)
    nf4.save_checkpoint(model, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        plain_names(file.keys())
    loaded = tiny.Net()
    nf4.load_checkpoint(loaded, tmp_path / "a")
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("already", [False, True], ids=["dense", "quantized"])
def test_checkpoints_load_into_compiled_blocks(tmp_path, already):
    """The way back, into dense and into 4-bit blocks, with adapters."""
    model = quantized(CONFIG)
    nf4.save_checkpoint(model, tmp_path / "a")
    target = quantized(CONFIG, compiled=True) if already else compiled_blocks(tiny.Net())
    nf4.load_checkpoint(target, tmp_path / "a")
    assert torch.equal(target(IDS), model(IDS))


def test_adapters_go_both_ways(tmp_path):
    """Right today for saving and loading alike."""
    model = quantized(CONFIG, compiled=True)
    nf4.save_adapters(model, tmp_path)
    other = quantized(CONFIG)
    nf4.load_adapters(other, tmp_path)
    nf4.load_adapters(model, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_a_layer_compiled_alone_is_replaced_inside_and_stays_compiled():
    """Report's kind: torch.compile on single linear layers, whose wrapper went on to call the dense one."""
    model, calls = nn.Sequential(nn.Linear(64, 64)), []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    model[0] = torch.compile(model[0], backend=backend)
    wrapper, x = model[0], torch.randn(2, 64)
    wrapper.register_forward_hook(lambda module, args, output: output + 1)
    model(x)
    compilations = len(calls)
    assert [layer.name for layer in nf4.quantize_model(model, progress=False).layers] == ["0"]
    assert model[0] is wrapper
    (layer,) = tiny.layers(model).values()
    assert torch.equal(model(x), nf4.linear(x, layer.qweight, layer.bias) + 1)
    assert len(calls) > compilations > 0
    assert nf4.merge_model(model) == ["0"]
    torch.testing.assert_close(model(x), x @ layer.dequantize(torch.float32).T + layer.bias + 1)


def test_an_attribute_of_that_name_is_no_wrapper(tmp_path):
    """A module that its owner calls _orig_mod keeps its name."""
    model = nn.Sequential(nn.Module())
    model[0]._orig_mod = nn.Linear(64, 64)
    assert [layer.name for layer in nf4.quantize_model(model, progress=False).layers] == ["0._orig_mod"]
    nf4.save_checkpoint(model, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert "0._orig_mod.weight" in file.keys()  # noqa: SIM118


def test_module_compile_in_place_is_seen_through():
    """Module.compile() puts the graph on the instance: the block's names stay, the layers are replaced inside."""
    model = tiny.Net()
    for block in model.blocks:
        block.compile(backend="eager")
    model(IDS)
    nf4.quantize_model(model, progress=False)
    assert len(tiny.layers(model)) == 4
    model(IDS)
