"""A causal language model of two layers, without a framework: what takes any model is tested on it."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(B, T, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


class ByteLM(nn.Module):
    """Returns a mapping with `logits` `[B, T, vocabulary]`, of token ids `[B, T]`; weights drawn from a seed."""

    def __init__(
        self, vocabulary: int = 64, width: int = 64, layers: int = 2, heads: int = 4, inner: int = 128, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, width)
            self.layers = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
            self.norm = nn.RMSNorm(width)
            self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)  # causal attention: what is padded on the right is seen by nothing
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.lm_head(self.norm(x))}
