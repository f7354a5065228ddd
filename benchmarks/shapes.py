"""The [N, K] weights that the benchmarks use: every linear layer of some well-known models, from their config.json."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertsShape:
    """The gate_up_proj of a mixture-of-experts layer: each token takes `top_k` of `experts` [N, K] weights."""

    experts: int
    top_k: int
    N: int
    K: int

    def route(self, tokens: int) -> list[int]:
        """Rows of each expert where every token takes `top_k` drawn at random, as a trained router's balanced load."""
        chosen = torch.rand(tokens, self.experts).topk(self.top_k).indices
        return chosen.flatten().bincount(minlength=self.experts).tolist()


MODELS = {
    "Llama-7B": {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
    "Llama-3-8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Mistral-7B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Qwen2.5-7B": {"q, o": (3584, 3584), "k, v": (512, 3584), "gate, up": (18944, 3584), "down": (3584, 18944)},
    "SmolLM2-135M": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
}
GPU_SHAPES = ((4096, 4096), (11008, 4096), (8192, 28672), (28672, 8192))  # Llama 7B's q and gate, 70B's down and gate
EXPERTS = {"OLMoE-1B-7B": ExpertsShape(64, 8, 2048, 2048), "Qwen3-30B-A3B": ExpertsShape(128, 8, 1536, 2048)}
LONG = ((4096, 11008), (4096, 14336), (8192, 28672))  # Llama's downs, 7B, 8B and 70B: rows whose x fills an L1
FOCUS = ((4096, 4096), (11008, 4096))  # measured at every M and thread count, the first in a cache as well


def layer_names() -> dict[tuple[int, int], str]:
    """(N, K) -> "Llama-7B q, k, v, o; Llama-3-8B q, o": each shape once, in the order of MODELS."""
    names: dict[tuple[int, int], list[str]] = {}
    for model, layers in MODELS.items():
        for layer, shape in layers.items():
            names.setdefault(shape, []).append(f"{model} {layer}")
    return {shape: "; ".join(users) for shape, users in names.items()}
