"""A whole model, SmolLM2-135M-Instruct: a QLoRA training step, and greedy decoding through the KV cache.

Ours beside PEFT on bitsandbytes' layers (not double-quantized: its faster ones) beside PEFT on the dense bf16 model.
Rank 16 on every linear layer but lm_head, adapters in bf16 on every side, AdamW on the adapters.

    python -m benchmarks.model.bench_model SIDE THREADS  # peak memory of a process that builds that side and trains it
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import nf4kernels as nf4
from nf4kernels.demo import loading, smollm2
from nf4kernels.demo.data import definitions

from ..harness import BNB, DENSE, OURS, ROOT, Plan, Row
from ..peers import ALPHA, RANK, add_peft_lora, bitsandbytes_linear
from ..report.goals import MODEL_STEP

SIDES = (OURS, BNB, DENSE)
BATCH, LENGTH = 4, 128
PROMPT, NEW = 32, 64
PEAK_STEPS = 3
# |loss - loss of dense bf16| in nats a token. NF4 costs SmolLM2 0.37 on the demo's held-out answers; a wrong layer
# gives the loss of a random one, which is log 49152 = 10.8.
LOSS_BOUND = 0.6
# Between the two 4-bit sides: same codes, scales in 8 bits or in fp32.
LOSS_BOUND_4BIT = 0.1


def load() -> tuple[nn.Module, Tensor, str]:
    """(model in bf16, token ids [BATCH, LENGTH], name); random weights, and a name that says so, without it."""
    loading.quiet_transformers()
    try:
        model, tokenizer = loading.load(smollm2.fetch(ROOT / ".cache"))
    except smollm2.FetchError as error:
        print(f"{error}; measuring a random model of the same sizes", file=sys.stderr)
        return random_model(), torch.randint(49152, (BATCH, LENGTH)), f"{smollm2.DIRECTORY}, random weights"
    text = "\n".join(row["prompt"] + row["completion"] for row in definitions()[:200])
    ids = tokenizer(text, return_tensors="pt").input_ids[0, : BATCH * LENGTH]
    return model, ids.view(BATCH, LENGTH), smollm2.DIRECTORY


def random_model(layers: int = 30) -> nn.Module:
    """SmolLM2-135M's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def as_side(side: str, model: nn.Module) -> nn.Module:
    """`model`, changed in place: frozen, in 4 bits where the side is, with adapters to train."""
    model.requires_grad_(False)
    if side == OURS:
        report = nf4.quantize_model(model, progress=False)
        for layer in report.layers:
            model.get_submodule(layer.name).add_lora(nf4.LoraConfig(r=RANK, alpha=ALPHA), dtype=torch.bfloat16)
        return model.train()
    names = linear_names(model)
    if side == BNB:
        replace_by_bitsandbytes(model)
    add_peft_lora(model, names)
    return model.train()


def linear_names(model: nn.Module) -> list[str]:
    """Of every linear layer but the head."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]


def replace_by_bitsandbytes(model: nn.Module) -> None:
    for name in linear_names(model):
        parent, _, leaf = name.rpartition(".")
        dense = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, bitsandbytes_linear(dense, double_quant=False))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)

    def run() -> None:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@torch.no_grad()
def decode(model: nn.Module, prompt: Tensor) -> Tensor:
    """The NEW likeliest next tokens, one after the other."""
    ids, cache, tokens = prompt, None, []
    for _ in range(NEW):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        tokens.append(ids)
    return torch.cat(tokens, 1)


def check_losses(losses: dict[str, float]) -> None:
    for side, loss in losses.items():
        change = abs(loss - losses[DENSE])
        assert change <= LOSS_BOUND, f"{side}: loss {loss:.3f}, dense {losses[DENSE]:.3f}, allowed {LOSS_BOUND} apart"
    change = abs(losses[OURS] - losses[BNB])
    assert change <= LOSS_BOUND_4BIT, f"losses of the 4-bit sides {losses}, allowed {LOSS_BOUND_4BIT} apart"


def peak_mib(side: str, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.model.bench_model", side, str(threads)]
    return float(
        subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout.split()[-1]
    )


def rows(plan: Plan) -> Iterator[Row]:
    """The training step and the decoding, with the first of the plan's thread counts."""
    threads = plan.threads[0]
    torch.set_num_threads(threads)
    models = {}
    for side in SIDES:
        model, ids, name = load()
        models[side] = as_side(side, model)
    with torch.no_grad():
        losses = {side: loss_of(model, ids).item() for side, model in models.items()}
    print(f"{name}: losses before training " + ", ".join(f"{side} {loss:.3f}" for side, loss in losses.items()))
    check_losses(losses)
    # checked before training: AdamW's first steps follow the signs of gradients, and adapters drift apart by rounding
    steps = {side: training_step(model, ids) for side, model in models.items()}
    row = plan.measure(MODEL_STEP, name, None, "", steps, None)
    row.tokens = ids.numel()
    row.peak_mib = {side: peak_mib(side, threads) for side in SIDES}
    yield row
    for model in models.values():
        model.eval()
    prompt = ids[:1, :PROMPT]
    decoding = {side: partial(decode, model, prompt) for side, model in models.items()}
    row = plan.measure("decode", name, None, "", decoding, None)
    row.tokens = NEW
    yield row


def main(side: str, threads: str) -> None:
    """Print the peak of this process, MiB: the model built, and PEAK_STEPS of training."""
    torch.set_num_threads(int(threads))
    model, ids, _ = load()
    step = training_step(as_side(side, model), ids)
    for _ in range(PEAK_STEPS):
        step()
    # not ru_maxrss: a process starts with that of the one that started it
    print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
