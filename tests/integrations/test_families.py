"""from_pretrained with Nf4Config on a tiny model of each family that people fine-tune.

Each is compared with a dense twin that has Ŵ in place of W, so that nothing but roundings is between the two.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, Family, transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config

peft = pytest.importorskip("peft", reason="PEFT is not installed: no family is trained")

# Of the norm, in fp32. The twins differ by the order of sums: 2^-22 a product (docs/design.md, section 7), some ten
# products in a row, which softmaxes and routers enlarge. A gradient that two large terms almost cancel in, as that of
# k_proj where attention is flat, has a larger error beside its norm. One wrong layer is off by 2^-6 and more.
CLOSE, GRADIENTS_CLOSE = 2.0**-17, 2.0**-13
WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Pair:
    family: Family
    directory: str
    quantized: nn.Module
    twin: nn.Module
    batch: dict[str, torch.Tensor]


def load(family: Family, directory, **options) -> nn.Module:
    return getattr(transformers, family.class_name).from_pretrained(directory, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    family = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    family.model().save_pretrained(directory)
    quantized, twin = load(family, directory, quantization_config=Nf4Config()), load(family, directory)
    put_dequantized(twin, quantized)
    return Pair(family, directory, quantized, twin, family.batch())


def is_conv1d(module) -> bool:
    return type(module).__name__ == "Conv1D"


def put_dequantized(twin, quantized) -> None:
    """Ŵ in place of W."""
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, nf4.QuantLinear):
                place = twin.get_submodule(name)
                weight = layer.dequantize(torch.float32)
                place.weight.copy_(weight.T if is_conv1d(place) else weight)
            elif isinstance(layer, nf4.QuantExperts):
                for leaf in layer.weights:
                    weight = getattr(layer, leaf).dequantize(torch.float32, layer.is_transposed)
                    twin.get_parameter(f"{name}.{leaf}").copy_(weight)


def as_linear(conv) -> nn.Linear:
    K, N = conv.weight.shape
    linear = nn.Linear(K, N)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
    return linear


def error(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_what_is_quantized_is_what_quantize_model_quantizes(pair):
    """The same layers, bit for bit, and Conv1D as the nn.Linear that it computes; every other tensor is the file's."""
    expected = load(pair.family, pair.directory)
    for name, module in list(expected.named_modules()):
        if is_conv1d(module):
            expected.set_submodule(name, as_linear(module))
    nf4.quantize_model(expected, progress=False)
    assert any(isinstance(module, nf4.QuantLinear) for module in expected.modules())
    kinds = {name: type(module) for name, module in expected.named_modules()}
    assert {name: type(module) for name, module in pair.quantized.named_modules()} == kinds
    expected, actual = expected.state_dict(), pair.quantized.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def test_what_stays_dense(pair):
    for name, module in pair.quantized.named_modules():
        if type(module) is nn.Linear or is_conv1d(module) or WEIGHTS[0] in module._parameters:
            assert name.endswith(pair.family.dense), name


def test_forward(pair):
    assert error(logits(pair.quantized, pair.batch), logits(pair.twin, pair.batch)) < CLOSE


def adapted(model, family):
    """A copy with adapters of PEFT, their terms not zero."""
    targets = family.targets if isinstance(family.targets, str) else list(family.targets)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model


def gradients(model, batch):
    torch.manual_seed(1)  # of dropout
    model(**batch).logits.float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_backward(pair):
    """Through every 4-bit layer: gradients of LoRA are there, and those of the twin."""
    model = adapted(pair.quantized, pair.family)
    actual, expected = gradients(model, pair.batch), gradients(adapted(pair.twin, pair.family), pair.batch)
    assert actual.keys() == expected.keys()
    assert any(isinstance(module, nf4.QuantLinear) and name.endswith("base_layer") for name, module in
               model.named_modules())  # fmt: skip
    for name, gradient in expected.items():
        assert gradient.count_nonzero(), name
        assert error(actual[name], gradient) < GRADIENTS_CLOSE, name


def assert_reloads(pair, directory, expected, batch, **options):
    """`expected`: the logits before."""
    if pair.family.converted and not hasattr(HfQuantizer, "update_weight_conversions"):
        with pytest.raises(ValueError, match=r"transformers must be one that can leave out the conversion of "):
            load(pair.family, directory, **options)
        return
    again = load(pair.family, directory, **options)
    assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in pair.quantized.named_modules()}
    assert torch.equal(logits(again, batch), expected)


def test_save_and_reload(pair, tmp_path):
    pair.quantized.save_pretrained(tmp_path)
    assert_reloads(pair, tmp_path, logits(pair.quantized, pair.batch), pair.batch)


