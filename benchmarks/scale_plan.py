"""The table of docs/scale-plan.md: what one of many GPUs takes to train adapters on published models, simulated.

    python -m benchmarks.scale_plan [MODEL ...]

A line is printed as soon as it is known; all of them take about fifteen minutes on one core.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

from nf4kernels.stages.estimate import Options
from nf4kernels.stages.rank_plan import RankPlan, rank_plans

GIB = 2**30
CARDS = (24, 48, 80)
LINKS = ("nvlink", "8x400g", "400g", "25g")


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
        "tie_word_embeddings": False,
    }  # fmt: skip


# What memory depends on in the config.json that is published with each.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "LLaMA-65B": _llama(8192, 80, 64, 64, 22016, 32000),
    "Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672, 128256),
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "Llama-3.1-405B": _llama(16384, 126, 128, 8, 53248, 128256),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A line of the table, or one for each number of ranks."""

    model: str
    ranks: tuple[int, ...]
    length: int
    told: str
    options: Options


CHECKPOINTS = ("checkpointing", Options())
PAGED = Options(rank=64, adapter_dtype="bfloat16", optimizer="paged_adamw_32bit")  # as QLoRA's paper trains
CASES = (
    Case("Llama-3.1-8B", (1, 8, 64, 512), 2048, *CHECKPOINTS),
    Case("LLaMA-65B", (1,), 512, "checkpointing, paged optimizer", PAGED),
    Case("LLaMA-65B", (1,), 512, "checkpointing", replace(PAGED, optimizer="adamw_torch_fused")),
    Case("LLaMA-65B", (1,), 512, "paged optimizer", replace(PAGED, checkpointing=False)),
    Case("Llama-3.1-70B", (1, 8, 64, 512), 2048, *CHECKPOINTS),
    Case("Qwen3-235B-A22B", (8, 64, 512), 2048, *CHECKPOINTS),
    Case("Llama-3.1-405B", (8, 64, 512), 2048, *CHECKPOINTS),
    Case("Llama-3.1-405B", (8,), 2048, "checkpointing, layers kept", Options(reshard_after_forward=False)),
    Case("Llama-3.1-405B", (8,), 2048, "nothing", Options(checkpointing=False)),
)


def line(case: Case, plan: RankPlan) -> str:
    simulated = plan.simulated
    fits = next((f"{card} GB" for card in CARDS if simulated.peak <= card * GIB), "none")
    seconds = [plan.seconds(link) for link in LINKS]
    cells = (
        case.model, str(simulated.ranks), f"1 x {case.length}", case.told,
        f"{plan.estimate.train / GIB:.1f}", f"{simulated.peak / GIB:.1f}",
        f"{plan.estimate.train / simulated.peak - 1:+.1%}", fits,
        f"{simulated.gathered / 1e9:.1f}", f"{simulated.reduced / 1e9:.2f}",
        *("-" if time is None else f"{time:.2f}" for time in seconds),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEADER = (
    "model", "ranks", "tokens a rank", "turned on", "estimated", "simulated", "off", "fits", "gathers", "reduces",
    *LINKS,
)  # fmt: skip


def main(models: list[str]) -> None:
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    for case in CASES:
        if models and case.model not in models:
            continue
        options = case.options
        for plan in rank_plans(MODELS[case.model], case.ranks, [1], [case.length], [options.rank], options):
            print(line(case, plan), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
