"""optim.PagedAdamW: torch's AdamW bit for bit, whose state is in managed memory and is brought back for a step.

On a CPU the calls of torch.cuda are stand-ins and the allocator is the real one, on stand-ins of CUDA's runtime
(support/managed.py). `make gpu` checks the same on a device.
"""

import copy
import io
import platform
import shutil

import pytest
import torch
import torch.distributed as dist
from executor.build import CXX
from support import managed, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import nf4kernels as nf4
from nf4kernels.optim import PagedAdamW, managed_memory

SHAPES = ((8, 64), (64, 8), (3,), (0, 4))
KINDS = {
    "plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True},
    "amsgrad": {"amsgrad": True}, "maximize": {"maximize": True, "weight_decay": 0.3, "betas": (0.8, 0.95)},
    "tensor lr": {"lr": torch.tensor(1e-2), "foreach": False},
}  # fmt: skip
STEPS = 3


def params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, steps=STEPS, seed=1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def values(optimizer) -> list[torch.Tensor]:
    """Parameters and state, in order."""
    own = [param for group in optimizer.param_groups for param in group["params"]]
    return [*own, *(optimizer.state[param][name] for param in own for name in sorted(optimizer.state[param]))]


def same(left, right) -> bool:
    left, right = values(left), values(right)
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.fixture
def device(monkeypatch):
    """Device 0, on which the parameters are."""
    if platform.machine() != "x86_64" or shutil.which(CXX) is None:
        pytest.skip(f"tests/executor needs x86-64 and {CXX}")
    found = managed.Device(managed.load())
    found.patch(monkeypatch)
    yield found
    managed_memory.managed_memory.cache_clear()


def is_managed(tensor: torch.Tensor) -> bool:
    return managed_memory.managed_memory(0).holds(tensor.data_ptr())


def state_of(optimizer) -> list[torch.Tensor]:
    """What of the state is to be managed."""
    every = [value for own in optimizer.state.values() for value in own.values()]
    return [tensor for tensor in every if tensor.dim() and tensor.numel()]


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu_it_is_adamw(kind):
    plain, paged = torch.optim.AdamW(params(), **KINDS[kind]), PagedAdamW(params(), **KINDS[kind])
    train(plain)
    train(paged)
    assert same(plain, paged)
    assert plain.state_dict()["param_groups"] == paged.state_dict()["param_groups"]
    if torch.cuda.is_available():
        pytest.skip("the rest is of a machine without a GPU")
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_it_is_adamw_with_its_state_in_managed_memory(device, kind):
    plain, paged = torch.optim.AdamW(params(), **KINDS[kind]), PagedAdamW(params(), **KINDS[kind])
    train(plain)
    train(paged)
    assert same(plain, paged)
    assert len(state_of(paged)) == 3 * (2 + ("amsgrad" in KINDS[kind]))
    assert all(map(is_managed, state_of(paged)))
    assert not any(is_managed(param) for param in values(paged)[: len(SHAPES)])


def test_step_is_managed_too_where_torch_has_it_on_the_device(device, monkeypatch):
    from nf4kernels.optim import paged_adamw

    monkeypatch.setattr(paged_adamw, "_device", lambda tensor: 0)
    monkeypatch.setattr(managed, "SCALARS", True)
    paged = PagedAdamW(params(), fused=True)
    train(paged)
    steps = [own["step"] for own in paged.state.values()]
    assert len(steps) == len(SHAPES)
    assert all(map(is_managed, steps))
    assert steps[0] == STEPS


def test_the_order_of_a_step(device):
    """What is free is asked before anything is allocated; advice follows each allocation; then comes the prefetch."""
    paged = PagedAdamW(params()[:1])
    assert device.done == [], "nothing before the first step"
    train(paged, 1)
    malloc = ["set_device 0", "malloc 2048 1", "advise 2048 3 location 1 0", "advise 2048 5 location 1 0"]
    prefetch = ["set_device 0", *["prefetch 2048 location 1 0 flags 0 stream 0x7"] * 2]
    assert device.done == ["attribute 0", "ask what is free", "begin pool", *malloc, *malloc, "end pool", *prefetch]
    train(paged, 1)
    assert device.done == prefetch, "of a later step the prefetch alone"
    stepped = []
    paged.register_step_post_hook(lambda *_: stepped.append(device.done))
    paged.step(closure=lambda: stepped.append(device.done))
    assert stepped == [[], prefetch], "the closure's forward and backward come before it"


