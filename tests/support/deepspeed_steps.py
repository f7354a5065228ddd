"""Run by torchrun on some ranks: steps of a DeepSpeed engine beside those of the whole model. Prints "same"."""

import sys
import time

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from support import tiny
from torch import nn

import nf4kernels as nf4

LORA = nf4.LoraConfig(r=4, init="gaussian")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ODD = {"intermediate_size": 127}  # bytes that no number of ranks divides, and columns that are no whole blocks
ENOUGH = 3  # steps: under ZeRO-3 the first records what is used when, and the third prefetches by it


def dense(case: str) -> nn.Module:
    if case == "experts":
        return tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    return tiny.llama(tie_word_embeddings=case == "tied", **(ODD if case == "odd rows" else {}))


def made(case: str) -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    model = dense(case)
    model.requires_grad_(False)
    nf4.quantize_model(model, lora=None if case == "peft" else LORA, progress=False)
    if case == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    tiny.fill_adapters(model)
    if case == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-2, foreach=False)


def engine_of(model: nn.Module, stage: int, case: str = ""):
    config = {
        "train_micro_batch_size_per_gpu": len(tiny.IDS),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": case == "bf16"},
    }
    if case == "offload":
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return deepspeed.initialize(model=model, optimizer=adamw(trained(model).values()), config=config)[0]


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tiny.IDS, labels=tiny.IDS, use_cache=False).loss


def step(engine) -> torch.Tensor:
    loss = loss_of(engine)
    engine.backward(loss)
    engine.step()
    return loss.detach()


def passed_on(value):
    """As DeepSpeed's hooks pass on a module's inputs and output: each tensor through a node of autograd's."""
    if isinstance(value, torch.Tensor):
        return value.view_as(value) if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(map(passed_on, value))
    if isinstance(value, dict):
        return type(value)((key, passed_on(each)) for key, each in value.items())
    return value


def sum_as_zero3_does(model: nn.Module) -> None:
    """Its hooks have a LoRA factor called as a module, and gradients of what several modules read summed by module."""
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, inputs: passed_on(inputs))
        module.register_forward_hook(lambda module, inputs, output: passed_on(output))


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Whole:
    """One process's training of the whole model, with the optimizer's numbers in fp32 as DeepSpeed keeps them."""

    def __init__(self, case: str, stage: int) -> None:
        self.model = made(case)
        if case in DTYPES:  # its engine casts parameters, and leaves buffers alone
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(DTYPES[case])
        if stage == 3:
            sum_as_zero3_does(self.model)
        self.trained = trained(self.model)
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.trained.items()}
        self.optimizer = adamw(self.masters.values())

    def loss(self) -> torch.Tensor:
        loss = loss_of(self.model)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        for name, master in self.masters.items():
            master.grad, self.trained[name].grad = self.trained[name].grad.float(), None
        self.optimizer.step()
        for name, master in self.masters.items():
            self.trained[name].data.copy_(master)


def check(case: str, stage: int) -> None:
    whole, model = Whole(case, stage), made(case)
    packed = {name: each.clone() for name, each in model.named_parameters() if each.dtype == torch.uint8}
    assert packed, "nothing is quantized"
    engine = engine_of(model, stage, case)
    for name, parameter in model.named_parameters() if stage == 3 else ():
        assert parameter.numel() == 0, f"{name} is not released"
        assert parameter.ds_tensor.numel() <= -(-parameter.ds_numel // dist.get_world_size())
    for _ in range(ENOUGH):
        expected, loss = whole.loss(), loss_of(engine)
        assert torch.equal(loss, expected), f"the loss is {loss}, not {expected}"
        engine.backward(loss)
        for name, parameter in trained(model).items():
            gradient = safe_get_full_grad(parameter)
            assert torch.equal(gradient, whole.trained[name].grad.to(gradient.dtype)), f"{name} has another gradient"
        engine.step()
        whole.step()
    expected, state = whole.model.state_dict(), whole_state(model)
    assert state.keys() == expected.keys()
    for name in expected:
        assert state[name].dtype == expected[name].dtype, f"{name} is {state[name].dtype}"
        assert torch.equal(state[name], expected[name]), f"{name} is another"
    for name in packed:
        assert torch.equal(state[name], packed[name]), f"{name} is not what it was"


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which is compiled for a minute: gloo does as well
    deepspeed.init_distributed("gloo")
    for each in sys.argv[1:]:
        stage, _, case = each.partition(" ")
        began = time.time()
        check(case, int(stage[-1]))
        if dist.get_rank() == 0:
            print(f"same: {each}", time.time() - began, flush=True)
    dist.destroy_process_group()
