"""A QuantLinear taken through random orders of everything that can happen to it (a hypothesis state machine).

After every step: the stored bytes are those of the start, forward equals the dense product, and gradients reach what
they should.
"""

import copy
import io
import pickle

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import cases
from support.cases import Layout
from torch import nn

from nf4kernels import LoraConfig, QuantLinear, disable_adapters, linear
from nf4kernels.nn.quant_module import SCALE_TENSORS

dtypes = st.sampled_from(cases.DTYPES)
FROZEN = ("weight", *SCALE_TENSORS, "source_dtype", "checksum")


class Life(RuleBasedStateMachine):
    @initialize(
        K=st.sampled_from([32, 63, 64, 100, 256]),
        N=st.sampled_from([1, 17, 64]),
        bias=st.booleans(),
        lora=st.booleans(),
        layout=st.sampled_from([Layout(), Layout(32, "custom", None), Layout(128, "fp4", "dynamic8")]),
        dtype=dtypes,
    )
    def construct(self, K, N, bias, lora, layout, dtype):
        torch.manual_seed(1)
        self.layout = layout
        self.layer = QuantLinear(
            K, N, bias, lora=LoraConfig(r=3, alpha=3) if lora else None, dtype=dtype, **layout.options
        )
        self.frozen = {name: copy.deepcopy(getattr(self.layer, name)) for name in FROZEN}
        self.dense = self.layer.dequantize(torch.float32).double()
        self.replaced = []

    def effective(self):
        if self.layer.lora is None:
            return self.dense
        B, A = self.layer.lora_B.weight.detach().double(), self.layer.lora_A.weight.detach().double()
        return self.dense + self.layer.lora.scaling * B @ A

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.layer.train(mode)

    @rule(dtype=dtypes, M=st.sampled_from([0, 1, 5]), grad=st.booleans())
    def forward(self, dtype, M, grad):
        x = torch.randn(M, self.layer.in_features).to(dtype)
        with torch.set_grad_enabled(grad):
            y = self.layer(x)
        w = self.effective()
        exact = x.double() @ w.T
        terms = x.double().abs() @ w.abs().T
        if self.layer.bias is not None:
            exact = exact + self.layer.bias.detach().double()
            terms = terms + self.layer.bias.detach().double().abs()
        if self.layer.lora is not None:
            A, B = (m.weight.detach().double().abs() for m in (self.layer.lora_A, self.layer.lora_B))
            terms = terms + abs(self.layer.lora.scaling) * x.double().abs() @ A.T @ B.T
        # At most eight roundings to x's dtype (two of Ŵ, one of each factor, of P, of the sums, of y) on the terms.
        assert ((y.double() - exact).abs() <= 8 * torch.finfo(dtype).eps / 2 * terms).all()

    @rule()
    def train_step(self):
        self.layer.zero_grad()
        x = torch.randn(5, self.layer.in_features, requires_grad=True)
        before = {n: p.detach().clone() for n, p in self.layer.named_parameters() if p.requires_grad}
        self.layer(x).square().mean().backward()
        assert x.grad.count_nonzero() > 0
        assert self.layer.weight.grad is None
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * parameter.grad
        for name, parameter in self.layer.named_parameters():
            if name in before:
                assert parameter.grad.dtype == parameter.dtype, name

    @rule(dtype=dtypes)
    def cast(self, dtype):
        self.layer.to(dtype)
        for module in self.layer.modules():
            if type(module) is nn.Linear:
                assert module.weight.dtype == dtype

    @rule(how=st.sampled_from(["deepcopy", "pickle", "save"]))
    def duplicate(self, how):
        self.replaced.append(self.layer)
        if how == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        elif how == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        else:
            file = io.BytesIO()
            torch.save(self.layer, file)
            file.seek(0)
            self.layer = torch.load(file, weights_only=False)

    @rule(assign=st.booleans(), meta=st.booleans())
    def save_and_load(self, assign, meta):
        old = self.layer
        state = {k: v.clone() for k, v in old.state_dict().items()}
        fresh = QuantLinear(
            old.in_features, old.out_features, old.bias is not None,
            device="meta" if meta and assign else None,
            dtype=next((p.dtype for p in old.parameters() if p.is_floating_point()), torch.float32),
            **self.layout.options,
        )  # fmt: skip
        for name in old.adapter_names:
            config, lora_A, _ = old.get_adapter(name)
            fresh.add_lora(config, lora_A.weight.dtype, name)
        result = fresh.load_state_dict(state, strict=True, assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
        self.replaced.append(old)
        self.layer = fresh.train(old.training)

    @rule(dtype=dtypes)
    def merge_and_go_on(self, dtype):
        merged = self.layer.to_linear(dtype)
        assert type(merged) is nn.Linear
        exact = self.effective()
        error = (merged.weight.double() - exact).abs()
        # Ŵ, the adapter's product and their sum in fp32, then one rounding; fp16's smallest step for tiny weights.
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-20 * (self.dense.abs() + exact.abs())
        assert (error <= allowed + 2.0**-25).all()

    @rule()
    def add_adapter(self):
        if "default" not in self.layer.adapter_names:
            self.layer.add_lora(LoraConfig(r=2, alpha=1, init="gaussian"))
            nn.init.normal_(self.layer.get_adapter("default")[2].weight, std=0.1)

    @rule(name=st.sampled_from(["second", "third"]))
    def add_another_adapter(self, name):
        if name not in self.layer.adapter_names:
            self.layer.add_lora(LoraConfig(r=5, alpha=2, init="gaussian"), name=name)
            nn.init.normal_(self.layer.get_adapter(name)[2].weight, std=0.1)

    @rule(name=st.sampled_from(["default", "second", "third", None]))
    def switch_adapter(self, name):
        self.layer.set_adapter(name)
        assert (self.layer.lora is None) == (name not in self.layer.adapter_names)

    @rule(name=st.sampled_from(["default", "second"]))
    def remove_adapter(self, name):
        if name in self.layer.adapter_names:
            self.layer.remove_adapter(name)

    @rule(dtype=dtypes)
    def forward_without_adapters(self, dtype):
        x = torch.randn(3, self.layer.in_features).to(dtype)
        with disable_adapters(self.layer):
            y = self.layer(x)
        assert torch.equal(y, linear(x, self.layer.qweight, self.layer.bias))

    @rule(flag=st.booleans())
    def freeze_bias(self, flag):
        if self.layer.bias is not None:
            self.layer.bias.requires_grad_(flag)

    @invariant()
    def bytes_are_those_of_the_start(self):
        if not hasattr(self, "layer"):
            return
        for layer in (self.layer, *self.replaced):
            for name, tensor in self.frozen.items():
                now = getattr(layer, name)
                if tensor is None:
                    assert now is None, name
                else:
                    assert now.dtype == tensor.dtype, name
                    assert torch.equal(now, tensor), name
            assert not layer.weight.requires_grad


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=300, stateful_step_count=20)
