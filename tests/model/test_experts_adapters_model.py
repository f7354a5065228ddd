"""Models whose experts have adapters: trained beside the dense twin, merged, and in PEFT's files, there and back."""

import copy
import json

import pytest
import torch
from support import tiny
from support.peft_layers import peft
from torch import nn

import nf4kernels as nf4

EXPERTS = {"num_experts_per_tok": 2}
MODELS = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, **EXPERTS}),
    "qwen3": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, **EXPERTS}),
}
CONFIG = nf4.LoraConfig(r=4, alpha=8)


def dense(name="mixtral", **changes):
    class_name, sizes = MODELS[name]
    model = tiny.make(class_name, **{**sizes, **changes})
    model.config._experts_implementation = "eager"
    return model


def adapted(name="mixtral", lora=CONFIG, **changes):
    model = dense(name, **changes)
    nf4.quantize_model(model, lora=lora, progress=False)
    return model


def filled(*arguments, **options):
    model = nf4.prepare_for_training(adapted(*arguments, **options), checkpointing=False)
    return tiny.fill_adapters(model, std=0.3)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tiny.IDS).logits


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_twenty_steps_follow_the_dense_twin(name):
    """PEFT on the dense model of the same weights, from the same adapters: the losses are the same."""
    model = adapted(name)
    twin = copy.deepcopy(model)
    nf4.merge_model(twin)
    targets = [f"experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    options = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": targets}
    twin = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for path, layer in model.named_modules():
            config = getattr(layer, "lora", None)
            if config is None:
                continue
            is_experts = layer.lora_A.weight.dim() == 3
            theirs = twin.get_submodule(f"base_model.model.{path.rpartition('.')[0] if is_experts else path}")
            while is_experts and theirs.parameter_name != path.rpartition(".")[2]:
                theirs = theirs.base_layer
            A, B = layer.lora_A.weight, layer.lora_B.weight
            if is_experts:
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
            theirs.lora_A["default"].weight.copy_(A)
            theirs.lora_B["default"].weight.copy_(B)
    nf4.prepare_for_training(model, checkpointing=False)
    routers = {key: p for key, p in model.named_parameters() if ".gate." in key}
    assert routers
    assert not any(p.requires_grad for p in routers.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in twin.parameters() if p.requires_grad
    )
    losses = []
    for each in (model, twin):
        each.train()
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5)
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(20):
            ids = torch.randint(3, 96, (2, 8), generator=generator) // 8 * 8
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] < losses[0][0] - 0.2, "it learns"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_what_the_adapters_compute(name):
    model = filled(name)
    right, plain = logits(model), logits(adapted(name))
    assert not torch.allclose(right, plain, atol=1e-2)
    with nf4.disable_adapters(model):
        assert torch.equal(logits(model), plain)
    merged = copy.deepcopy(model)
    names = nf4.merge_model(merged)
    assert any(path.endswith("experts") for path in names)
    assert type(merged.model.layers[0].mlp.experts) is type(dense(name).model.layers[0].mlp.experts)
    torch.testing.assert_close(logits(merged), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_starts_from_the_weight_of_each_expert(init):
    """Ŵ and the start together are closer to the weight than Ŵ without; into the base, a fresh adapter adds nothing."""
    base = dense()
    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    report = nf4.quantize_model(model, lora=nf4.LoraConfig(r=8, alpha=8, init=init), progress=False)
    without = nf4.quantize_model(plain, progress=False)
    for started, bare in zip(report.layers, without.layers):
        assert started.rms_error < bare.rms_error, started.name
    part = model.model.layers[0].mlp.experts.gate_up_proj
    merged = part.merged_weight(part.active_term(), torch.float32, "", None, False)
    weight = base.model.layers[0].mlp.experts.gate_up_proj
    assert ((merged - weight).norm() / weight.norm()).item() == pytest.approx(
        next(layer for layer in report.layers if layer.kind == "gate_up_proj").rms_error, rel=1e-4
    )
    nf4.merge_model(model, base=base)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mixtral", {}), ("qwen3", {}), ("mixtral", {"hidden_size": 128, "intermediate_size": 64})],
    ids=["mixtral", "qwen3", "square"],
)
def test_peft_loads_what_is_saved(tmp_path, name, changes):
    """On the dense model of Ŵ; with [64, 64] weights, too, whose factors' shapes tell nothing."""
    model = filled(name, **changes)
    nf4.save_adapters(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    base = adapted(name, lora=None, **changes)
    nf4.merge_model(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    again = adapted(name, lora=None, **changes)
    nf4.load_adapters(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["mlp.experts.down_proj"]], ids=str)
@pytest.mark.parametrize("modules", [[], ["q_proj"]], ids=str)
def test_what_peft_saved_is_loaded(tmp_path, targets, modules):
    """Trained on the dense model, some of the weights alone; saved again, the tensors are the same."""
    base = adapted(lora=None)
    nf4.merge_model(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=targets,
                             rank_pattern={r".*layers\.1\..*down_proj": 2})  # fmt: skip
    theirs = tiny.fill_adapters(peft.get_peft_model(base, config), std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = adapted(lora=None)
    nf4.load_adapters(model, tmp_path / "theirs")
    nf4.prepare_for_training(model, checkpointing=False)  # what is trained beside is saved beside
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    assert [layer.mlp.experts.down_proj.lora.r for layer in model.model.layers] == [4, 2]
    nf4.save_adapters(model, tmp_path / "ours")
    stored = [
        nf4.storage.peft_format.load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")
    ]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_a_file_of_peft_0_18_is_read(tmp_path):
    """It took [E, N, K] for [E, in, out]: lora_A holds what is B, and the expert is the last index of the other."""
    model = filled()
    nf4.save_adapters(model, tmp_path)
    right = logits(model)
    file = tmp_path / "adapter_model.safetensors"
    tensors = nf4.storage.peft_format.load_file(file)
    E = 4
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        A, B = tensors[key].unflatten(0, (E, -1)), tensors[other].unflatten(1, (-1, E)).permute(2, 0, 1)
        tensors[key] = B.mT.flatten(0, 1).contiguous()
        tensors[other] = A.permute(2, 1, 0).flatten(1).contiguous()
    nf4.storage.adapters.save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}), encoding="utf-8")
    again = adapted(lora=None)
    nf4.load_adapters(again, tmp_path)
    torch.testing.assert_close(logits(again), right)


