"""PEFT's init_lora_weights on layers in 4 bits, and LoftQ without bitsandbytes."""

import copy

import pytest
import torch
from support import tiny
from support.peft_layers import K, N, One, adapted, dense, peft, quantized

import nf4kernels as nf4
from nf4kernels.integrations.peft import merge_into, replace_lora_weights_loftq


def sum_of(layer, name="default"):
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.get_base_layer().dequantize(torch.float32) + layer.scaling[name] * B @ A


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_what_the_adapter_takes_is_taken_from_the_base(start):
    """Ŵ begins as before but for the rounding of what is left, which is smaller than that of the whole."""
    base = quantized()
    before = base.dequantize(torch.float32)
    _, layer = adapted(base, fill=False, init_lora_weights=start)
    assert layer.lora_B["default"].weight.count_nonzero()
    assert base.weight.dtype == torch.uint8
    change = (base.dequantize(torch.float32) - before).norm()
    assert change > 0.05 * before.norm()
    # Rounding what is left to 4 bits errs by at most a tenth of it, as rounding the whole did.
    assert (sum_of(layer) - before).norm() < 0.11 * base.dequantize(torch.float32).norm()
    layer(torch.randn(3, K)).sum().backward()


def test_pissa_takes_the_principal_components():
    base = quantized()
    before = base.dequantize(torch.float32)
    _, layer = adapted(base, fill=False, init_lora_weights="pissa", r=4)
    U, S, Vh = torch.linalg.svd(before)
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["orthogonal", "gaussian", True, False, "eva"])
def test_the_other_starts_leave_the_base_alone(start):
    base = quantized()
    bits = base.weight.clone()
    _, layer = adapted(base, fill=False, init_lora_weights=start)
    assert torch.equal(base.weight, bits)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    layer(torch.randn(3, K)).sum().backward()


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        ("loftq", r"replace_lora_weights_loftq\(model, base\)"),
        ("corda", "start it on the dense model"),
        ("lora_ga", "start it on the dense model"),
    ],
)
def test_what_needs_the_dense_weight_says_what_to_do(start, remedy):
    options = {"loftq": {"loftq_config": peft.LoftQConfig()}}.get(start, {})
    with pytest.raises(ValueError, match=f"must not need the dense weight .*got '{start}'.*{remedy}"):
        adapted(quantized(), init_lora_weights=start, **options)


def test_a_saved_pissa_adapter_as_peft_documents(tmp_path):
    """The file holds what was trained, and over the same base the start is taken from it again; converted, it is a
    plain adapter of twice the rank over the weight from before."""
    base = One(quantized())
    untouched = copy.deepcopy(base)
    model, layer = adapted(base.layer, fill=False, init_lora_weights="pissa", r=4)
    model.peft_config["default"].init_lora_weights = True  # as PEFT says to do before the start itself is saved
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(4, K)
    trained = model(x)
    model.save_pretrained(tmp_path / "as_it_is")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "as_it_is")
    torch.testing.assert_close(again(x), trained, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "converted")
    assert converted.base_model.model.layer.r["default"] == 8
    left = layer.get_base_layer().dequantize(torch.float32).norm()
    off = (converted(x) - trained).norm()
    assert off < 0.15 * left / N**0.5 * x.norm()  # the rounding of what was left, which this base does not have

    with merge_into(One(dense())), pytest.raises(ValueError, match="must be merged into 'dequantized'"):
        model.merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("source", ["model", "directory"])
def test_loftq_begins_closer_to_the_dense_model(tmp_path, source, options):
    base = tiny.llama()
    model = copy.deepcopy(base)
    nf4.quantize_model(model, progress=False)
    ids = tiny.IDS
    with torch.no_grad():
        expected = base(ids).logits
        plain = model(ids).logits
    base.save_pretrained(tmp_path, max_shard_size="100KB")
    bits = model.model.layers[0].mlp.down_proj.weight.clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", **options)).eval()
    replace_lora_weights_loftq(wrapped, base if source == "model" else tmp_path)
    layer = wrapped.base_model.model.model.layers[0].mlp.down_proj
    assert torch.equal(layer.get_base_layer().weight, bits)
    W = base.model.layers[0].mlp.down_proj.weight
    # The best approximation of rank r takes more than an even share of the squared error.
    error = W - layer.get_base_layer().dequantize(torch.float32)
    assert (W - sum_of(layer)).norm() < (1 - 16 / 64) ** 0.5 * error.norm()
    with torch.no_grad():
        begun = wrapped(ids).logits
    assert (begun - expected).norm() < 0.9 * (plain - expected).norm()


def test_loftq_from_a_part_of_the_model(tmp_path):
    base = tiny.llama()
    model = copy.deepcopy(base)
    nf4.quantize_model(model, progress=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    base.model.save_pretrained(tmp_path)
    replace_lora_weights_loftq(wrapped, tmp_path)
    assert wrapped.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.count_nonzero()


def test_loftq_refuses_and_changes_nothing(tmp_path):
    model, layer = adapted(quantized(), fill=False)
    name = "nf4kernels.integrations.peft.replace_lora_weights_loftq"
    with pytest.raises(ValueError, match=f"{name}: peft_model must have an adapter 'other'"):
        replace_lora_weights_loftq(model, One(dense()), "other")
    with pytest.raises(ValueError, match=r"base must have layer in shape \[160, 192\], got \[160, 193\]"):
        replace_lora_weights_loftq(model, One(dense(shape=(N, K + 1))))
    with pytest.raises(TypeError, match="base must be a module or a directory, got int"):
        replace_lora_weights_loftq(model, 3)
    nf4.save_checkpoint(torch.nn.Sequential(dense()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"base must have layer\.weight, got .* without it"):
        replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        replace_lora_weights_loftq(model, tmp_path / "nothing")
    assert not layer.lora_B["default"].weight.count_nonzero()


@pytest.mark.parametrize("source", ["model", "directory"])
def test_loftq_on_conv1d_takes_the_weight_the_right_way_round(tmp_path, source):
    """Also of a square one, whose shape fits both ways."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: there is no Conv1D")
    from nf4kernels.integrations.transformers import Nf4Config

    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 64, "vocab_size": 96}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    base.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Nf4Config())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["c_proj", "c_attn"])).eval()
    replace_lora_weights_loftq(wrapped, base if source == "model" else tmp_path)
    blocks = wrapped.base_model.model.transformer.h[0], base.transformer.h[0]
    for layer, conv in zip(*([block.attn.c_proj, block.mlp.c_proj] for block in blocks)):
        W = conv.weight.T
        assert (W - sum_of(layer)).norm() < 0.9 * (W - layer.get_base_layer().dequantize(torch.float32)).norm()


def test_kasa_where_adapters_are_made_on_meta(tmp_path):
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    layer = quantized()
    config = peft.LoraConfig(r=4, target_modules=["layer"], kasa_config=peft.KasaConfig())
    peft.get_peft_model(One(copy.deepcopy(layer)), config).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(One(layer), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert loaded(torch.randn(2, K)).isfinite().all()
