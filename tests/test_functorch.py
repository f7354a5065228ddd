"""torch.func and derivatives beyond the first through linear, lora_linear, grouped_linear: those of the dense twin."""

import pytest
import torch
from support import cases
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import nf4kernels as nf4

R, N, K, M = 4, 32, 64, 5
SCALING = 0.5


@pytest.fixture
def qweight():
    return nf4.quantize(torch.randn(N, K))


@pytest.fixture
def w(qweight):
    return nf4.dequantize(qweight, torch.float32)


def arguments():
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (M, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ours(qweight, **values):
    return nf4.lora_linear(values["x"], qweight, values["lora_A"], values["lora_B"], SCALING, values["bias"])


def dense(w, **values):
    lora_term = values["x"] @ values["lora_A"].mT @ values["lora_B"].mT
    return values["x"] @ w.T + SCALING * lora_term + values["bias"]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


NAMES = list(arguments())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap", "jacrev"])
def test_transforms_of_lora_linear(qweight, w, name, transform):
    """influence functions and meta-learning."""
    values = arguments()
    value = values[name]

    def of(function):
        def one(z):
            return function(**values | {name: z})

        if transform == "grad":
            return grad(lambda z: one(z).square().sum())(value)
        if transform == "vjp":
            y, back = vjp(one, value)
            return back(torch.ones_like(y))[0]
        if transform == "jvp":
            return torch.stack(jvp(one, (value,), (torch.ones_like(value),)))
        if transform == "jacrev":
            return jacrev(lambda z: one(z)[:2, :3])(value)
        return vmap(one)(torch.stack([value, 2 * value, -value]))

    close(of(lambda **v: ours(qweight, **v)), of(lambda **v: dense(w, **v)))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_of_linear(qweight, w, transform):
    """The same of linear; x alone."""
    x = arguments()["x"]

    def of(function):
        if transform == "grad":
            return grad(lambda z: function(z).square().sum())(x)
        if transform == "jvp":
            return torch.stack(jvp(function, (x,), (x.flip(0),)))
        return vmap(function)(x)

    close(of(lambda z: nf4.linear(z, qweight)), of(lambda z: z @ w.T))


@pytest.mark.parametrize("in_dims", [0, 1, (0, None), -1], ids=str)
def test_vmap_over_any_dimension(qweight, w, in_dims):
    """The batch may come in any place, and of one argument alone."""
    x, bias = torch.randn(3, 3, 64), torch.randn(N)
    if in_dims == -1:
        x = x.movedim(0, -1)
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims, None)
    close(vmap(lambda z, b: nf4.linear(z, qweight, b), dims)(x, bias), vmap(lambda z, b: z @ w.T + b, dims)(x, bias))


def test_per_sample_gradients_of_a_layer():
    """differential privacy: one adapter gradient a sample, by vmap over grad over functional_call."""
    layer = nf4.QuantLinear(K, N, lora=nf4.LoraConfig(r=R, init="gaussian"), dtype=torch.float32)
    nn.init.normal_(layer.lora_B.weight)
    adapters = {n: p.detach() for n, p in layer.named_parameters() if "lora_" in n}
    x = torch.randn(6, M, K)

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample,)).square().mean()

    got = vmap(grad(loss), (None, 0))(adapters, x)
    for i, sample in enumerate(x):
        layer.zero_grad()
        layer(sample).square().mean().backward()
        close(got["lora_A.weight"][i], layer.lora_A.weight.grad)
        close(got["lora_B.weight"][i], layer.lora_B.weight.grad)


def test_an_ensemble_of_adapters_by_vmap():
    """several adapters over one base in one call, by stack_module_state."""
    layer = nf4.QuantLinear(K, N, lora=nf4.LoraConfig(r=R), dtype=torch.float32)
    stacked = {"lora_A.weight": torch.randn(3, R, K), "lora_B.weight": torch.randn(3, N, R)}
    x = torch.randn(M, K)
    got = vmap(lambda p: functional_call(layer, p, (x,)))(stacked)
    for i in range(3):
        close(got[i], functional_call(layer, {k: v[i] for k, v in stacked.items()}, (x,)))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("x", "lora_A"), ("x", "lora_B"), ("x",)], ids="-".join)
