"""A directory whose layers are stored by a plan: written file by file, and read by us and through transformers."""

import json

import pytest
import torch
from support.llama_directory import all_tensors, tiny_llama, transformers, tree

from nf4kernels import load_checkpoint, quantize_model
from nf4kernels.cli.meta_model import meta_model
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.recover import Candidate, Plan
from nf4kernels.storage.convert import convert_directory
from nf4kernels.storage.directory_checks import ConversionError

FIRST = "model.layers.0."
PLAN = {
    f"{FIRST}self_attn.q_proj": {"codebook": "fp4", "block_size": 32},
    f"{FIRST}self_attn.k_proj": {"codebook": "int4", "double_quant": False},
    f"{FIRST}self_attn.v_proj": None,
    f"{FIRST}mlp.up_proj": {"codebook": torch.linspace(-1, 1, 16)},
    f"{FIRST}mlp.gate_proj": {"codebook": "mxfp4"},
    f"{FIRST}mlp.down_proj": {"block_size": 4096},
}
IDS = torch.arange(24).view(2, 12)


def converted(directory, out, plan=PLAN, **options):
    return convert_directory(directory, out, model_of=meta_model, progress=False, plan=plan, **options)


@pytest.fixture(name="dense")
def dense_(tmp_path):
    tiny_llama(tmp_path / "dense")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()


def test_the_bits_are_those_of_quantize_model_whoever_reads(dense, tmp_path):
    conversion = converted(tmp_path / "dense", tmp_path / "mixed")
    quantize_model(dense, plan=PLAN, progress=False)
    expected = dense(IDS).logits
    by_name = {layer.name: layer for layer in conversion.report.layers}
    assert f"{FIRST}self_attn.v_proj" not in by_name
    assert len(by_name) == 13

    through = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert torch.equal(through(IDS).logits, expected)
    assert through.model.layers[0].mlp.gate_proj.codebook == "mxfp4"
    assert type(through.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    config = json.loads((tmp_path / "mixed" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["plan"][f"{FIRST}self_attn.q_proj"] == {"codebook": "fp4", "block_size": 32}
    assert f"{FIRST}self_attn.v_proj" in config["modules_to_not_convert"]

    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    load_checkpoint(ours, tmp_path / "mixed")
    assert torch.equal(ours(IDS).logits, expected)


def test_transformers_quantizes_by_a_plan_as_it_loads_and_saves_what_it_loads_again(dense, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=Nf4Config(block_size=128, plan=PLAN)
    )
    quantize_model(dense, block_size=128, plan=PLAN, progress=False)
    assert torch.equal(loaded(IDS).logits, dense(IDS).logits)
    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, dense(IDS).logits)
    assert again.model.layers[1].mlp.up_proj.block_size == 128
    assert again.model.layers[0].mlp.down_proj.block_size == 4096


def test_a_plan_that_says_what_is_usual_gives_the_same_tensors(dense, tmp_path):
    converted(tmp_path / "dense", tmp_path / "plain", plan=None)
    converted(tmp_path / "dense", tmp_path / "planned", plan={f"{FIRST}mlp.up_proj": {"block_size": 64}})
    plain, planned = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "planned")
    assert plain.keys() == planned.keys()
    assert all(torch.equal(tensor, planned[name]) for name, tensor in plain.items())


def test_a_file_that_contradicts_its_plan_is_refused(dense, tmp_path):
    converted(tmp_path / "dense", tmp_path / "mixed")
    path = tmp_path / "mixed" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["quantization_config"]["plan"][f"{FIRST}mlp.down_proj"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must have block size 64 as the configuration says, got 4096 in .*down"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({f"{FIRST}mlp.up": {}}, "plan must name layers that can be quantized, got model.layers.0.mlp.up"),
        ({"lm_head": {}}, "plan must name layers that can be quantized, got lm_head"),
        ({f"{FIRST}mlp.up_proj": {"block_size": 65}}, "plan: model.layers.0.mlp.up_proj: .*block_size must be"),
        ({f"{FIRST}mlp.up_proj": {"lora": None}}, "plan must have no adapters"),
        (Plan({f"{FIRST}mlp.up_proj": Candidate(dropped=True)}, 0, 1, 0.0), "plan: .*dropped"),
    ],
)
def test_wrong_plans_end_before_anything_is_written(dense, tmp_path, plan, message):
    with pytest.raises(ConversionError, match=message):
        converted(tmp_path / "dense", tmp_path / "out", plan=plan)
    assert tree(tmp_path)[0] == "dense"
    assert not (tmp_path / "out").exists()


def test_a_configuration_refuses_wrong_plans(dense, tmp_path):
    for plan, error, message in (
        ([1], TypeError, "plan must be a mapping"),
        ({"a": {"codebook": "nf5"}}, ValueError, "plan: a: .*codebook must be one of"),
        ({"a": {"lora": 3}}, TypeError, "plan: a: "),
    ):
        with pytest.raises(error, match=message):
            Nf4Config(plan=plan)
    for name in ("model.layers.9.mlp.up_proj", "lm_head"):
        with pytest.raises(ValueError, match=f"plan must name layers that can be quantized, got '{name}'"):
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "dense", quantization_config=Nf4Config(plan={name: {"codebook": "fp4"}})
            )