def assert_same_tokens(pair, **options):
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    expected = pair.twin.generate(**pair.batch, **options)
    assert torch.equal(pair.quantized.generate(**pair.batch, **options), expected)


@pytest.mark.parametrize("pair", [name for name, family in FAMILIES.items() if family.generates], indirect=True)
def test_generate(pair):
    assert_same_tokens(pair)


@pytest.mark.parametrize("pair", [name for name, family in FAMILIES.items() if family.static_cache], indirect=True)
def test_generate_with_a_static_cache(pair):
    assert_same_tokens(pair, cache_implementation="static")


def typical_error(actual, expected) -> float:
    """The median over tokens: where two routings are near, roundings may send a token to another expert."""
    difference = (actual.double() - expected.double()).norm(dim=-1)
    return (difference / expected.double().norm(dim=-1)).median().item()


def check_half_precision(pair, dtype, tmp_path):
    quantized = load(pair.family, pair.directory, dtype=dtype, quantization_config=Nf4Config())
    twin = load(pair.family, pair.directory, dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in quantized.named_parameters()}
    for name, parameter in twin.named_parameters():
        if dtypes.get(name) not in (None, torch.uint8):
            assert dtypes[name] == parameter.dtype, name
    put_dequantized(twin, quantized)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in pair.batch.items()}
    actual, exact = logits(quantized, batch), logits(pair.twin, pair.batch)
    assert typical_error(actual, exact) <= 2 * typical_error(logits(twin, batch), exact)
    quantized.save_pretrained(tmp_path)
    assert_reloads(pair, tmp_path, actual, batch, dtype=dtype)


def test_bfloat16(pair, tmp_path):
    """What a family keeps in fp32 stays so, the error is that of the dense model in that dtype, and it reloads."""
    check_half_precision(pair, torch.bfloat16, tmp_path)


@pytest.mark.parametrize("pair", ["llama", "t5", "deepseek_v3", "gpt_oss"], indirect=True)
def test_float16(pair, tmp_path):
    """The same of the families that keep more in fp32 then, and of one that does not."""
    check_half_precision(pair, torch.float16, tmp_path)


CHECKPOINTED = ["llama", "gpt2", "mixtral", "t5", "bert", "gemma3_vision"]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("pair", CHECKPOINTED, indirect=True)
def test_gradient_checkpointing(pair, reentrant):
    """Dropout is on, and every layer is computed again with the same mask."""
    model = adapted(pair.quantized, pair.family).train()
    expected = gradients(model, pair.batch)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, pair.batch)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert error(actual[name], gradient) < GRADIENTS_CLOSE, name


class LlamaWithATiedLayer(transformers.LlamaForCausalLM):
    _tied_weights_keys: ClassVar = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }


def test_layers_that_are_tied_stay_dense(tmp_path):
    """transformers ties them only after loading; in 4 bits they would be two, or one would have no weight at all."""
    options = {**FAMILIES["llama"].options, "num_hidden_layers": 2, "tie_word_embeddings": True}
    model = LlamaWithATiedLayer(transformers.LlamaConfig(**options))
    model.save_pretrained(tmp_path)
    loaded = LlamaWithATiedLayer.from_pretrained(tmp_path, quantization_config=Nf4Config())
    first, second = (layer.mlp.up_proj for layer in loaded.model.layers)
    assert type(first) is type(second) is nn.Linear
    assert first.weight is second.weight
    assert torch.equal(first.weight, model.model.layers[0].mlp.up_proj.weight)
    assert isinstance(loaded.model.layers[0].mlp.down_proj, nf4.QuantLinear)


def test_one_weight_of_two_experts_is_refused(tmp_path):
    """Else half of the experts are drawn anew, or torch says that there is no such parameter."""
    family = FAMILIES["mixtral"]
    family.model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("w2.weight")}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts, got gate_up_proj alone"):
        load(family, tmp_path, quantization_config=Nf4Config())


class LlamaWithAWeightLayer(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mixing_weight = nn.Linear(64, 64)
        self.post_init()


def test_a_layer_whose_name_ends_as_a_weight_reloads(tmp_path):
    """Of its stored parts each was taken for the weight itself."""
    LlamaWithAWeightLayer(FAMILIES["llama"].config()).save_pretrained(tmp_path / "dense")
    model = LlamaWithAWeightLayer.from_pretrained(tmp_path / "dense", quantization_config=Nf4Config())
    assert isinstance(model.model.layers[0].mixing_weight, nf4.QuantLinear)
    model.save_pretrained(tmp_path / "quantized")
    again = LlamaWithAWeightLayer.from_pretrained(tmp_path / "quantized").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key
