"""The memory estimate against what a real step saves, a process takes, and the QLoRA paper reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import peft
import transformers

import nf4kernels.integrations.peft  # noqa: F401 (makes PEFT know our layers)
from nf4kernels.model.quantize import quantize_model
from nf4kernels.stages.errors import StageError
from nf4kernels.stages.estimate import Options, estimate, estimates

GIB = 2**30
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **TINY}
DEEP = {**LLAMA, "num_hidden_layers": 8}


def saved_by_a_real_step(batch, length, rank):
    """Bytes that autograd saves in a forward on the CPU, parameters left out."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DEEP))
    model = model.to(torch.bfloat16)
    quantize_model(model, progress=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize(("batch", "length", "rank"), [(1, 64, 8), (2, 128, 8), (4, 64, 32)])
def test_activations_are_what_autograd_saves(batch, length, rank):
    saved = saved_by_a_real_step(batch, length, rank)
    found = estimate(DEEP, Options(batch, length, rank, checkpointing=False))
    assert saved <= found.activations + found.logits <= 1.15 * saved


def test_parts_by_their_shapes():
    found = estimate(LLAMA, Options(batch=2, length=32, rank=8, double_quant=False))
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert found.weights == matrices // 2
    assert found.scales >= matrices // 64 * 4
    assert found.dense >= 2 * (2 * 96 * 64 + 5 * 64)
    factors = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert found.adapters == 4 * factors
    assert found.optimizer == 2 * found.adapters
    assert found.cache >= 2 * 2 * 2 * 32 * 32 * 2
    assert found.workspace == 2 * 64 * 128
    assert found.parameters == matrices + 2 * 96 * 64 + 5 * 64


def test_checkpointing_and_accumulation():
    kept = estimate(LLAMA, Options(4, 64, 8, checkpointing=False))
    again = estimate(LLAMA, Options(4, 64, 8, checkpointing=True))
    assert again.activations < 0.8 * kept.activations
    accumulated = estimate(LLAMA, Options(4, 64, 8, accumulation=4))
    assert accumulated.gradients == accumulated.adapters
    assert accumulated.train >= again.train


def test_shards():
    alone = estimate(LLAMA, Options())
    for shard in ("fsdp2", "zero3"):
        ranks = estimate(LLAMA, Options(gpus=4, shard=shard))
        assert ranks.weights == alone.weights // 4
        assert ranks.optimizer == alone.optimizer // 4
        assert alone.scales / 4 < ranks.scales < alone.scales  # those of blocks are shared, the others on every rank
        assert 0 < ranks.gathered < alone.model + alone.adapters


def test_paged_states_are_on_the_host():
    """Ours are torch's AdamW's, in the dtype of the adapters."""
    found = estimate(LLAMA, Options(optimizer="paged_adamw_32bit", adapter_dtype="bfloat16"))
    assert found.optimizer == 0
    assert found.optimizer_on_host == 2 * found.adapters


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 64},
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 64},
    ],
)
def test_families(family):
    found = estimate({**TINY, **family}, Options(batch=2, length=64))
    assert min(found.weights, found.adapters, found.activations, found.cache) > 0
    if "num_local_experts" in family:
        assert found.weights > 2 * 4 * 3 * 64 * 128 // 2


def test_conv1d_is_a_linear_layer():
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    found = estimate({"model_type": "gpt2", **sizes}, Options(batch=2, length=64))
    assert found.weights == 64 * (3 * 64 + 64 + 4 * 64 + 4 * 64) // 2


def test_all_cases_in_order():
    found = [each.options for each in estimates(LLAMA, [1, 2], [16, 32], [4, 8])]
    assert [(each.rank, each.batch, each.length) for each in found] == [
        (rank, batch, length) for rank in (4, 8) for batch in (1, 2) for length in (16, 32)
    ]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "nonsense"}, "must have a model_type that transformers knows, got 'nonsense'"),
        ({"model_type": "t5"}, "must be of a causal language model, got t5"),
        (Path("/nowhere"), "must be a config.json or its directory"),
    ],
)
def test_refused(config, sentence):
    with pytest.raises(StageError, match=sentence):
        estimate(config)


def test_options_refused():
    with pytest.raises(StageError, match=r"no layer of this llama is quantized: .*skip='model'"):
        estimate(LLAMA, Options(skip=("model",)))
    with pytest.raises(StageError, match="--batch must be 1 or more, got 0"):
        Options(batch=0)
    with pytest.raises(StageError, match=r"--optimizer must be one of .*, got lion"):
        Options(optimizer="lion")
    with pytest.raises(StageError, match="--experts needs a model with experts"):
        estimate(LLAMA, Options(experts=True))


def llama(hidden, layers, heads, intermediate):
    """The shapes of LLaMA (Touvron et al. 2023), which QLoRA fine-tunes."""
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": intermediate, "vocab_size": 32000,
        "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("shapes", "card"), [((6656, 60, 52, 17920), 24), ((8192, 80, 64, 22016), 48)])
def test_qlora_fits_where_its_paper_says(shapes, card):
    """Dettmers et al. 2023 (arXiv 2305.14314): 33B on 24 GB and 65B on 48 GB, with paged optimizer states."""
    options = Options(1, 512, 64, adapter_dtype="bfloat16", optimizer="paged_adamw_32bit")
    found = estimate(llama(*shapes), options)
    assert 0.6 * card * GIB < found.train < card * GIB


# The SmolLM2 models (Allal et al. 2025), of whose shapes a config.json tells everything that memory depends on.
SMOLLM2 = {
    size: {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    for size, hidden, layers, heads, kv_heads, intermediate in (
        ("135M", 576, 30, 9, 3, 1536), ("360M", 960, 32, 15, 5, 2560), ("1.7B, four layers", 2048, 4, 32, 32, 8192),
    )
}  # fmt: skip

REAL = """
import ctypes, gc, json, sys
import torch, transformers, peft
import nf4kernels.integrations.peft
from nf4kernels.model.quantize import quantize_model

config, batch, length, checkpointing = json.loads(sys.argv[1])
torch.set_num_threads(1)
libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system
model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**config), dtype=torch.bfloat16)
quantize_model(model, progress=False)
model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
model.train()

def step(*shape):
    ids = torch.randint(0, 1000, shape)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)

def status(key):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

step(1, 8)
gc.collect()
libc.malloc_trim(0)
with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
    file.write("5")
before = status("VmRSS")
step(batch, length)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("size", "batch", "length", "checkpointing"),
    [
        *(("135M", 1, length, False) for length in (256, 1024)),
        *(("360M", 1, length, True) for length in (256, 1024)),
        *(("1.7B, four layers", 1, length, False) for length in (256, 1024)),
        ("135M", 2, 256, False),
    ],
)
def test_peak_of_a_real_step(size, batch, length, checkpointing):
    """Within 10 % of how much the resident set of a real step's process grows, or 22 MB: some 16 are no tensors."""
    config = SMOLLM2[size]
    arguments = [sys.executable, "-c", REAL, json.dumps([config, batch, length, checkpointing])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(arguments, capture_output=True, encoding="utf-8", check=True, env=environment)
    grown = int(ran.stdout.split()[-1])
    found = estimate(config, Options(batch, length, 16, checkpointing=checkpointing, device="cpu"))
    expected = found.activations + found.logits + found.gradients
    print(f"SmolLM2-{size} {batch} x {length}: {expected / 1e6:.0f} MB estimated, {grown / 1e6:.0f} MB measured")
    assert expected == pytest.approx(grown, rel=0.1, abs=22e6)
