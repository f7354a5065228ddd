"""Heads, channels and blocks: their scores, what is cut, and that what was zero is not missed."""

import copy

import pytest
import torch
from support.byte_lm import ByteLM
from support.unchanged import assert_unchanged, snapshot
from torch import nn
from torch.nn import functional

import nf4kernels as nf4
from nf4kernels.recover import Structure, agreement, find_structure, prune_structure
from nf4kernels.recover.pruning.structure_scores import scores_of_units


class Attention(nn.Module):
    """Grouped-query attention, with biases."""

    def __init__(self, width, heads, kv_heads, size):
        super().__init__()
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        self.q_proj, self.o_proj = nn.Linear(width, heads * size), nn.Linear(heads * size, width)
        self.k_proj, self.v_proj = nn.Linear(width, kv_heads * size), nn.Linear(width, kv_heads * size)

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(48, 6, 3, 8), Mlp(48, 192)

    def forward(self, x):
        x = x + self.attention(x)
        return (x + self.mlp(x), "a tuple")


class GroupedLM(nn.Module):
    def __init__(self, blocks=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(64, 48)
            self.blocks = nn.ModuleList(Grouped() for _ in range(blocks))
            self.lm_head = nn.Linear(48, 64)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)[0]
        return self.lm_head(x)


def text(rows=2, length=20, seed=0):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


MODELS = {"byte": (ByteLM, 4, 4, 64), "grouped": (GroupedLM, 6, 3, 64)}


def made(kind):
    new, heads, kv_heads, _ = MODELS[kind]
    model = new()
    return model, find_structure(model, heads, kv_heads)


def test_what_is_found():
    _, structure = made("grouped")
    names = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
             "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip
    counts = ("attention.num_heads", "attention.num_key_value_heads")
    assert structure == Structure("blocks", names, 6, 3, 8, 192, 3, counts)
    assert made("byte")[1].names["gate"] == "gate_proj"


@torch.no_grad()
def zero_units(model, structure, unit, chosen):
    """Zeros in the last layer's columns of those kv groups or channels; of blocks in both last layers."""
    for index in range(structure.blocks):
        layers = structure.of_block(model, index)
        if unit == "layers":
            for role in ("o", "down") if index in chosen else ():
                for parameter in layers[role].parameters():
                    parameter.zero_()
            continue
        width = structure.width * structure.group if unit == "heads" else 1
        last = layers["o" if unit == "heads" else "down"].weight
        for unit_index in chosen:
            last[:, unit_index * width : (unit_index + 1) * width] = 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("unit", "share", "chosen", "method"),
    [
        ("heads", 0.25, [1], "wanda"), ("heads", 0.25, [1], "gradient"),
        ("channels", 0.5, range(10, 74), "wanda"), ("channels", 0.5, range(10, 74), "gradient"),
        ("layers", 0.34, [1], "influence"), ("layers", 0.34, [1], "kl"), ("layers", 0.34, [1], "gradient"),
    ],
)  # fmt: skip
def test_what_was_zero_is_cut_and_not_missed(kind, unit, share, chosen, method):
    if kind == "grouped" and unit == "channels":
        chosen, share = range(10, 138), 2 / 3
    model, structure = made(kind)
    zero_units(model, structure, unit, chosen)
    before, ids = model(text()), text(seed=1)
    kept = prune_structure(model, structure, unit, share, method, [ids], progress=False)
    whole = {"heads": structure.kv_heads, "channels": structure.channels, "layers": structure.blocks}[unit]
    expected = [index for index in range(whole) if index not in chosen]
    assert [each.tolist() for each in kept] == [expected] * (1 if unit == "layers" else structure.blocks)
    after = model(text())
    logits, wanted = (each["logits"] if isinstance(each, dict) else each for each in (after, before))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_shapes_biases_and_counts_of_a_cut_model():
    model, structure = made("grouped")
    old, counts = copy.deepcopy(model.blocks[0].attention), [p.numel() for p in model.parameters()]
    kept = prune_structure(model, structure, "heads", 1 / 3, progress=False)[0].tolist()
    new = model.blocks[0].attention
    assert (new.num_heads, new.num_key_value_heads) == (4, 2)
    rows = [8 * group + i for group in kept for i in range(8)]
    wide = [16 * group + i for group in kept for i in range(16)]
    assert torch.equal(new.k_proj.weight, old.k_proj.weight[rows])
    assert torch.equal(new.v_proj.bias, old.v_proj.bias[rows])
    assert torch.equal(new.q_proj.bias, old.q_proj.bias[wide])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, wide])
    assert torch.equal(new.o_proj.bias, old.o_proj.bias)
    a_block = 16 * 49 + 2 * 8 * 49 + 16 * 48  # q, k and v with biases, o's columns
    assert sum(counts) - sum(p.numel() for p in model.parameters()) == 3 * a_block
    prune_structure(model, structure, "channels", 0.5, progress=False)
    assert model.blocks[2].mlp.fc2.weight.shape == (48, 128), "half of 192 channels, to the nearest 64, half up"
    prune_structure(model, structure, "layers", 0.3, progress=False)
    assert len(model.blocks) == 2
    assert model(text()).shape == (2, 20, 64)