def test_a_dropout_that_peft_has_not_is_said(tmp_path):
    with pytest.warns(UserWarning, match="save_adapters: PEFT has no dropout beside adapters on experts"):
        nf4.save_adapters(filled(lora=nf4.LoraConfig(r=4, dropout=0.1)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["lora_dropout"] == 0


BAD = {
    "fewer targets": ({"target_parameters": ["experts.gate_up_proj"]}, "must name the 2 weights of .*experts"),
    "none": ({"target_parameters": None}, "must name the 2 weights"),
    "another": ({"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "x.y"]}, "got 'x.y'"),
    "another rank": ({"r": 3}, r"must be \[12, K\] and \[N, 12\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, changes, message):
    model = filled()
    nf4.save_adapters(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"nf4kernels.load_adapters: .*{message}"):
        nf4.load_adapters(model, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_file_of_experts_on_a_model_without_them(tmp_path):
    nf4.save_adapters(filled(), tmp_path)
    model = dense()
    nf4.quantize_model(model, skip=["experts"], progress=False)
    with pytest.raises(ValueError, match=r"target_parameters in .* must name weights of the model's experts in 4 bits"):
        nf4.load_adapters(model, tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_has_them(tmp_path, several):
    model = filled()
    if several:
        for layer in model.model.layers:
            layer.mlp.experts.add_lora(nf4.LoraConfig(r=2), name="second")
    nf4.save_checkpoint(model, tmp_path / "model.safetensors")
    for fresh in (dense(), adapted(lora=None)):
        nf4.load_checkpoint(fresh, tmp_path / "model.safetensors")
        assert torch.equal(logits(fresh), logits(model))
        names = ["default", "second"] if several else ["default"]
        assert fresh.model.layers[1].mlp.experts.down_proj.adapter_names == names


def test_experts_themselves_cannot_be_saved():
    experts = filled().model.layers[0].mlp.experts
    assert isinstance(experts, nf4.QuantExperts)
    with pytest.raises(ValueError, match="must contain its layers, got a QuantExperts itself"):
        nf4.save_adapters(experts, "nowhere")
    assert isinstance(experts, nn.Module)
