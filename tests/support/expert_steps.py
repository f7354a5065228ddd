"""Experts dealt to four ranks beside all experts on one: a case of parallel_steps."""

import torch
import torch.distributed as dist
from support import tiny
from support.gathered import assert_same_state, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import nf4kernels as nf4
from nf4kernels.distributed import ExpertParallel


def experts(E=4, H=64, I=64, dtype=torch.float32, **options) -> nf4.QuantExperts:  # noqa: E741
    torch.manual_seed(0)
    gate_up, down = (nf4.quantize_experts(torch.randn(E, *s, dtype=dtype), **options) for s in ((2 * I, H), (H, I)))
    bias = nn.Parameter(torch.randn(E, 2 * I, dtype=dtype))
    made = nf4.QuantExperts(gate_up, down, nn.functional.silu, biases={"gate_up_proj_bias": bias})
    made.add_lora(nf4.LoraConfig(r=4), dtype=dtype)
    return tiny.fill_adapters(made)


def tokens(E: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, top_k_index, top_k_weights, dy: experts without tokens, and tokens without an expert."""
    torch.manual_seed(1)
    x, dy = torch.randn(14, 64, dtype=dtype), torch.randn(14, 64, dtype=dtype)
    index = torch.stack([torch.randperm(E)[:2] for _ in range(14)])
    index[3, 1] = E
    index[index == 2] = E
    return x, index, torch.rand(14, 2), dy


def check_experts() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    bounds = [0, 5, 5, 12, 14]  # a rank without a token
    for name, options in (
        ("double", {}), ("bf16", {"dtype": torch.bfloat16}), ("float scales", {"double_quant": False}),
        ("codes", {"codebook": "nvfp4"}), ("eight", {"E": 8}),
    ):  # fmt: skip
        for layout in (Shard(0), Replicate()):
            plain, cut = experts(**options), experts(**options)
            before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
            parallelize_module(cut, mesh, ExpertParallel(input_layouts=layout))
            assert cut.down_proj.weight.to_local().numel() * dist.get_world_size() == plain.down_proj.weight.numel()
            x, index, weights, dy = tokens(options.get("E", 4), options.get("dtype", torch.float32))
            mine = slice(bounds[rank], bounds[rank + 1]) if isinstance(layout, Shard) else slice(None)
            got = run_experts(cut, x[mine], index[mine], weights[mine], dy[mine])
            expected = [each[mine] for each in run_experts(plain, x, index, weights, dy)]
            for what, a, b in zip(("y", "dx", "the weights' gradient"), got, expected):
                assert_equal_or_near(a, b, isinstance(layout, Shard), f"{name}, {layout}: {what}")
            for (key, p), q in zip(plain.named_parameters(), cut.parameters()):
                if p.grad is not None:
                    assert torch.equal(whole(q.grad), p.grad), f"{name}, {layout}: the gradient of {key}"
            assert_same_state(cut, before, name)


def run_experts(module, x, index, weights, dy) -> tuple[Tensor, ...]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, index, weights)
    y.backward(dy)
    return y.detach(), x.grad, weights.grad


def assert_equal_or_near(actual: Tensor, expected: Tensor, bits: bool, what: str) -> None:
    """Bits, or what the sum of two experts' rounded shares may be off: each share's rounding, and the sum's."""
    if bits:
        assert torch.equal(actual, expected), what
        return
    allowed = 4 * torch.finfo(expected.dtype).eps * expected.double().norm()
    assert (actual.double() - expected.double()).norm() <= allowed, what
