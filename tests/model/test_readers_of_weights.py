"""Point 9: layers whose weight the model's own code reads stay dense, by rule; else the error says who read it."""

import re
import types

import pytest
import torch
from support import tiny
from torch import nn

import nf4kernels as nf4

SEQ2SEQ = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
           "decoder_start_token_id": 0}  # fmt: skip
MODELS = {
    "T5": lambda: tiny.make("T5ForConditionalGeneration", **SEQ2SEQ),
    "UMT5": lambda: tiny.make("UMT5ForConditionalGeneration", **SEQ2SEQ),
    "LongT5": lambda: tiny.make("LongT5ForConditionalGeneration", **SEQ2SEQ),
    "SwitchTransformers": lambda: tiny.make(
        "SwitchTransformersForConditionalGeneration", **SEQ2SEQ, num_experts=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1),
    "Mamba": lambda: tiny.make("MambaForCausalLM", state_size=8),
    "FalconMamba": lambda: tiny.make("FalconMambaForCausalLM", state_size=8),
    "WavLM": lambda: tiny.make(
        "WavLMModel", conv_dim=(32,), conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1,
        num_conv_pos_embedding_groups=4),
}  # fmt: skip


def output(model):
    """Of any of MODELS, one tensor."""
    if model.config.is_encoder_decoder:
        return model(input_ids=tiny.IDS, labels=tiny.IDS).logits
    if type(model).__name__.startswith("WavLM"):
        return model(torch.linspace(-1, 1, 800).view(2, 400)).last_hidden_state
    return model(tiny.IDS).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_reads_its_weights_runs(name, dtype):
    """Report's kind: T5's `x.to(self.wo.weight.dtype)`, Mamba's `self.dt_proj.weight @ x`: "Byte" and x mixed."""
    if dtype == torch.bfloat16 and name == "WavLM":
        pytest.skip("its input is audio in fp32")
    model = MODELS[name]().to(dtype)
    expected = output(model)
    nf4.quantize_model(model, progress=False)
    assert tiny.layers(model)
    got = output(model)
    assert got.dtype == expected.dtype
    assert (got - expected).norm() < 0.5 * expected.norm()


class Block(nn.Module):
    """Of a user's own: one child is read, another called."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(64, 64), nn.Linear(64, 64)


class Reads(Block):
    def forward(self, x):
        return self.called(x) @ self.read.weight.T


class ReadsByAVariable(Block):
    def forward(self, x):
        layer = self.read
        return nn.functional.linear(self.called(x), layer.weight, layer.bias)


class ReadsByName(Block):
    def forward(self, x):
        called, read = self.called, getattr(self, "read")  # noqa: B009
        return called(x) @ getattr(read, "weight").T  # noqa: B009


class ReadsItsDtype(Block):
    def forward(self, x):
        return self.read(self.called(x).to(self.read.weight.dtype))


class ReadsInAnotherMethod(Block):
    @property
    def matrix(self):
        return self.read.weight

    def project(self, x):
        return x @ self.matrix.T

    def forward(self, x):
        return self.project(self.called(x))


class ReadsInItsBase(ReadsInAnotherMethod):
    def project(self, x):
        return super().project(x)


def product_with(x, layer):
    return x @ layer.weight.T


class ReadsInAFunction(Block):
    def forward(self, x):
        return product_with(self.called(x), layer=self.read)


class ReadsAGrandchild(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"read": nn.Linear(64, 64), "called": nn.Linear(64, 64)})

    def forward(self, x):
        return self.block["called"](x) + self.block["read"].weight.sum(0)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.reads = nn.ModuleList([Block(), Block()])


class ReadsInALoop(Blocks):
    def forward(self, x):
        for block in self.reads:
            x = block.called(x) + block.read.weight.sum(0)
        return x


class ReadsInANumberedLoop(Blocks):
    def forward(self, x):
        for index, block in enumerate(self.reads[:2]):
            x = block.called(x) + block.read.weight.sum(0) * 2**index
        return x


class ReadsInTwoLoopsAtOnce(Blocks):
    def forward(self, x):
        for scale, (_, block) in zip((1, 2), enumerate(self.reads)):
            x = block.called(x) + block.read.weight.sum(0) * scale
        return x


READERS = (Reads, ReadsByAVariable, ReadsByName, ReadsItsDtype, ReadsInAnotherMethod, ReadsInItsBase,
           ReadsInAFunction, ReadsAGrandchild, ReadsInALoop, ReadsInANumberedLoop, ReadsInTwoLoopsAtOnce)  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("reader", READERS, ids=lambda kind: kind.__name__)
def test_a_layer_that_is_read_stays_dense_and_the_report_says_who_reads_it(reader, compiled):
    """Report's kind: bare errors of torch ("mat1 and mat2 ..."), or packed bytes summed as if they were numbers."""
    model, x = nn.Sequential(reader()), torch.randn(2, 64)
    expected = model(x)
    if compiled:
        model[0] = torch.compile(model[0], backend="eager")
    report = nf4.quantize_model(model, progress=False)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    quantized = [layer.name for layer in report.layers]
    assert {name.rpartition(".")[2] for name in quantized} == {"called"}
    assert {name.rpartition(".")[2] for name in reasons} == {"read"}
    assert all(re.fullmatch(rf"{reader.__name__}\.\w+ reads its weight", reason) for reason in reasons.values())
    assert (model(x) - expected).norm() < 0.5 * expected.norm()


