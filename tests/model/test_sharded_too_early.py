"""A DTensor where a whole tensor is needed: one sentence that names the order, before anything is changed."""

import pytest
import torch
import torch.distributed as dist
from support import tiny
from torch import nn

import nf4kernels as nf4

fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch is built without torch.distributed")
tensors = pytest.importorskip("torch.distributed.tensor", reason="torch is built without torch.distributed")


@pytest.fixture(scope="module")
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_quantize_model_of_a_sharded_model(mesh):
    model = tiny.Net()
    fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"quantize_model: model must not be sharded yet \(quantize it.*then fully_sh"):
        nf4.quantize_model(model, progress=False)
    assert not [module for module in model.modules() if isinstance(module, nf4.QuantLinear)]


@pytest.mark.parametrize("function", [nf4.quantize, nf4.quantize_experts])
def test_quantize_of_a_dtensor(mesh, function):
    weight = torch.randn(8, 64) if function is nf4.quantize else torch.randn(2, 8, 64)
    with pytest.raises(TypeError, match=r"weight must be a whole tensor .*, got a DTensor"):
        function(tensors.distribute_tensor(weight, mesh, [tensors.Shard(0)]))


def test_what_a_sharded_layer_cannot_do(mesh):
    model = nn.Sequential(nf4.QuantLinear(64, 32, dtype=torch.float32))
    fsdp.fully_shard(model, mesh=mesh)
    layer = model[0]
    with pytest.raises(ValueError, match=r"add_lora: the layer must not be sharded yet \(quantize, add adapters, then"):
        layer.add_lora(nf4.LoraConfig(r=2))
    for call in (layer.dequantize, layer.to_linear, lambda: layer.qweight):
        with pytest.raises(ValueError, match="qweight: the layer must be whole"):
            call()
    assert layer.adapter_names == []
    model.unshard()
    assert layer.dequantize().shape == (32, 64)


def test_one_process_shards_saves_loads_and_merges(mesh, tmp_path):
    plain, model = (tiny.Net() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    for each in (plain, model):
        nf4.quantize_model(each, progress=False)
    fsdp.fully_shard(model, mesh=mesh)
    nf4.save_checkpoint(model, tmp_path / "model")
    again = tiny.Net()
    nf4.load_checkpoint(again, tmp_path / "model")
    nf4.load_checkpoint(model, tmp_path / "model")
    nf4.merge_model(plain)
    for each in (again, model):
        nf4.merge_model(each)
        for name, tensor in each.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, plain.state_dict()[name]), name
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(model(ids), plain(ids))
