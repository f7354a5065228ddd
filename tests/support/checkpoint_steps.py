"""Run by torchrun on 4 ranks: torch.distributed.checkpoint, saved on 2 of them and gone on with on 1, 2 and 4.

Every rank takes the same examples. An average of 2 or 4 equal gradients is exact in any order, so that the curve must
be the same bits on any number of ranks. Prints "same: case".
"""

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import tiny
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import nf4kernels as nf4

LIMIT = timedelta(seconds=120)
STEPS, SAVED_AT, SAVED_ON = 6, 3, 2
RANKS = (1, 2, 4)
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
CASES = ("llama", "experts", "rows of each rank", "trained alone", "in the background", "whole on each rank")


def made(case: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = tiny.make("MixtralForCausalLM", num_local_experts=3) if case == "experts" else tiny.llama()
    with torch.no_grad():
        for parameter in model.parameters():  # tiny's are of one seed
            parameter.normal_(std=0.05)
    model.requires_grad_(False)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=4, init="gaussian"), progress=False)
    return tiny.fill_adapters(model).train()


def begin(case: str, seed: int, mesh: DeviceMesh | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = made(case, seed)
    if mesh is not None:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(case: str, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    ids = (tiny.IDS * 7 + number * 11) % tiny.SIZES["vocab_size"]
    if case == "rows of each rank":
        ids = ids.roll(dist.get_rank(), 0)[:1]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, case: str) -> dict:
    options = TRAINED if case == "trained alone" else None
    names = ("model", "optimizer")
    return dict(zip(names, get_state_dict(model, optimizer, options=options)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bytes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()) for name, p in model.named_parameters() if p.dtype == torch.uint8}


def check(case: str, folder: Path, groups: dict, meshes: dict) -> None:
    is_whole = case == "whole on each rank"
    resumed_on = (2,) if case == "rows of each rank" else RANKS
    if dist.get_rank() < SAVED_ON:
        model, optimizer = begin(case, 0, None if is_whole else meshes[SAVED_ON])
        packed = bytes_of(model)
        assert packed, "nothing is quantized"
        curve = [step(case, model, optimizer, number) for number in range(SAVED_AT)]
        state = state_of(model, optimizer, case)
        if case == "trained alone":
            assert not packed.keys() & state["model"].keys(), "the base is saved again"
        if case == "in the background":
            future = dcp.async_save(state, checkpoint_id=folder, process_group=groups["background"])
            curve.append(step(case, model, optimizer, SAVED_AT))
            future.result()
        else:
            dcp.save(state, checkpoint_id=folder, process_group=groups[SAVED_ON])
        curve += [step(case, model, optimizer, number) for number in range(len(curve), STEPS)]
        assert len(set(curve)) == STEPS
    dist.barrier()
    for ranks in resumed_on:
        if dist.get_rank() < ranks:
            got, its = go_on(case, folder, groups[ranks], None if is_whole else meshes[ranks])
            if dist.get_rank() < SAVED_ON:
                assert got == curve[SAVED_AT:], f"the losses on {ranks} ranks are others: {got}, {curve[SAVED_AT:]}"
                for name, tensor in its.items():
                    assert torch.equal(tensor, packed[name]), f"{name} is not what it was"
        dist.barrier()


def go_on(case: str, folder: Path, group: dist.ProcessGroup, mesh: DeviceMesh | None):
    """A model of other weights takes the saved state, or of the same where they are not saved; then the last steps."""
    model, optimizer = begin(case, 0 if case == "trained alone" else 1, mesh)
    step(case, model, optimizer, 99)  # its bytes have been seen, and its optimizer has a state
    state = state_of(model, optimizer, case)
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=TRAINED if case == "trained alone" else None,
    )  # fmt: skip
    return [step(case, model, optimizer, number) for number in range(SAVED_AT, STEPS)], bytes_of(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=LIMIT)
    groups = {ranks: dist.new_group(list(range(ranks)), timeout=LIMIT) for ranks in RANKS}
    groups["background"] = dist.new_group(list(range(SAVED_ON)), timeout=LIMIT)  # its exchanges cross the training's
    meshes = {n: DeviceMesh.from_group(groups[n], "cpu") if dist.get_rank() < n else None for n in RANKS}
    for number, case in zip(itertools.count(), sys.argv[2:]):
        check(case, Path(sys.argv[1]) / str(number), groups, meshes)
        if dist.get_rank() == 0:
            print(f"same: {case}", flush=True)
    dist.destroy_process_group()