class Looks(Block):
    """What a packed weight answers as well, and what only a start or a class that is not used asks for."""

    def __init__(self):
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.read.weight)

    def forward(self, x):
        if self.read.weight is not None and not self.read.weight.requires_grad:
            x = x.to(self.read.weight.device)
        return self.read(x) + self.read.bias


def test_what_only_looks_at_the_weight_is_no_reader():
    """Kept right: device and requires_grad of a weight are asked everywhere; such layers stay in 4 bits."""
    model = nn.Sequential(Looks())
    assert [layer.name for layer in nf4.quantize_model(model, progress=False).layers] == ["0.read", "0.called"]
    model(torch.randn(2, 64))


def test_a_forward_replaced_on_the_instance_is_read_too():
    model = nn.Sequential(Looks())
    model[0].forward = types.MethodType(Reads.forward, model[0])
    report = nf4.quantize_model(model, progress=False)
    assert [layer.name for layer in report.layers] == ["0.called"]


def test_a_forward_without_source_is_left_in_peace():
    """As of a model made by exec, or shipped as bytecode: nothing can be said of it."""
    scope = {"Block": Block}
    exec("class Made(Block):\n    def forward(self, x):\n        return self.called(x) @ self.read.weight.T", scope)
    assert len(nf4.quantize_model(nn.Sequential(scope["Made"]()), progress=False).layers) == 2
    scripted = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    nf4.quantize_model(nn.ModuleDict({"scripted": scripted, "plain": nn.Linear(64, 64)}), progress=False)


class Casts(Block):
    """A reader that no search for `.weight` finds."""

    def forward(self, x):
        return self.called(x.to(next(self.called.parameters()).dtype))


@pytest.mark.parametrize("lora", [None, nf4.LoraConfig(r=2)], ids=["plain", "adapter"])
def test_an_x_cast_to_a_packed_weights_dtype_names_layer_reader_and_remedy(lora):
    """Report's kind: "x must be float32, ... got torch.uint8" alone, from a model that never says uint8."""
    model = nn.Sequential(Casts())
    nf4.quantize_model(model, lora=lora, progress=False)
    x = torch.randn(2, 64)
    with pytest.raises(TypeError, match=r"uint8; Casts\.forward gave it to called, .*skip=\['called'\]"):
        model(x)
    model = nn.Sequential(Casts())
    nf4.quantize_model(model, skip=["called"], progress=False)
    model(x)
    with pytest.raises(TypeError, match=r"got torch\.uint8$"):
        nf4.linear(x.to(torch.uint8), nf4.quantize(torch.randn(64, 64)))
