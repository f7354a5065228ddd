"""Run by torchrun on some ranks: steps of what accelerate has prepared, beside those of the whole model. "same"."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedType,
    TorchDynamoPlugin,
    disable_fsdp_ram_efficient_loading,
    enable_fsdp_ram_efficient_loading,
)
from support import fsdp_on_cpus, tiny
from support.sharded_models import (
    dense,
    every_two_bytes,
    loss_of,
    made,
    optimizer,
    plain_gradients,
    same_bits,
    trained,
    whole,
    with_peft,
)
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config

REPLICAS = "replicas, every byte"
EACH = {"llama whole on each"}  # of all others rank 0 has the values
PLUGIN = {
    "kept after forward": {"reshard_after_forward": False}, "offloaded": {"cpu_offload": True},
    "checkpointing": {"activation_checkpointing": True},
}  # fmt: skip
LOADED = ("quantized as read", "experts quantized as read", "stored in 4 bits", "stored experts")
LAUNCHED = ("launched, every byte", "launched, quantized as read")  # by `accelerate launch`, with its file
BF16 = ("mixed precision", "every byte", "offloaded", *LAUNCHED)


def accelerator(case: str) -> Accelerator:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if case in LAUNCHED:
        using = Accelerator()
        assert (using.is_fsdp2, using.mixed_precision) == (True, "bf16")
        assert using.state.fsdp_plugin.cpu_ram_efficient_loading
        assert using.state.fsdp_plugin.activation_checkpointing
        return using
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=case not in EACH,
        **PLUGIN.get(case, {}),
    )  # fmt: skip
    dynamo = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=True) if case == "compile" else None
    precision = "bf16" if case in BF16 else "no"
    return Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=precision, dynamo_plugin=dynamo)


def emptied(model: nn.Module) -> nn.Module:
    """As a rank has it that has not read the checkpoint: all state is rank 0's to give."""
    persistent = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in persistent:
                tensor.zero_()
    return model


def two(case: str) -> tuple[nn.Module, nn.Module]:
    """A whole model, and the same to be sharded, of which rank 0 alone has the values, but for EACH."""
    if case.removeprefix("launched, ") in LOADED:
        return loaded(case)
    named = "llama" if case in PLUGIN else case.removeprefix("launched, ").removesuffix(" whole on each")
    plain, model = made(named), made(named)
    return plain, model if dist.get_rank() == 0 or case in EACH else emptied(model)


def loaded(case: str) -> tuple[nn.Module, nn.Module]:
    """By from_pretrained, without and with `cpu_ram_efficient_loading`, and PEFT's adapters on each."""
    where = Path(case)
    dense("experts" if "experts" in case else "llama").save_pretrained(where)  # rank 0 does
    dist.barrier()
    options = {"quantization_config": Nf4Config(), "dtype": torch.float32}
    if case.startswith("stored"):
        AutoModelForCausalLM.from_pretrained(where, **options).save_pretrained(where / "stored")
        dist.barrier()
        where, options = where / "stored", {"dtype": torch.float32}
    models = []
    for disable in (True, False):
        disable_fsdp_ram_efficient_loading() if disable else enable_fsdp_ram_efficient_loading()
        model = AutoModelForCausalLM.from_pretrained(where, **options)
        is_awaiting = dist.get_rank() != 0 and not disable
        assert is_awaiting == model.hf_quantizer.is_awaiting
        torch.manual_seed(0)
        models.append(tiny.fill_adapters(with_peft(model)).train())
    return models[0], models[1]


def check(case: str) -> None:
    plain, model = two(case)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in plain.named_buffers() if name not in before}
    using = accelerator(case)
    model, stepping = using.prepare(model, optimizer(model))
    of_plain = optimizer(plain)
    packed = [each for each in model.parameters() if each.dtype == torch.uint8]
    assert packed, "nothing is quantized"
    assert all(isinstance(each, DTensor) for each in packed), "packed bytes are not sharded"
    for turn in range(3):
        rows = (tiny.IDS + turn) % 90 + 3
        batches = [[rows[rank : rank + 1]] for rank in range(2)]
        dtypes = (torch.bfloat16, torch.bfloat16) if case in BF16 else ()
        losses, expected = plain_gradients(plain, batches, *dtypes)
        loss = loss_of(model, batches[dist.get_rank()][0])
        using.backward(loss)
        assert torch.equal(loss.detach(), losses[dist.get_rank()].to(loss.dtype)), f"another loss: {loss} for {losses}"
        gradients = {clean(name): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            assert gradient.isfinite().all(), f"NaN in the gradient of {name}"
            assert gradient.any(), f"no gradient of {name}"
            assert torch.equal(gradients[name].cpu(), gradient), f"the gradient of {name} is another"
            trained(plain)[name].grad = gradient
        norm = whole(using.clip_grad_norm_(model.parameters(), 1e6))  # of all, and nothing is cut
        assert 0 < norm.item() < 1e6
        for each in (of_plain, stepping):
            each.step()
            each.zero_grad()
    state = {clean(name): whole(tensor) for name, tensor in model.state_dict().items()}
    trained_now = trained(plain)
    assert state.keys() == before.keys()
    for name in before:
        expected = trained_now[name] if name in trained_now else before[name]
        assert same_bits(state[name].cpu(), expected), f"{name} is not what it was"
    for name, expected in buffers.items():
        assert torch.equal(model.get_buffer(name), expected), f"{name}, which no state has, is another"
    if case.endswith("every byte"):
        assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], every_two_bytes())
    for module in model.modules():
        if isinstance(module, nf4.QuantLinear):
            assert not any(isinstance(buffer, DTensor) or buffer.is_meta for buffer in module.buffers())


def check_replicas() -> None:
    """DDP, by accelerate's mixed precision, which is autocast."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    plain, model = made("every byte"), made("every byte")
    using = Accelerator(cpu=True, mixed_precision="bf16")
    replica, stepping = using.prepare(model if dist.get_rank() == 0 else emptied(model), optimizer(model))
    assert isinstance(replica, nn.parallel.DistributedDataParallel)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = loss_of(plain, tiny.IDS)
        expected.backward()
        loss = loss_of(replica, tiny.IDS)
        using.backward(loss)
        assert torch.equal(loss, expected), f"another loss: {loss} for {expected}"
        for name, parameter in trained(plain).items():
            gradient = trained(model)[name].grad
            assert gradient.isfinite().all(), f"NaN in the gradient of {name}"
            assert torch.equal(gradient, parameter.grad), f"the gradient of {name} is another"
        plain.zero_grad()
        stepping.zero_grad()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, every_two_bytes())


def clean(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    fsdp_on_cpus.pretend()
    PartialState(cpu=True)
    for case in sys.argv[1:]:
        check_replicas() if case == REPLICAS else check(case)
        if dist.get_rank() == 0:
            print(f"same: {case}", flush=True)
    dist.destroy_process_group()
