"""Run by torchrun on some ranks: steps of a model sharded by hand, beside those of the whole one. Prints "same"."""

import torch
import torch.distributed as dist
from support import tiny
from support.sharded_models import (
    every_two_bytes,
    loss_of,
    made,
    optimizer,
    plain_gradients,
    same_bits,
    trained,
    whole,
)
from support.torchrun import check_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import nf4kernels as nf4

BF16 = {"mixed precision": torch.bfloat16, "every byte": torch.bfloat16}
ACCUMULATED = 3


def shard(model: nn.Module, case: str) -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "shards")) if case == "hsdp" else (
        init_device_mesh("cpu", (ranks,))
    )  # fmt: skip
    options = {"mesh": mesh, "reshard_after_forward": case != "kept after forward"}
    if case in BF16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=BF16[case], reduce_dtype=torch.float32)
    if case == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    inner = model.base_model.model if case == "peft" else model
    for layer in inner.model.layers:
        if case == "compile":
            layer.compile(backend="aot_eager", fullgraph=True)
        fully_shard(layer, **options)
    fully_shard(model, **options)


def batches(case: str, turn: int) -> list[list[Tensor]]:
    """Of each rank; four add up in another order than two, where they differ."""
    ranks, count = dist.get_world_size(), ACCUMULATED if case == "accumulation" else 1
    rows = [(tiny.IDS + turn + each) % 90 + 3 for each in range(count)]
    return [rows if ranks > 2 else [each[rank : rank + 1] for each in rows] for rank in range(ranks)]


def step(model: nn.Module, mine: list[Tensor]) -> Tensor:
    for index, rows in enumerate(mine):
        model.set_requires_gradient_sync(index == len(mine) - 1)
        loss = loss_of(model, rows)
        loss.backward()
    return loss.detach()


def check_clipped(sharded: nn.Module, plain: nn.Module) -> None:
    """Norms are sums in another order, of n squares."""
    bound = sum(parameter.numel() for parameter in trained(plain).values()) * 2**-24
    expected = torch.nn.utils.clip_grad_norm_(trained(plain).values(), 0.25).item()
    got = whole(torch.nn.utils.clip_grad_norm_(trained(sharded).values(), 0.25)).item()
    assert expected > 0.25, "nothing is clipped"
    assert abs(got - expected) <= bound * expected
    for name, parameter in trained(plain).items():
        gradient = whole(trained(sharded)[name].grad)
        torch.testing.assert_close(gradient, parameter.grad, rtol=bound + 2**-22, atol=0, msg=f"{name}, clipped")


def check_bytes_in_use(model: nn.Module) -> None:
    """What is gathered, and what is computed with."""
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda *_: used.append(torch.equal(layer.weight, every_two_bytes())))
    used: list[bool] = []
    loss_of(model, tiny.IDS)
    assert used == [True], "the bytes in use are others"


def check(case: str) -> None:
    plain, sharded = made(case), made(case)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    shard(sharded, case)
    parts = dist.get_world_size() // (2 if case == "hsdp" else 1)
    rows = {name: -(-parameter.shape[0] // parts) for name, parameter in plain.named_parameters()}
    packed = {name: each for name, each in sharded.named_parameters() if each.dtype == torch.uint8}
    assert packed, "nothing is quantized"
    for name, parameter in packed.items():
        assert parameter.to_local().shape[0] <= rows[name], f"{name} is not a part of the rows"
    if case == "every byte":
        check_bytes_in_use(sharded)
    of_plain, of_sharded = optimizer(plain), optimizer(sharded)
    for turn in range(3):  # a step later, both must have gone the same way
        losses, expected = plain_gradients(plain, batches(case, turn), BF16.get(case))
        got = step(sharded, batches(case, turn)[dist.get_rank()])
        assert torch.equal(got, losses[dist.get_rank()]), f"the loss is another: {got} for {losses}"
        gradients = {name: whole(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            assert gradient.isfinite().all()
            assert torch.equal(gradients[name], gradient), f"the gradient of {name} is another"
            trained(plain)[name].grad = gradient
        if case == "clipped" and turn == 2:
            return check_clipped(sharded, plain)
        for each in (of_plain, of_sharded):
            each.step()
            each.zero_grad()
    state = sharded.state_dict()
    assert state.keys() == before.keys()
    for name, parameter in trained(plain).items():
        before[name] = parameter.detach()
    for name in before:
        assert same_bits(whole(state[name]), before[name]), f"{name} is not what it was"
    for module in sharded.modules():
        if isinstance(module, nf4.QuantLinear):
            assert module.checksum.any(), "sharding does not forget what the bytes were"


if __name__ == "__main__":
    check_on_ranks(check)