def test_second_derivatives(qweight, w, names):
    """gradient penalties and Hessian products: "once_differentiable"."""
    found = []
    for function in (lambda **v: ours(qweight, **v), lambda **v: dense(w, **v)):
        values = {k: v.clone().requires_grad_(k in names) for k, v in arguments().items()}
        leaves = [values[name] for name in names]
        first = torch.autograd.grad(function(**values).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_forward_mode_ad_of_a_layer():
    """The same by dual numbers and by a layer."""
    layer = nf4.QuantLinear(K, N, bias=False, dtype=torch.float32)
    x, tangent = torch.randn(M, K), torch.randn(M, K)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        close(torch.autograd.forward_ad.unpack_dual(y).tangent, layer(tangent))


def test_hessian_vector_product_of_a_model():
    """By jvp over grad, of the adapters alone; the dense twin has Ŵ."""
    model = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, N))
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=R, alpha=R, init="gaussian"), progress=False)
    adapters = {n: torch.randn_like(p) / 8 for n, p in model.named_parameters() if "lora_" in n}
    dense_weights = [model[i].dequantize(torch.float32) for i in (0, 2)]
    x, direction = torch.randn(M, K), {name: torch.randn_like(p) for name, p in adapters.items()}

    def twin(p):
        weights = [w + p[f"{i}.lora_B.weight"] @ p[f"{i}.lora_A.weight"] for i, w in zip((0, 2), dense_weights)]
        return ((x @ weights[0].T + model[0].bias).tanh() @ weights[1].T + model[2].bias).square().mean()

    product = jvp(grad(lambda p: functional_call(model, p, (x,)).square().mean()), (adapters,), (direction,))[1]
    expected = jvp(grad(twin), (adapters,), (direction,))[1]
    for name, value in expected.items():
        close(product[name], value)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_a_recorded_backward_gives_the_same_gradients(qweight, dtype, dropout_p):
    """create_graph takes another way through backward; fp32 adapters on bf16 x are QLoRA's normal case."""
    found = []
    for create_graph in (False, True):
        values = {k: v.requires_grad_() for k, v in arguments().items()}
        torch.manual_seed(2)
        x, leaves = values["x"].to(dtype), list(values.values())
        y = nf4.lora_linear(x, qweight, values["lora_A"], values["lora_B"], SCALING, values["bias"], dropout_p)
        with torch.autocast("cpu", torch.bfloat16):  # around backward: of no effect
            found.append(torch.autograd.grad(y.float().square().sum(), leaves, create_graph=create_graph))
    for plain, recorded, leaf in zip(*found, leaves):
        assert recorded.dtype == leaf.dtype
        scale = plain.abs().max().item()
        torch.testing.assert_close(recorded, plain, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
    assert all(gradient.requires_grad for gradient in found[1][:3])


def test_second_derivatives_see_the_mask_of_forward(qweight, w):
    found = []
    for is_ours in (True, False):
        values = {k: v.requires_grad_() for k, v in arguments().items()}
        x, A, B, bias = values.values()
        torch.manual_seed(3)
        if is_ours:
            y = nf4.lora_linear(x, qweight, A, B, SCALING, bias, 0.5)
        else:
            dropped, _ = torch.native_dropout(x, 0.5, True)
            y = x @ w.T + SCALING * dropped @ A.T @ B.T + bias
        first = torch.autograd.grad(y.square().sum(), (x, A, B), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, A, B)))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_an_ordinary_step_takes_the_fused_way_alone(qweight, monkeypatch):
    def forbidden(*_):
        pytest.fail("a step without transforms went through Product")

    for module in (nf4.autograd, nf4.autograd_lora):
        monkeypatch.setattr(module, "Product", forbidden)
    values = {k: v.requires_grad_() for k, v in arguments().items()}
    y = torch.utils.checkpoint.checkpoint(lambda v: ours(qweight, **v), values, use_reentrant=False)
    (y + nf4.linear(values["x"], qweight)).sum().backward()
    assert values["lora_B"].grad.any()


def test_vmap_over_a_weight_is_refused(qweight):
    """A batch of layers (stack_module_state) has one product for each weight, which no kernel computes."""
    layer = nf4.QuantLinear(K, N, dtype=torch.float32)
    stacked = {name: torch.stack([value, value]) for name, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="4-bit weight must be one for the whole batch"):
        vmap(lambda state, x: functional_call(layer, state, (x,)))(stacked, torch.randn(2, M, K))


EXPERTS = (torch.tensor([2, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 5], dtype=torch.int32))  # offsets


@pytest.fixture
def qweights():
    return nf4.quantize_experts(torch.randn(3, N, K))


@pytest.mark.parametrize("transform", ["grad", "jvp", "twice"])
def test_transforms_of_grouped_linear(qweights, transform):
    x, w = arguments()["x"], [nf4.dequantize(q, torch.float32) for q in qweights]

    def of(function):
        if transform == "jvp":
            return torch.stack(jvp(function, (x,), (x.flip(0),)))
        if transform == "grad":
            return grad(lambda z: function(z).square().sum())(x)
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(z).pow(3).sum(), z, create_graph=True)
        return torch.autograd.grad(first.square().sum() / 1000, z)[0]

    got = of(lambda z: nf4.grouped_linear(z, EXPERTS[0], qweights))
    expected = of(lambda z: torch.cat([z[:2] @ w[0].T, z[2:] @ w[2].T]))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 1)], ids=str)
def test_vmap_of_grouped_linear(qweights, in_dims):
    """The batch in x, in the offsets, in both; each sample as alone."""
    xs, offsets = torch.randn(2, M, K), torch.stack(EXPERTS)
    given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((xs, offsets), in_dims)]
    got = vmap(lambda x, o: nf4.grouped_linear(x, o, qweights), in_dims)(*given)
    for i in range(2):
        x, o = (t[0 if dim is None else i] for t, dim in zip((xs, offsets), in_dims))
        close(got[i], nf4.grouped_linear(x, o, qweights))
