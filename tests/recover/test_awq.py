"""Activation-aware scaling: what may be folded is found by trying, and the dense model computes what it computed."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn
from torch.nn import functional

import nf4kernels as nf4
from nf4kernels.recover import agreement
from nf4kernels.recover.roundings import Awq, Gptq, ScaleSearch
from nf4kernels.recover.roundings.awq import best_scale
from nf4kernels.recover.roundings.calibration import Statistics


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def uneven_lm() -> ByteLM:
    """Some channels behind a norm are much larger than others."""
    model = ByteLM()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.copy_(torch.randn(64, generator=generator).exp())
    return model


class Dense(Awq):
    """Folds, and leaves every weight as it is, so that the function can be compared."""

    def layers(self, model, targets, progress):
        for target, layer in super().layers(model, targets, progress):
            dense = target.dense(model)
            self.kept[target.name] = nn.Linear(dense.in_features, dense.out_features, dense.bias is not None)
            self.kept[target.name].load_state_dict(dense.state_dict())
            yield target, layer


def folded_dense(model: nn.Module, batches, **options) -> tuple[nn.Module, Awq]:
    """The model after folding, dense again."""
    rounding = Dense(batches, **options)
    rounding.kept = {}
    nf4.quantize_model(model, progress=False, rounding=rounding)
    for name, dense in rounding.kept.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    return model, rounding


def test_the_folds_of_a_decoder_block_are_found_and_its_function_stays():
    batches = [text(4, 30)]
    model, rounding = folded_dense(uneven_lm(), batches)
    names = [
        tuple(name.removeprefix("layers.0.") for name in fold) for fold in rounding.folded if "layers.0" in fold[0]
    ]
    assert names == [
        ("norm1", "q_proj", "k_proj", "v_proj"), ("v_proj", "o_proj"),
        ("norm2", "gate_proj", "up_proj"), ("up_proj", "down_proj"),
    ]  # fmt: skip
    x, dense = text(3, 25, 7), uneven_lm()
    torch.testing.assert_close(model(x)["logits"], dense(x)["logits"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.layers[0].norm1.weight, dense.layers[0].norm1.weight)


def test_it_lowers_the_divergence_and_composes():
    reference, batches, held_out = uneven_lm(), [text(8, 32), text(8, 32, 1)], [text(8, 32, 9)]
    found = {}
    for name, rounding in {
        "plain": None,
        "awq": Awq(batches),
        "gptq": Gptq(batches),
        "both": Awq(batches, Gptq()),
        "search": Awq(batches, ScaleSearch()),
    }.items():
        model = uneven_lm()
        nf4.quantize_model(model, progress=False, rounding=rounding)
        found[name] = agreement(model, reference, held_out).kl
    assert found["awq"] < 0.8 * found["plain"]
    assert found["search"] < found["awq"]
    assert found["both"] < found["gptq"] < found["awq"]


class Block(nn.Module):
    """A norm of one of several kinds before two layers and, if wanted, something else that reads its output."""

    def __init__(self, norm: nn.Module, reads_more: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm = norm
            self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)
            self.reads_more = reads_more

    def forward(self, x):
        h = self.norm(x)
        y = x + self.fc2(functional.relu(self.fc1(h)))
        return y + h.square() if self.reads_more else y


class PlusOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 64))

    def forward(self, x):
        return functional.rms_norm(x, (64,)) * (1 + self.weight)


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(200, 64, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, 64)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, PlusOne])
def test_norms_with_a_bias_and_norms_that_add_one(norm):
    def make():
        made = norm() if norm is PlusOne else norm(64)
        if norm is nn.LayerNorm:
            nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(1))
        return nn.Sequential(Block(made), Block(made if norm is None else norm() if norm is PlusOne else norm(64)))

    model, rounding = folded_dense(make(), [inputs()])
    assert ("0.norm", "0.fc1") in rounding.folded
    assert ("0.fc1", "0.fc2") in rounding.folded  # ReLU keeps a positive factor
    torch.testing.assert_close(model(inputs(1)), make()(inputs(1)), atol=1e-3, rtol=1e-4)


def test_what_something_else_reads_is_not_folded():
    model, rounding = folded_dense(nn.Sequential(Block(nn.RMSNorm(64), reads_more=True)), [inputs()])
    assert rounding.folded == [("0.fc1", "0.fc2")]
    expected = nn.Sequential(Block(nn.RMSNorm(64), reads_more=True))
    torch.testing.assert_close(model(inputs(1)), expected(inputs(1)), atol=1e-4, rtol=1e-4)


def test_a_norm_that_two_blocks_share_is_not_folded():
    def make():
        norm = nn.RMSNorm(64)
        return nn.Sequential(Block(norm), Block(norm))

    _, rounding = folded_dense(make(), [inputs()])
    assert [fold for fold in rounding.folded if "norm" in fold[0]] == []


def test_given_folds_are_tried():
    _, rounding = folded_dense(uneven_lm(), [text(4, 30)], folds=[("layers.1.up_proj", ["layers.1.down_proj"])])
    assert rounding.folded == [("layers.1.up_proj", "layers.1.down_proj")]
    message = "folds must leave what the model computes as it is, got layers.1.gate_proj into layers.1.down_proj"
    with pytest.raises(RuntimeError, match=message):
        folded_dense(uneven_lm(), [text(4, 30)], folds=[("layers.1.gate_proj", ["layers.1.down_proj"])])


def test_layers_of_a_sequential_around_a_relu():
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.ModuleDict({"net": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            return self.inner["net"](x)

    model, _ = folded_dense(Net(), [inputs()])
    torch.testing.assert_close(model(inputs(1)), Net()(inputs(1)), atol=1e-4, rtol=1e-4)


def test_the_scale_of_equal_inputs_is_none_and_of_uneven_ones_lowers_the_error():
    dense = nn.Linear(64, 32, bias=False)
    even, uneven = Statistics.zeros(64, "cpu"), Statistics.zeros(64, "cpu")
    even.add(torch.ones(10, 64))
    even.divide()
    x = inputs()
    uneven.add(x)
    uneven.divide()
    assert best_scale([(dense, {})], even) is None  # mean|x| is the same everywhere
    scale = best_scale([(dense, {})], uneven)
    assert scale is not None
    assert scale[-1] > scale[0]
    weight = dense.weight.detach()
    scaled = nf4.dequantize(nf4.quantize(weight * scale), torch.float32) / scale
    plain = nf4.dequantize(nf4.quantize(weight), torch.float32)
    assert ((scaled - weight) @ x.T).norm() < ((plain - weight) @ x.T).norm()
