"""Run by torchrun on two ranks: steps of a DeepSpeed engine beside those of the whole model. Prints "same: <case>".

DeepSpeed 0.19 runs on CPUs: its accelerator is "cpu", and its collectives are gloo's.
"""

import sys
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from support import tiny
from torch import nn

import nf4kernels as nf4
from nf4kernels.nn import checksum

LORA = nf4.LoraConfig(r=4, init="gaussian")
DTYPES = {"bf16": torch.bfloat16}
ODD = {"intermediate_size": 127}  # bytes that no number of ranks divides, and columns that are no whole blocks
STEPS = 3  # under ZeRO-3 the first records what is used when, and the third fetches ahead by it


def dense(case: str) -> nn.Module:
    if case == "experts":
        return tiny.make("MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    return tiny.llama(tie_word_embeddings=case == "tied", **(ODD if case == "odd rows" else {}))


def made(case: str = "llama") -> nn.Module:
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


def configuration(stage: int, case: str = "llama") -> dict:
    """Without a threshold below which ZeRO-3 would keep parameters whole, and without DeepSpeed's clipping at 1."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    if case == "offload":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": len(tiny.IDS), "gradient_clipping": 0.0, "bf16": {"enabled": case == "bf16"},
        "zero_allow_untested_optimizer": True, "zero_optimization": zero,
    }  # fmt: skip


def engine_of(model: nn.Module, stage: int, case: str = "llama"):
    options = {"optimizer": adamw(trained(model).values()), "config": configuration(stage, case)}
    return deepspeed.initialize(model=model, **options)[0]


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


class Whole:
    """One process's training of the whole model, with the optimizer's numbers in fp32 as DeepSpeed keeps them."""

    def __init__(self, case: str, stage: int) -> None:
        self.model = made(case)
        for parameter in self.model.parameters() if case in DTYPES else ():  # the engine leaves buffers alone
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


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype, f"{name} is {got[name].dtype}"
        assert torch.equal(got[name], expected[name]), f"{name} is another"


def check_released(model: nn.Module) -> None:
    """Every parameter is shared among the ranks, the packed bytes and the scales' codes as well."""
    of_bytes = [name for name, each in model.named_parameters() if each.dtype == torch.uint8]
    assert any(name.endswith("weight") for name in of_bytes)
    assert any(name.endswith("absmax") for name in of_bytes)
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0, f"{name} is not released"
        assert parameter.ds_tensor.dtype == parameter.dtype
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // dist.get_world_size())


def check_training(stage: int, case: str) -> None:
    """Losses, gradients, trained weights and all that is frozen, bit for bit."""
    whole, model = Whole(case, stage), made(case)
    packed = {name: each.clone() for name, each in model.named_parameters() if each.dtype == torch.uint8}
    engine = engine_of(model, stage, case)
    if stage == 3:
        check_released(model)
    with mock.patch.object(checksum, "checksum", wraps=checksum.checksum) as computed:
        for number in range(STEPS):
            before = computed.call_count
            loss = loss_of(engine)
            assert number == 0 or computed.call_count == before, "to gather is no write into the bytes"
            expected = whole.loss()
            assert torch.equal(loss, expected), f"the loss is {loss}, not {expected}"
            engine.backward(loss)
            for name, parameter in trained(model).items():
                gradient = safe_get_full_grad(parameter)
                assert torch.equal(gradient, whole.trained[name].grad.to(gradient.dtype)), f"{name}: another gradient"
            engine.step()
            whole.step()
    state = whole_state(model)
    check_same(state, whole.model.state_dict())
    check_same({name: state[name] for name in packed}, packed)


def check_casts(stage: int) -> None:
    """`bfloat16()` and `half()` of the engine's module reach neither bytes nor scales."""
    whole, model = Whole("bf16", stage), made()
    dense = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.uint8}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in dense}
    assert {name.rpartition(".")[2] for name in before} >= {"weight", "absmax", "scale_absmax", "code", "scale_code"}
    engine = engine_of(model, stage, "bf16")
    engine.module.bfloat16()
    whole.model.bfloat16()
    assert torch.equal(loss_of(engine), whole.loss())
    engine.module.half()
    state = whole_state(model)
    check_same({name: state[name] for name in before}, before)


