"""Run by torchrun on some ranks: one training step of a sharded model beside that of the whole one. Prints "same"."""

import sys

import torch
import torch.distributed as dist
from support import tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import nf4kernels as nf4

LORA = nf4.LoraConfig(r=4, init="gaussian")
ODD = {"intermediate_size": 127}  # rows that no number of ranks divides, and columns that are no whole blocks


def dense(case: str) -> nn.Module:
    if case == "experts":
        return tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    return tiny.llama(tie_word_embeddings=case == "tied", **(ODD if case == "odd rows" else {}))


def made(case: str) -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    model = dense(case)
    model.requires_grad_(False)
    nf4.quantize_model(model, lora=LORA, progress=False)
    tiny.fill_adapters(model)
    if case == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def shard(model: nn.Module, case: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "reshard_after_forward": case != "kept after forward"}
    if case == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def step(model: nn.Module) -> torch.Tensor:
    loss = model(input_ids=tiny.IDS, labels=tiny.IDS, use_cache=False).loss
    loss.backward()
    return loss.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(case: str) -> None:
    plain, sharded = made(case), made(case)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    if case == "mixed precision":  # parameters are kept in fp32, and computed with in bf16
        for parameter in plain.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    shard(sharded, case)
    ranks = dist.get_world_size()
    rows = {name: -(-parameter.shape[0] // ranks) for name, parameter in plain.named_parameters()}
    packed = {name: each for name, each in sharded.named_parameters() if each.dtype == torch.uint8}
    assert packed, "nothing is quantized"
    for name, parameter in packed.items():
        assert parameter.to_local().shape[0] <= rows[name], f"{name} is not a part of the rows"
    for _ in range(2):  # the second gathers what the first has left
        assert torch.equal(step(sharded), step(plain)), "the loss is another"
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    got = {name: whole(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
    assert expected.keys() == got.keys()
    for name in expected:
        if case == "mixed precision":  # the two steps' gradients are summed in fp32 there, in bf16 here
            bound = 2**-7 * expected[name].abs().max().item()
            torch.testing.assert_close(got[name], expected[name].float(), rtol=0, atol=bound, msg=f"gradient of {name}")
        else:
            assert torch.equal(got[name], expected[name]), f"the gradient of {name} is another"
    state = sharded.state_dict()
    assert state.keys() == before.keys()
    for name in before:
        assert torch.equal(whole(state[name]), before[name]), f"{name} is not what it was"
    for module in sharded.modules():
        if isinstance(module, nf4.QuantLinear):
            assert module.checksum.any(), "sharding does not forget what the bytes were"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        check(case)
        if dist.get_rank() == 0:
            print(f"same: {case}", flush=True)
    dist.destroy_process_group()