def test_more_than_is_free_is_refused_before_anything_is_allocated(device):
    paged = PagedAdamW(params(), amsgrad=True)
    device.free = managed_memory.SEGMENTS + 3 * 4 * (2 * 8 * 64 + 3) - 1
    own = paged.param_groups[0]["params"]
    before = [param.detach().clone() for param in own]
    with pytest.raises(torch.OutOfMemoryError, match=r"fit in what cuda:0 has free, and needs 0\.02 GiB"):
        train(paged, 1)
    assert device.done == ["attribute 0", "ask what is free", "empty cache", "ask what is free"]
    assert not paged.state
    assert all(map(torch.equal, own, before))
    device.free += 1
    train(paged, 1)
    assert all(map(is_managed, state_of(paged)))


def test_what_torch_keeps_for_later_counts_as_free(device, monkeypatch):
    device.free, device.kept = 0, managed_memory.SEGMENTS + 2 * 4 * (2 * 8 * 64 + 3) - 1
    with pytest.raises(torch.OutOfMemoryError):
        train(PagedAdamW(params()), 1)
    device.kept += 1
    train(PagedAdamW(params()), 1)
    device.kept = 0
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(device, "free", 1 << 30))
    train(PagedAdamW(params()), 1)


def test_groups_are_counted_together_and_prefetched_each_before_its_own_arithmetic(device):
    first, second, third, _ = params()
    paged = PagedAdamW([first], lr=1e-2)
    paged.add_param_group({"params": [second], "amsgrad": True})
    plain = torch.optim.AdamW([param.detach().clone().requires_grad_() for param in (first,)], lr=1e-2)
    plain.add_param_group({"params": [second.detach().clone().requires_grad_()], "amsgrad": True})
    device.free = managed_memory.SEGMENTS + 5 * 2048 - 1
    with pytest.raises(torch.OutOfMemoryError):
        train(paged, 1)
    assert not paged.state
    device.free += 1
    for optimizer in (plain, paged):
        train(optimizer)
    assert same(plain, paged)
    assert device.done.count("begin pool") == 2
    paged.add_param_group({"params": third})
    train(paged, 1)
    assert all(map(is_managed, state_of(paged)))
    assert device.done.count("begin pool") == 1


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dicts_are_adamws_both_ways(device, amsgrad):
    plain = torch.optim.AdamW(params(), amsgrad=amsgrad)
    paged = PagedAdamW(params(), amsgrad=amsgrad)
    train(plain)
    train(paged)
    stored = {}
    for name, optimizer in (("plain", plain), ("paged", paged)):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        stored[name] = file.getvalue()
    again = {"plain": PagedAdamW(plain.param_groups[0]["params"]), "paged": torch.optim.AdamW(values(paged)[:4])}
    for name, optimizer in again.items():
        optimizer.load_state_dict(torch.load(io.BytesIO(stored[name]), weights_only=True))
    assert all(map(is_managed, state_of(again["plain"])))
    assert not any(map(is_managed, state_of(again["paged"])))
    for optimizer in again.values():
        train(optimizer, 2, seed=5)
    assert same(again["plain"], again["paged"])


def test_a_loaded_state_must_fit_too(device):
    plain, paged = torch.optim.AdamW(params()), PagedAdamW(params())
    train(plain, 1)
    device.free = managed_memory.SEGMENTS + 2 * 4 * (2 * 8 * 64 + 3) - 1
    with pytest.raises(torch.OutOfMemoryError):
        paged.load_state_dict(plain.state_dict())
    assert not paged.state
    device.free += 1
    paged.load_state_dict(plain.state_dict())
    assert all(map(is_managed, state_of(paged)))


