"""What calibration gathers: against hooks on the whole model, whose earlier layers are rounded, of any kind."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.nn.quant_linear import QuantLinear
from nf4kernels.recover.roundings import Gptq, ScaleSearch
from nf4kernels.recover.roundings.rounding import CalibratedRounding


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


class Noting(CalibratedRounding):
    """Rounds plainly, and compares the statistics with those of a run of the whole model at that moment."""

    def __init__(self, batches, rows=lambda batch, x: x.reshape(-1, x.shape[-1])):
        super().__init__(batches)
        self.rows, self.seen = rows, []

    def layers(self, model, targets, progress):
        self.model, self.left = model, list(targets)
        yield from super().layers(model, targets, progress)

    def quantized(self, weight, statistics, options):
        target = self.left.pop(0)
        self.seen.append((target.name, statistics))
        return nf4.quantize(weight, **options)


def expected_hessian(model, name, batches, rows):
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    x = torch.cat([rows(batch, each) for batch, each in zip(batches, found)]).double()
    return x.T @ x / len(x), x.mean(0), x.abs().mean(0), len(x)


def check(make, batches, rows=lambda batch, x: x.reshape(-1, x.shape[-1])):
    """A group's statistics are of the model with all groups before it rounded."""
    noting = Noting(batches)
    nf4.quantize_model(make(), progress=False, rounding=noting)
    step = make().eval()
    done: list[str] = []
    previous = None
    for name, statistics in noting.seen:
        if statistics is not previous:
            for other in done:
                if not isinstance(step.get_submodule(other), QuantLinear):
                    parent, _, leaf = other.rpartition(".")
                    setattr(step.get_submodule(parent), leaf, QuantLinear.from_linear(step.get_submodule(other)))
            hessian, mean, mean_abs, count = expected_hessian(step, name, batches, rows)
            assert statistics.rows == count
            tolerance = 1e-5 * float(hessian.abs().max())
            torch.testing.assert_close(statistics.hessian.double(), hessian, atol=tolerance, rtol=1e-4)
            torch.testing.assert_close(statistics.mean.double(), mean, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(statistics.mean_abs.double(), mean_abs, atol=1e-5, rtol=1e-4)
            previous = statistics
        done.append(name)
    return noting


def test_decoder_blocks_each_with_those_before_rounded_and_what_reads_the_same_together():
    noting = check(lambda: ByteLM(layers=3), [text(3, 20), text(2, 11, 1)])
    assert len(noting.seen) == 21
    assert len({id(statistics) for _, statistics in noting.seen}) == 12  # q with k and v, o, gate with up, down


def test_padding_does_not_count():
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 7:] = 0
    check(
        ByteLM, [{"input_ids": text(3, 20), "attention_mask": mask}], lambda batch, x: x[batch["attention_mask"].bool()]
    )


def test_blocks_that_are_rounded_are_not_computed_again():
    model, calls = ByteLM(layers=4), []
    model.layers[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    nf4.quantize_model(model, progress=False, rounding=Noting([text(2, 8)]))
    # each: is it a chain, who reads what, four groups, its output
    assert len(calls) <= 7


def test_a_block_whose_forward_was_set_on_the_instance_keeps_it():
    model = ByteLM(layers=3)
    own = model.layers[0].forward = type(model.layers[0]).forward.__get__(model.layers[0])
    nf4.quantize_model(model, progress=False, rounding=Noting([text(2, 8)]))
    assert vars(model.layers[0])["forward"] is own


def test_a_sequential_of_layers_that_write_into_their_input():
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)
            )

    check(make, [torch.randn(9, 12), torch.randn(4, 12)])


class Skipping(nn.Module):
    """Each block reads the output of the one before and of the first, as a U-net's do."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = torch.tanh(block(x) + first)
        return x


class Repeating(Skipping):
    """Calls its blocks twice."""

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = torch.tanh(block(x))
        return x


def test_blocks_that_read_more_than_the_one_before():
    check(Skipping, [torch.randn(30, 16)])


def test_blocks_that_are_called_twice():
    noting = Noting([torch.randn(30, 16)])
    nf4.quantize_model(Repeating(), progress=False, rounding=noting)
    assert [statistics.rows for _, statistics in noting.seen] == [60] * 4


def test_a_layer_that_no_row_reaches_is_rounded_plainly():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.experts = nn.ModuleList(nn.Linear(64, 8) for _ in range(3))

        def forward(self, x):
            return self.experts[0](x[:5]), self.experts[2](x)

    model = Routed()
    expected = nf4.quantize(model.experts[1].weight)
    nf4.quantize_model(model, progress=False, rounding=Gptq([torch.randn(40, 64)]))
    assert torch.equal(model.experts[1].qweight.packed, expected.packed)
    assert all(isinstance(each, QuantLinear) for each in model.experts)


def test_inputs_that_are_not_finite_are_named():
    model = ByteLM()
    with torch.no_grad():
        model.embed.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match=r"batches must give finite inputs, got others at layers\.0\.q_proj"):
        nf4.quantize_model(model, progress=False, rounding=Gptq([torch.full((1, 4), 3)]))


def test_the_model_is_left_as_it_was():
    model = ByteLM().train()
    model.layers[0].eval()
    model.embed.weight.requires_grad_(False)
    nf4.quantize_model(model, progress=False, rounding=Gptq([text(2, 9)]))
    assert model.training
    assert not model.layers[0].training
    assert model.layers[1].training
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.norm.weight.requires_grad
    assert not model.embed.weight.requires_grad


def test_reproducible_and_through_a_file(tmp_path):
    def made(seed=0):
        model = ByteLM(layers=1, inner=64, seed=seed)
        rounding = Gptq([text(4, 30)], scales="search", levels="kmeans", sweeps=1)
        nf4.quantize_model(model, ("*.[qkvo]_proj", "gate_proj"), progress=False, rounding=rounding)
        return model

    first, second = made(), made()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    nf4.save_checkpoint(first, tmp_path / "model.safetensors")
    other = made(1)
    nf4.load_checkpoint(other, tmp_path / "model.safetensors")
    x = text(2, 9, 5)
    assert torch.equal(other(x)["logits"], first(x)["logits"])
    assert other.layers[0].up_proj.codebook == "custom"


def test_adapters_go_on_rounded_layers_and_not_where_they_would_start_from_the_error():
    model = ByteLM()
    nf4.quantize_model(model, progress=False, lora=nf4.LoraConfig(r=4), rounding=ScaleSearch([text(2, 9)]))
    assert model.layers[0].q_proj.lora.r == 4
    with pytest.raises(
        RuntimeError, match="lora must start from 'default' or 'gaussian' with this rounding, got 'loftq'"
    ):
        nf4.quantize_model(
            ByteLM(), progress=False, lora=nf4.LoraConfig(init="loftq"), rounding=ScaleSearch([text(2, 9)])
        )


def test_a_compiled_model_is_run_without_its_compiler():
    model = ByteLM()
    expected = ByteLM()
    nf4.quantize_model(expected, progress=False, rounding=Gptq([text(2, 9)]))
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")
    nf4.quantize_model(model, progress=False, rounding=Gptq([text(2, 9)]))
    inner = model.layers[1]._orig_mod
    assert torch.equal(inner.down_proj.qweight.packed, expected.layers[1].down_proj.qweight.packed)