def check_resume(stage: int, frozen: str) -> None:
    """Two steps, a checkpoint, two more; another process's two more are the same, from a model with other values."""
    directory, has_frozen = f"zero{stage} {frozen}", frozen == "resume with its base"
    model = made()
    engine = engine_of(model, stage)
    for _ in range(2):
        step(engine)
    engine.save_checkpoint(directory, exclude_frozen_parameters=not has_frozen)
    expected = [step(engine) for _ in range(2)]
    other = made()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
            elif has_frozen and parameter.dtype == torch.uint8:
                parameter.data.zero_()
    resumed = engine_of(other, stage)
    resumed.load_checkpoint(directory, load_module_strict=has_frozen)
    assert [loss.item() for loss in expected] == [step(resumed).item() for _ in range(2)]
    check_same(whole_state(other), whole_state(model))


def refusal(function, *args) -> str:
    try:
        function(*args)
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError(f"{function} takes a released parameter")


def check_files(stage: int) -> None:
    """Of released layers nothing is written or read; of gathered ones what one process writes."""
    model, plain = made(), made()
    rank = dist.get_rank()
    engine = engine_of(model, stage)
    layer = model.model.layers[0].self_attn.q_proj
    with deepspeed.zero.Init(config_dict_or_path=configuration(stage)):
        dense = tiny.Net()
    for call in (
        lambda: nf4.save_adapters(model, "refused"), lambda: nf4.save_checkpoint(model, "refused"),
        lambda: nf4.merge_model(model), lambda: layer.qweight,
        lambda: nf4.QuantLinear.from_linear(dense.blocks[0][0]), lambda: nf4.quantize_model(dense, progress=False),
    ):  # fmt: skip
        said = refusal(call)
        assert "must be whole, got it released by DeepSpeed's ZeRO-3: gather it first" in said, said
    wrong = refusal(model.load_state_dict, plain.state_dict())
    assert "this layer's is released by DeepSpeed's ZeRO-3, gather it first" in wrong, wrong
    nf4.save_adapters(plain, f"expected {rank}")
    assert "gather it first" in refusal(nf4.load_adapters, model, f"expected {rank}")
    with deepspeed.zero.GatheredParameters(list(trained(model).values())):  # the base stays released
        assert layer.weight.numel() == 0
        nf4.save_adapters(model, f"adapters {rank}")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        with open(f"adapters {rank}/{file}", "rb") as got, open(f"expected {rank}/{file}", "rb") as expected:
            assert got.read() == expected.read(), file
    with deepspeed.zero.GatheredParameters(list(layer.parameters())):
        assert torch.equal(layer.dequantize(), plain.model.layers[0].self_attn.q_proj.dequantize())
    assert engine.save_16bit_model("whole", "model.bin")
    dist.barrier()
    stored = torch.load("whole/model.bin", weights_only=True)
    check_same({name: stored[name] for name in plain.state_dict()}, plain.state_dict())


def check_from_pretrained(stage: int) -> None:
    """Each rank quantizes as it loads, since transformers partitions no model that a quantizer makes."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from nf4kernels.integrations.transformers import Nf4Config

    if dist.get_rank() == 0:
        tiny.llama().save_pretrained("dense")
    dist.barrier()
    kept = HfDeepSpeedConfig(configuration(stage))  # as Trainer does: while it lives, transformers knows of ZeRO-3
    model = AutoModelForCausalLM.from_pretrained("dense", quantization_config=Nf4Config(), dtype=torch.float32)
    del kept
    expected = tiny.quantized_llama()
    check_same(model.state_dict(), expected.state_dict())
    for each in (model, expected):
        torch.manual_seed(0)
        nf4.prepare_for_training(each, checkpointing=False)
        for layer in tiny.layers(each).values():
            layer.add_lora(LORA)
    engine = engine_of(model, stage)
    check_released(model)
    sum_as_zero3_does(expected)
    assert torch.equal(loss_of(engine), loss_of(expected))


CHECKS = {
    "casts": check_casts, "files": check_files, "from_pretrained": check_from_pretrained,
    **{case: lambda stage, case=case: check_resume(stage, case) for case in ("resume", "resume with its base")},
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute, and faster than gloo
    deepspeed.init_distributed("gloo")
    for named in sys.argv[1:]:
        zero, _, case = named.partition(" ")
        check = CHECKS.get(case) or (lambda stage, case=case: check_training(stage, case))
        check(int(zero[-1]))
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"same: {named}", flush=True)
    dist.destroy_process_group()
