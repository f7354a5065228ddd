"""A small language model with a head, and the names of its layers that quantize_model replaces."""

from torch import nn

OPTIONS = {"progress": False}


class Block(nn.Module):
    def __init__(self, dim=64):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.up_proj = nn.Linear(dim, 96)

    def forward(self, x):
        return self.up_proj(self.q_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.down = nn.Linear(96, 64)
        self.lm_head = nn.Linear(64, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + self.down(layer(x))
        return self.lm_head(x)


QUANTIZED = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj", "down"]
