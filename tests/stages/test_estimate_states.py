"""The memory table's optimizers and offloaded activations, byte for byte against real ones on the CPU."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import peft
import transformers

import nf4kernels.integrations.peft  # noqa: F401 (makes PEFT know our layers)
from nf4kernels.model.quantize import quantize_model
from nf4kernels.optim import PagedAdamW, offload, offload_activations
from nf4kernels.stages.estimate import Options, estimate

LLAMA = {
    "model_type": "llama", "tie_word_embeddings": False, "hidden_size": 256, "intermediate_size": 384,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
RANK = 24  # of its factors some have 4096 numbers in whole blocks of 256, some have fewer


def model(adapter_dtype=torch.float32, rank=RANK):
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(torch.bfloat16)
    quantize_model(dense, progress=False)
    made = peft.get_peft_model(dense, peft.LoraConfig(r=rank, target_modules="all-linear"))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return made


def state_bytes(optimizer, trained) -> int:
    """Of the moments, after a step; torchao's are of several tensors."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    moments = [value for own in optimizer.state.values() for name, value in own.items() if name != "step"]
    assert len(moments) == 2 * len(trained)
    parts = [[getattr(each, name) for name in getattr(each, "tensor_attrs", ())] or [each] for each in moments]
    return sum(tensor.nbytes for part in parts for tensor in part)


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_adamw_s_states(adapter_dtype):
    trained = [each for each in model(getattr(torch, adapter_dtype)).parameters() if each.requires_grad]
    options = {"rank": RANK, "adapter_dtype": adapter_dtype}
    plain = estimate(LLAMA, Options(**options))
    assert state_bytes(torch.optim.AdamW(trained), trained) == plain.optimizer > 0
    paged = estimate(LLAMA, Options(optimizer="paged_adamw_32bit", **options))
    assert state_bytes(PagedAdamW(trained), trained) == paged.optimizer_on_host
    assert plain.train - paged.train == plain.optimizer


@pytest.mark.parametrize(("name", "at_most"), [("AdamW8bit", 0.4), ("AdamW4bit", 0.3)])
def test_torchao_s_states(name, at_most):
    """With the blocks of 256 that transformers asks for; small factors and the tables of levels take their part."""
    torchao_optim = pytest.importorskip("torchao.optim", reason="torchao is not installed: its states are not counted")
    trained = [each for each in model().parameters() if each.requires_grad]
    found = estimate(LLAMA, Options(rank=RANK, optimizer=f"adamw_torch_{name[-4]}bit"))
    assert state_bytes(getattr(torchao_optim, name)(trained, block_size=256), trained) == found.optimizer
    assert found.optimizer < at_most * 2 * found.adapters


@pytest.mark.parametrize("length", [512, 640])
def test_offloaded_activations(length, monkeypatch):
    """What a real forward moves; the peak, where gradients are few, has one layer's input instead of all."""
    monkeypatch.setattr(offload, "HOST", ())
    real = model(rank=1)
    real.gradient_checkpointing_enable({"use_reentrant": False})
    real.enable_input_require_grads()
    real.train()
    ids = torch.ones(1, length, dtype=torch.long)
    with offload_activations(real) as moved:
        loss = real(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    kept, offloaded = (
        estimate(LLAMA, Options(length=length, rank=1, offload_activations=offloads)) for offloads in (False, True)
    )
    assert offloaded.activations_on_host == moved.bytes
    assert kept.activations_on_host == 0
    inputs = [length * LLAMA["hidden_size"] * 2] * LLAMA["num_hidden_layers"]
    assert moved.bytes >= sum(inputs)
    assert kept.activations - offloaded.activations >= sum(inputs[1:])