@pytest.mark.parametrize("unit", ["heads", "channels", "layers"])
def test_a_second_call_changes_nothing(unit):
    model, structure = made("byte")
    prune_structure(model, structure, unit, 0.5, progress=False)
    before = snapshot(model)
    kept = prune_structure(model, structure, unit, 0.5, progress=False)
    assert_unchanged(model, before)
    assert kept[0].tolist() == list(range({"heads": 2, "channels": 64, "layers": 1}[unit]))


def test_magnitude_is_the_norm_of_what_would_go():
    model, structure = made("byte")
    block = model.layers[1]
    channel = scores_of_units(model, structure, "channels", "magnitude", None, False)[1, 5]
    parts = torch.cat([block.gate_proj.weight[5], block.up_proj.weight[5], block.down_proj.weight[:, 5]])
    assert channel.item() == pytest.approx(parts.norm().item(), rel=1e-5)
    head = scores_of_units(model, structure, "heads", "magnitude", None, False)[1, 2]
    rows = [p.weight[32:48] for p in (block.q_proj, block.k_proj, block.v_proj)]
    parts = torch.cat([each.reshape(-1) for each in (*rows, block.o_proj.weight[:, 32:48])])
    assert head.item() == pytest.approx(parts.norm().item(), rel=1e-5)


def test_influence_and_kl_of_blocks_by_hand():
    model, structure = made("byte")
    ids, streams = text(), []
    x = model.embed(ids)
    for block in model.layers:
        streams.append((x, x := block(x)))
    expected = [(1 - functional.cosine_similarity(a, b, dim=-1)).mean().item() for a, b in streams]
    found = scores_of_units(model, structure, "layers", "influence", [ids], False)[0]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    kls = scores_of_units(model, structure, "layers", "kl", [ids], False)[0]
    for index in range(2):
        without = ByteLM()
        del without.layers[index]
        assert kls[index].item() == pytest.approx(agreement(without, model, [ids]).kl, rel=1e-4)


def test_a_gradient_of_a_block_is_the_first_order_of_leaving_it_out():
    model, structure = made("byte")
    ids = text(1)
    with torch.no_grad():
        for block in model.layers:
            block.o_proj.weight.mul_(1e-3), block.down_proj.weight.mul_(1e-3)
    found = scores_of_units(model, structure, "layers", "gradient", [ids], False)[0]
    loss = agreement(model, model, [ids]).loss
    for index in range(2):
        without = ByteLM()
        without.load_state_dict(model.state_dict())
        del without.layers[index]
        change = abs(agreement(without, without, [ids]).loss - loss)
        assert found[index].item() == pytest.approx(change, rel=0.05)


BAD = {
    "unit": (("rows", 0.5), {}, "unit must be one of"),
    "share": (("heads", 1.0), {}, "share must be in"),
    "method": (("heads", 0.5, "influence"), {}, "method must be one of magnitude, wanda, gradient for heads"),
    "method of layers": (("layers", 0.5, "wanda"), {}, "method must be one of .* for layers"),
    "batches": (("layers", 0.5, "kl"), {}, "batches must be given"),
    "multiple": (("channels", 0.5), {"multiple": 999}, "multiple must be from 1 to the 128 channels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_change_nothing(kind):
    arguments, options, message = BAD[kind]
    model, structure = made("byte")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"nf4kernels.recover.prune_structure: {message}"):
        prune_structure(model, structure, *arguments, **options)
    assert_unchanged(model, before)


def test_layers_in_4_bits_are_refused():
    model, structure = made("byte")
    nf4.quantize_model(model, progress=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.0.q_proj must be a loaded nn.Linear, got a layer in 4 bits"):
        prune_structure(model, structure, "heads", 0.5)
    assert_unchanged(model, before)
    prune_structure(model, structure, "layers", 0.5, progress=False)
    assert len(model.layers) == 1, "whole blocks need no cut through the bytes"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [(4, 3, "multiple of kv_heads"), (0, None, "multiple of kv_heads"), (5, 5, "must divide the rows of k"),
     (8, 4, "must fit 8 heads for 4 kv heads")],
)  # fmt: skip
def test_heads_that_do_not_fit(heads, kv_heads, message):
    with pytest.raises(ValueError, match=f"find_structure: .*{message}"):
        find_structure(ByteLM(), heads, kv_heads)


def test_models_that_are_not_stacks_of_such_blocks():
    with pytest.raises(ValueError, match=r"got no nn\.ModuleList; describe it by a Structure"):
        find_structure(nn.Sequential(nn.Linear(4, 4)), 1)
    model = ByteLM()
    del model.layers[1].up_proj
    with pytest.raises(ValueError, match=r"block layers.1 must have every layer"):
        find_structure(model, 4)
    model = ByteLM()
    model.layers[1].up_proj = nn.Linear(64, 96)
    with pytest.raises(ValueError, match="blocks must be alike"):
        find_structure(model, 4)
