"""Run by torchrun on some ranks: steps under DDP, beside those of one process with the rows of all. Prints "same"."""

from contextlib import nullcontext

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
)
from support.torchrun import check_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nf4kernels.nn import checksum as checksums

ARGUMENTS = {
    "unused": {"find_unused_parameters": True}, "static graph": {"static_graph": True},
    "buffers left alone": {"broadcast_buffers": False}, "checkpointing": {"static_graph": True},
    "gradients in place": {"gradient_as_bucket_view": True},
}  # fmt: skip
ACCUMULATED = 3


def batches(case: str, turn: int) -> list[list[Tensor]]:
    count = ACCUMULATED if case == "no_sync" else 1
    rows = [(tiny.IDS + turn + each) % 90 + 3 for each in range(count)]
    return [[each[rank : rank + 1] for each in rows] for rank in range(2)]


def step(ddp: nn.Module, mine: list[Tensor]) -> Tensor:
    for index, rows in enumerate(mine):
        with nullcontext() if index == len(mine) - 1 else ddp.no_sync():
            loss = loss_of(ddp, rows)
            loss.backward()
    return loss.detach()


def changed(model: nn.Module) -> nn.Module:
    """Other values, and other bytes: DDP broadcasts those of rank 0."""
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            each.zero_()
    return model


def check(case: str) -> None:
    plain, model = made(case), made(case)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    if dist.get_rank() and case != "buffers left alone":
        model = changed(model)
    if case == "compile":
        model.compile(backend="aot_eager")
    ddp = DistributedDataParallel(model, **ARGUMENTS.get(case, {}))
    of_plain, of_ddp = optimizer(plain), optimizer(model)
    counted: list[int] = []
    real, checksums.checksum = checksums.checksum, lambda *args: counted.append(1) or real(*args)
    for turn in range(3):
        losses, expected = plain_gradients(plain, batches(case, turn))
        counted.clear()
        got = step(ddp, batches(case, turn)[dist.get_rank()])
        assert not counted or turn == 0, f"{len(counted)} checksums of bytes that nothing has changed"
        assert torch.equal(got, losses[dist.get_rank()]), f"the loss is another: {got} for {losses}"
        for name, parameter in trained(model).items():
            if name in expected:
                assert expected[name].isfinite().all()
                assert torch.equal(parameter.grad, expected[name]), f"the gradient of {name} is another"
                trained(plain)[name].grad = expected[name]
            else:
                assert parameter.grad is None or not parameter.grad.any()
        for each in (of_plain, of_ddp):
            each.step()
            each.zero_grad()
    checksums.checksum = real
    state, trained_now = model.state_dict(), trained(plain)
    for name in before:
        expected = trained_now[name] if name in trained_now else before[name]
        assert same_bits(state[name], expected), f"{name} is not what it was"
    if case == "every byte":
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, every_two_bytes())


if __name__ == "__main__":
    check_on_ranks(check)
