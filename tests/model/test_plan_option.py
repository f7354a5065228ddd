"""quantize_model's plan and rounding: options by layer, layers left dense, and another way to find levels."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.nn.quant_linear import QuantLinear


def test_options_adapters_and_dense_layers_by_name():
    model = ByteLM()
    plan = {
        "layers.0.q_proj": {"codebook": "fp4", "block_size": 128},
        "layers.1.down_proj": None,
        "layers.1.up_proj": {"lora": None},
    }
    report = nf4.quantize_model(model, progress=False, lora=nf4.LoraConfig(r=4), plan=plan)
    first, second = model.layers
    assert (first.q_proj.codebook, first.q_proj.block_size, first.q_proj.lora.r) == ("fp4", 128, 4)
    assert type(second.down_proj) is nn.Linear
    assert second.up_proj.lora is None
    assert (first.k_proj.codebook, first.k_proj.lora.r) == ("nf4", 4)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons["layers.1.down_proj"] == "the plan leaves it dense"
    assert len(report.layers) == 13


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layers.9.q_proj": {}}, "plan must name layers that can be quantized, got 'layers.9.q_proj'"),
        ({"lm_head": None}, "plan must name layers that can be quantized, got 'lm_head'"),
        ({"layers.0.q_proj": {"block_size": 3}}, "plan: layers.0.q_proj: nf4kernels.quantize: block_size"),
        ([("layers.0.q_proj", None)], "plan must be a mapping"),
    ],
)
def test_a_wrong_plan_changes_nothing(plan, message):
    model = ByteLM()
    with pytest.raises((TypeError, ValueError), match=message):
        nf4.quantize_model(model, progress=False, plan=plan)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_rounding_sees_the_layers_before_in_4_bits():
    class Down:
        """Rounds towards zero, and notes what it found."""

        def __init__(self):
            self.seen = []

        def layers(self, model, targets, progress):
            for target in targets:
                self.seen.append(sum(isinstance(m, QuantLinear) for m in model.modules()))
                dense = target.dense(model)
                smaller = nn.Linear(dense.in_features, dense.out_features, bias=False)
                smaller.weight = nn.Parameter(dense.weight * 0.99)
                yield target, target.rounded(smaller)

    model, down = ByteLM(), Down()
    plain = nf4.quantize_model(ByteLM(), progress=False)
    report = nf4.quantize_model(model, progress=False, rounding=down)
    assert down.seen == list(range(14))
    assert [layer.name for layer in report.layers] == [layer.name for layer in plain.layers]
    assert all(a.rms_error != b.rms_error for a, b in zip(report.layers, plain.layers))
    assert all(isinstance(layer.q_proj, QuantLinear) for layer in model.layers)


def test_a_rounding_that_fails_names_the_layer():
    class Failing:
        def layers(self, model, targets, progress):
            yield targets[0], targets[0].rounded(targets[0].dense(model))
            raise torch.OutOfMemoryError("no memory")

    model = ByteLM()
    with pytest.raises(RuntimeError, match=r"layer layers\.0\.k_proj failed, those before it are replaced: no memory"):
        nf4.quantize_model(model, progress=False, rounding=Failing())
    assert isinstance(model.layers[0].q_proj, QuantLinear)
