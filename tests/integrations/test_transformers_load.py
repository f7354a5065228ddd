"""from_pretrained with an Nf4Config: what it quantizes while it reads, saves and reads again."""

import pytest
import torch
from support import tiny

import nf4kernels as nf4

transformers = tiny.transformers()
from nf4kernels.integrations.transformers import Nf4Config  # noqa: E402  # it needs transformers


def dense_directory(directory, class_name="LlamaForCausalLM", dtype=torch.bfloat16, **changes):
    tiny.make(class_name, dtype=dtype, **changes).save_pretrained(directory)
    return directory


def load(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model):
    with torch.no_grad():
        return model(tiny.IDS).logits


def test_loads_what_quantize_model_makes(tmp_path):
    directory = dense_directory(tmp_path)
    expected = load(directory)
    nf4.quantize_model(expected, progress=False)
    model = load(directory, quantization_config=Nf4Config())
    assert list(tiny.layers(model)) == list(tiny.layers(expected)) != []
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values()))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_saves_and_loads_the_same_bits(tmp_path, shard):
    model = load(dense_directory(tmp_path / "dense"), quantization_config=Nf4Config())
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard == "20KB")
    again = load(tmp_path / "saved")
    assert list(tiny.layers(again)) == list(tiny.layers(model))
    assert torch.equal(logits(again), logits(model))
    for name, layer in tiny.layers(model).items():
        assert torch.equal(again.get_submodule(name).checksum, layer.checksum)