def test_copies_and_pickles_are_managed_again(device):
    paged = PagedAdamW(params())
    train(paged)
    file = io.BytesIO()
    torch.save(paged, file)
    twins = [copy.deepcopy(paged), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    for twin in twins:
        assert same(twin, paged)
        assert all(map(is_managed, state_of(twin)))
    for optimizer in (paged, *twins):
        train(optimizer, 1, seed=3)
    assert all(same(twin, paged) for twin in twins)


def test_memory_is_given_back(device):
    paged = PagedAdamW(params())
    train(paged)
    device.note()
    allocations = 6
    del paged
    assert device.done[-allocations:] == ["free"] * allocations


def test_what_is_not_allocated_from_the_pool_is_told(device):
    device.pools = False
    paged = PagedAdamW(params())
    with pytest.raises(RuntimeError, match="unset PYTORCH_NO_CUDA_MEMORY_CACHING"):
        train(paged, 1)
    assert not paged.state
    device.pools = True
    train(paged, 1)


def test_where_it_cannot_run(device, monkeypatch):
    device.library.nf4_executor_managed_fail(b"attribute")
    with pytest.raises(RuntimeError, match=r"concurrentManagedAccess.*cuda:0 is none: say torch\.optim\.AdamW"):
        train(PagedAdamW(params()), 1)
    monkeypatch.setattr(managed_memory.select, "cuda_library", lambda: (None, "NF4KERNELS_CUDA=0"))
    with pytest.raises(RuntimeError, match="need the compiled CUDA library, and there is none: NF4KERNELS_CUDA=0"):
        train(PagedAdamW(params()), 1)


def test_a_prefetch_that_cuda_refuses_is_an_error(device):
    device.library.nf4_executor_managed_fail(b"prefetch")
    with pytest.raises(RuntimeError, match="cuda:0 cannot prefetch the state"):
        train(PagedAdamW(params()), 1)


def test_a_graph_is_captured_without_prefetch(device, monkeypatch):
    paged = PagedAdamW(params())
    train(paged, 1)
    assert [call for call in device.done if call.startswith("prefetch")]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    train(paged, 1)
    assert device.done == []


def test_a_parameter_elsewhere_is_refused(monkeypatch):
    from nf4kernels.optim import paged_adamw

    paged = PagedAdamW(params()[:1])
    monkeypatch.setattr(paged_adamw, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match="params must be on a CUDA device or the CPU, got cpu"):
        paged.add_param_group({"params": params()})
    assert len(paged.param_groups) == 1


@pytest.fixture
def mesh():
    """Of two ranks, this the first; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_of_dtensors_the_local_part_is_paged(device, mesh):
    """As FSDP2 has parameters; so much alone must be free."""
    whole = params()[:2]

    def sharded(tensor):
        return DTensor.from_local(tensor.detach().clone(), mesh, [Shard(0)], run_check=False)

    plain = torch.optim.AdamW(whole, fused=False)
    paged = PagedAdamW([torch.nn.Parameter(sharded(param)) for param in whole], foreach=True)
    device.free = managed_memory.SEGMENTS + 2 * 4 * 2 * 8 * 64
    for _ in range(STEPS):
        for param, own in zip(whole, paged.param_groups[0]["params"]):
            param.grad = torch.randn(param.shape)
            own.grad = sharded(param.grad)
        plain.step()
        paged.step()
    state = [each for own in paged.state.values() for each in own.values() if isinstance(each, DTensor)]
    assert len(state) == 4
    assert all(is_managed(each.to_local()) for each in state)
    for param, own in zip(whole, paged.param_groups[0]["params"]):
        assert torch.equal(param, own.to_local())
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(plain.state[param][name], paged.state[own][name].to_local())
    other, again = (make(paged.param_groups[0]["params"]) for make in (torch.optim.AdamW, PagedAdamW))
    other.step()
    again.load_state_dict(other.state_dict())
    loaded = [each for own in again.state.values() for each in own.values() if isinstance(each, DTensor)]
    assert len(loaded) == 4
    assert all(is_managed(each.to_local()) for each in loaded)


def test_adapters_of_a_quantized_model_train_by_it(device):
    """A training loop over a QuantLinear model, with clipping and a schedule."""
    losses = []
    for make in (torch.optim.AdamW, PagedAdamW):
        model = tiny.quantized_llama(lora=nf4.LoraConfig(r=4, init="gaussian")).train()
        nf4.prepare_for_training(model)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = make(trained, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=tiny.IDS, labels=tiny.IDS, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert all(map(is_managed, state_of(optimizer)))
    assert sum(tensor.nbytes for tensor in state_of(optimizer)) == 2 * sum(param.nbytes for param in trained)
