"""PEFT's other tuners than LoRA on a 4-bit layer: forward as on the dense Ŵ; what would write to its bytes, refused."""

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.peft_layers import One, peft, quantized
from torch import nn

CONFIGS = {
    "ia3": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False),
    "road": lambda: peft.RoadConfig(target_modules=["layer"], group_size=32, init_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=["layer"], r=4, init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["layer"], total_step=10, init_lora_weights=False),
}


def twin(layer) -> nn.Linear:
    """The dense layer of Ŵ."""
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight, linear.bias = nn.Parameter(layer.dequantize(torch.float32)), layer.bias
    return linear


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_is_that_of_the_dense_layer_and_merging_is_refused(kind):
    layer = quantized()
    x = torch.randn(5, layer.in_features)
    outputs = []
    for base in (twin(layer), layer):
        torch.manual_seed(1)
        model = peft.get_peft_model(One(base), CONFIGS[kind]()).eval()
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1], layer(x), atol=1e-3)
    packed = layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(ValueError, match=rf"the layers to merge must be dense or .* got {kind} on .* layer$"):
            merge()
    assert torch.equal(layer.weight, packed)
    assert torch.equal(model(x), outputs[1])
    assert model.unload().layer is layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dense_layer_merges_as_ever(kind):
    base = twin(quantized())
    model = peft.get_peft_model(One(base), CONFIGS[kind]()).eval()
    x = torch.randn(5, base.in_features)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig", "HRAConfig", "UniLoraConfig"])
def test_what_computes_with_the_weight_is_refused(name):
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    config = getattr(peft, name)(target_modules=["layer"])
    model = One(quantized())
    layer, x = model.layer, torch.randn(3, model.layer.in_features)
    expected, wanted = model(x), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"must leave its weight alone, .* got \w+ on layer$"):
        peft.get_peft_model(model, config)
    assert model.layer is layer
    assert torch.equal(model(x), expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    peft.get_peft_model(One(twin(quantized())), config)


def test_mixed_adapters():
    lora = peft.LoraConfig(target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(One(quantized()), lora, mixed=True)
    x = torch.randn(3, model.base_model.model.layer.in_features)
    expected = model(x)
    with pytest.raises(ValueError, match=r"must leave its weight alone, .* got loha on .*layer$"):
        model.add_adapter("other", peft.LoHaConfig(target_modules=["layer"]))
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


OPTIONS = {
    "OFT": {"oft_block_size": 8}, "IA3": {"feedforward_modules": []},
    "C3A": {"block_size": 32}, "VBLORA": {"num_vectors": 16, "vector_length": 16}, "FOURIERFT": {"n_frequency": 20},
    "ADALORA": {"total_step": 10}, "WAVEFT": {"n_frequency": 20}, "MISS": {"r": 8}, "BONE": {"r": 8},
    "RANDLORA": {"r": 8}, "GRALORA": {"r": 8, "gralora_k": 2},
}  # fmt: skip
OF_NO_LAYER = {"LORA", "XLORA", "POLY", "CPT", "TRAINABLE_TOKENS", "LN_TUNING", "ADAPTION_PROMPT", "PREFIX_TUNING"}
COMPILES = {"BOFT"}  # a CUDA extension, where there is an nvcc
KINDS = sorted(
    kind.value
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING
    if kind.value not in OF_NO_LAYER | COMPILES and "PROMPT" not in kind.value
)


@pytest.mark.parametrize("kind", [*KINDS, "MISS bat"])
def test_on_bytes_of_the_weights_shape_it_is_right_or_refused(kind):
    """int8: what takes the bytes for numbers would find them of the right shape."""
    kind, *bat = kind.split()
    make = next(each for known, each in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known.value == kind)
    options = OPTIONS.get(kind, {}) | ({"init_weights": "bat"} if bat else {})
    layer, outputs = quantized(codebook="int8", shape=(128, 128)), []
    x = torch.randn(5, layer.in_features)
    for base in (twin(layer), layer):
        torch.manual_seed(1)
        try:
            model = peft.get_peft_model(One(base), make(target_modules=["layer"], **options)).eval()
            outputs.append(model(x))
        except Exception as error:
            if base is not layer:
                pytest.skip(f"this PEFT's {kind} does not run on a dense layer so: {error}")
            sentences = ("must leave its weight alone", "does not support this layer type")  # ours, GLoRA's own
            assert any(words in str(error) for words in sentences)  # noqa: PT017  # another is as wrong as none
            return
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
