"""Odd parameters anywhere in a model: every walker survives them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parameter import is_lazy

import nf4kernels as nf4
from nf4kernels.model.memory import nbytes


def lazy():
    return nn.LazyLinear(8)


def sparse():
    module = nn.Module()
    module.weight = nn.Parameter(torch.eye(8).to_sparse())
    return module


def sparse_csr():
    module = nn.Module()
    module.weight = nn.Parameter(torch.eye(8).to_sparse_csr())
    return module


def quantized_int8():
    module = nn.Module()
    weight = torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def nested():
    module = nn.Module()
    module.register_buffer("table", torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]))
    return module


def nested_jagged():
    module = nn.Module()
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    module.register_buffer("table", torch.nested.nested_tensor(parts, layout=torch.jagged))
    return module


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = nn.Module()
    with FakeTensorMode():
        module.weight = nn.Parameter(torch.empty(8, 8))
    return module


def dtensor():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(torch.eye(8), init_device_mesh("cpu", (1,)), [Replicate()]))
    return module


def packed_subclass():
    class Packed(torch.Tensor):
        """A wrapper without storage, as torchao's."""

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            unwrapped = [a.inner if isinstance(a, cls) else a for a in args]
            out = function(*unwrapped, **(kwargs or {}))
            return cls(out) if isinstance(out, torch.Tensor) and function is torch.ops.aten.detach.default else out

    module = nn.Module()
    module.weight = nn.Parameter(Packed(torch.eye(8)), requires_grad=False)
    return module


def complex_numbers():
    module = nn.Module()
    module.weight = nn.Parameter(torch.eye(8, dtype=torch.complex64))
    return module


ODD = (lazy, sparse, sparse_csr, quantized_int8, nested, nested_jagged, fake, dtensor, packed_subclass, complex_numbers)


class Model(nn.Module):
    def __init__(self, odd):
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.odd = odd

    def forward(self, x):
        return self.proj(x)


@pytest.fixture(params=ODD, ids=lambda f: f.__name__)
def model(request):
    yield Model(request.param())
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def test_quantize_reports_and_merges(model):
    """Report's kind: "Cannot access data pointer of Tensor that doesn't have storage", from a report of bytes."""
    report = nf4.quantize_model(model, progress=False)
    assert [layer.name for layer in report.layers] == ["proj"]
    assert report.model_bytes_before > report.model_bytes_after > 0
    assert "proj" in str(report)
    model(torch.randn(2, 64))
    assert nf4.merge_model(model) == ["proj"]


def test_adapters_are_saved_and_loaded(model, tmp_path):
    """They have nothing to do with the odd part."""
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=2), progress=False)
    for parameter in model.odd.parameters():
        if not is_lazy(parameter):  # torch cannot freeze what is not there yet
            parameter.requires_grad_(False)
    nf4.save_adapters(model, tmp_path)
    nf4.load_adapters(model, tmp_path)


def test_a_checkpoint_is_written_or_refused_by_name(model, tmp_path):
    """safetensors holds dense arrays alone: what does not fit is named, before anything is written."""
    plain = model.odd.weight.dtype == torch.complex64 if "weight" in model.odd._parameters else False
    twin = Model(copy.deepcopy(model.odd)) if plain else None
    nf4.quantize_model(model, progress=False)
    if plain:
        nf4.save_checkpoint(model, tmp_path / "a")
        nf4.load_checkpoint(twin, tmp_path / "a")
        assert torch.equal(twin.proj.weight, model.proj.weight)
        assert torch.equal(twin.odd.weight, model.odd.weight)
        return
    if hasattr(getattr(model.odd, "weight", None), "to_local"):  # a sharded model, which is saved as several files
        nf4.save_checkpoint(model, tmp_path / "a")
        assert torch.equal(load_file(tmp_path / "a" / "model.safetensors")["odd.weight"], torch.eye(8))
        return
    with pytest.raises(ValueError, match=r"odd\.(weight|table) in model's state must be a loaded tensor, got "):
        nf4.save_checkpoint(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_odd_linear_layer_stays_dense_with_its_reason():
    """nn.Linear whose own weight is sparse, a subclass or not there yet."""
    lazy_layer = nn.LazyLinear(8)
    sparse_layer = nn.Linear(64, 64)
    sparse_layer.weight = nn.Parameter(torch.eye(64).to_sparse())
    model = nn.Sequential(nn.Linear(64, 64), lazy_layer, sparse_layer)
    report = nf4.quantize_model(model, progress=False)
    assert [layer.name for layer in report.layers] == ["0"]
    reasons = {entry.name: (entry.reason, entry.shape) for entry in report.skipped}
    assert reasons["1"] == ("its parameter is not initialized yet", ())
    assert reasons["2"] == ("its parameter is a sparse_coo tensor", (64, 64))
    assert "not initialized yet" in str(report)


def test_the_bytes_of_a_sparse_tensor_are_those_of_its_numbers_and_indices():
    """Eight fp32 numbers on the diagonal: COO with two int64 indices each, CSR with one and nine row starts."""
    assert nbytes(torch.eye(8).to_sparse()) == 8 * 4 + 8 * 2 * 8
    assert nbytes(torch.eye(8).to_sparse_csr()) == nbytes(torch.eye(8).to_sparse_csc()) == 8 * 4 + (8 + 9) * 8
    assert nbytes(torch.eye(8).to_sparse_bsr((4, 4))) == 2 * 16 * 4 + (2 + 3) * 8
