"""optim.offload_activations: gradients keep their bits, and what is moved is what was to be moved.

On a CPU nothing is to be gained and nothing is moved; where the tests say that it is, torch copies it.
"""

import weakref
from contextlib import nullcontext

import pytest
import torch
from support import tiny
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import nf4kernels as nf4
from nf4kernels.optim import offload, offload_activations

BATCH, LENGTH, HIDDEN = *tiny.IDS.shape, tiny.SIZES["hidden_size"]
INPUT = BATCH * LENGTH * HIDDEN * 4  # bytes of a layer's input
CHECKPOINTING = {"none": None, "not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


@pytest.fixture
def moves(monkeypatch):
    """Tensors on the CPU are moved, too."""
    monkeypatch.setattr(offload, "HOST", ())


def llama(checkpointing: str = "not reentrant", **changes) -> nn.Module:
    model = tiny.quantized_llama(lora=nf4.LoraConfig(r=4, init="gaussian"), **changes).train()
    tiny.fill_adapters(model)
    nf4.prepare_for_training(model, checkpointing=False)
    if CHECKPOINTING[checkpointing]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    return model


def gradients(model: nn.Module, block) -> tuple[list[torch.Tensor], offload.Offloaded]:
    model.zero_grad()
    with block as moved:
        loss = model(input_ids=tiny.IDS, labels=tiny.IDS, use_cache=False).loss
    loss.backward()
    return [param.grad.clone() for param in model.parameters() if param.requires_grad], moved


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_have_the_same_bits(moves, checkpointing):
    model = llama(checkpointing)
    expected, _ = gradients(model, nullcontext())
    found, moved = gradients(model, offload_activations(model, least=1))
    assert len(found) == len(expected) == 2 * 2 * 7
    assert all(map(torch.equal, found, expected))
    assert moved.tensors > 2
    assert moved.bytes > 2 * INPUT


@pytest.mark.parametrize("checkpointing", ["not reentrant", "reentrant"])
def test_of_a_checkpointed_layer_its_input_is_moved(moves, checkpointing):
    found = []
    for layers in (2, 5):
        model = llama(checkpointing, num_hidden_layers=layers)
        found.append(gradients(model, offload_activations(model, least=INPUT))[1])
    assert found[1].tensors - found[0].tensors == 3
    assert found[1].bytes - found[0].bytes == 3 * INPUT


def test_what_was_moved_is_gone_and_the_models_own_and_logits_stay():
    """Packed weights, scales and norms too; the copy in `pack` is all that is left of the others."""
    model = llama("none")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    torchs, gone = save_on_cpu(pin_memory=True), []

    def pack(tensor):
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().data_ptr() not in own
        assert tensor.shape[-1] != tiny.SIZES["vocab_size"]
        gone.append(weakref.ref(tensor.untyped_storage()))
        return torchs.pack_hook(tensor)

    with offload.saving_elsewhere(model, pack, torchs.unpack_hook, least=INPUT):
        loss = model(input_ids=tiny.IDS, labels=tiny.IDS, use_cache=False).loss
    assert len(gone) > 10
    assert not [storage for storage in gone if storage() is not None]
    loss.backward()


def test_a_vocabulary_as_wide_as_the_model_hinders_nothing(moves):
    model = llama(vocab_size=HIDDEN)
    assert gradients(model, offload_activations(model, least=INPUT))[1].tensors > 2


def test_a_plain_loop_with_torchs_own_checkpoint(moves):
    """Micro-batches within one block, and the backward inside or outside of it."""

    class Net(tiny.Net):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return self.norm(x)

    model = Net()
    ids = [torch.arange(12).view(2, 6), torch.arange(3, 15).view(2, 6)]

    def run(block, is_inside):
        model.zero_grad()
        with block as moved:
            loss = sum(model(each).square().sum() for each in ids)
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        return [param.grad.clone() for param in model.parameters()], moved

    expected, _ = run(nullcontext(), False)
    for is_inside in (False, True):
        found, moved = run(offload_activations(model, least=2 * 6 * 64 * 4), is_inside)
        assert all(map(torch.equal, found, expected))
        assert moved.tensors >= 2 * 2


class Saves(torch.autograd.Function):
    """Its gradient tells the strides of what was saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.strides = x.stride()
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert x.stride() == ctx.strides
        return x * grad


def test_the_order_of_memory_comes_back_and_expanded_tensors_stay(moves):
    x = torch.randn(4, 6, 8, requires_grad=True)
    model = nn.Identity()
    for view in (x * 1, (x * 1).transpose(0, 2), (x * 1).permute(1, 2, 0)):
        x.grad = None
        with offload_activations(model, least=1) as moved:
            result = Saves.apply(view)
        assert (moved.tensors, moved.bytes) == (1, x.nbytes)
        result.backward()
        assert torch.equal(x.grad, x)
    wide = (torch.randn(1, 8, requires_grad=True) * 1).expand(64, 8)
    with offload_activations(model, least=1) as moved:
        Saves.apply(wide).backward()
    assert moved.tensors == 0


def test_small_tensors_and_those_of_the_cpu_stay(monkeypatch):
    model = llama()
    assert gradients(model, offload_activations(model, least=1))[1] == offload.Offloaded(0, 0)
    monkeypatch.setattr(offload, "HOST", ())
    assert gradients(model, offload_activations(model))[1] == offload.Offloaded(0, 0), "they are below 256 KiB"
