"""What from_pretrained is asked to distribute with 4-bit layers: which rules are set aside, and what is refused."""

from types import SimpleNamespace

import pytest
from support import tiny

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing is loaded")

from nf4kernels.integrations.transformers import Nf4Config, tensor_parallel  # noqa: E402

RULES = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts": "moe_tp_experts",
    "lm_head": "colwise_gather_output",
}
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.experts"]


def model(**asked):
    sizes = {"ep_size": 1, "dp_size": 1, "pp_size": 1, "tp_plan": "auto", **asked}
    return SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**sizes)))


def test_rules_of_4_bit_layers_are_set_aside():
    rules = dict(RULES)
    taken = tensor_parallel.set_aside(model(), rules, NAMES)
    assert taken == {name: style for name, style in RULES.items() if name != "lm_head"}
    assert rules == {**dict.fromkeys(RULES, "replicate"), "lm_head": "colwise_gather_output"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ep_size": 2}, "ep_size must be 1 .*, got 2"),
        ({"dp_size": 4}, "fsdp_size must be 1 .*, got 4"),
        ({"pp_size": 2}, "pp_size must be 1 .*, got 2"),
        ({"tp_plan": {"lm_head": "replicate"}}, "tp_plan must be 'auto' .*, got lm_head"),
    ],
)
def test_what_is_refused_changes_no_rule(asked, message):
    rules = dict(RULES)
    with pytest.raises(ValueError, match=message):
        tensor_parallel.set_aside(model(**asked), rules, NAMES)
    assert rules == RULES


def test_a_version_that_asks_for_no_plan_is_refused(tmp_path, monkeypatch):
    dense = tiny.llama()
    dense.save_pretrained(tmp_path)
    monkeypatch.setattr(type(dense), "_device_mesh", "a mesh", raising=False)
    with pytest.raises(ValueError, match=r"transformers must be one that asks .*, got 5\.") as raised:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Nf4Config())
    assert "\n" not in str(raised.value)
