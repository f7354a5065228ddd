"""Run by torchrun on four ranks: layers and models cut by ranks beside the whole ones. Prints "same: case"."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contract.product import joined
from support import tiny
from support.exact_model import assert_as_good, exact, shaken
from support.expert_steps import check_experts, experts
from support.gathered import assert_same_state, whole
from support.numerics import row_bounds
from support.torchrun import check_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import parallel as torchs
from torch.distributed.tensor.parallel import parallelize_module

import nf4kernels as nf4
from nf4kernels.distributed import ColwiseParallel, ExpertParallel, RowwiseParallel, tensor_parallel_plan
from nf4kernels.model.sharded import own_part
from nf4kernels.nn.dtensors import local_of

RANKS = 4
LORA = nf4.LoraConfig(r=4, init="gaussian")
COLUMN, ROW = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # two blocks a row at least


def layer(N=96, K=512, dtype=torch.float32, dropout=0.0, **options) -> nf4.QuantLinear:
    torch.manual_seed(0)
    lora = nf4.LoraConfig(r=4, dropout=dropout)
    made = nf4.QuantLinear(K, N, dtype=dtype, lora=lora, **options)
    return tiny.fill_adapters(made)


LAYERS = {
    "superblocks begin with each rank's rows": {"N": 256, "K": 256},  # 64 rows of 4 blocks are one
    "superblocks straddle the ranks": {},
    "float scales": {"double_quant": False},
    "a published format": {"codebook": "mxfp4"},
    "without bias": {"bias": False},
    "bf16": {"dtype": torch.bfloat16},
}


def check_layers(style, dropout=0.0) -> None:
    by_rows = isinstance(style, ColwiseParallel)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, options in LAYERS.items():
        for M in (1, 6):
            plain, cut = (layer(dropout=dropout, **options) for _ in range(2))
            before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
            parallelize_module(cut, mesh, style)
            packed = cut.weight.to_local()
            assert packed.numel() * RANKS == plain.weight.numel(), name
            assert packed.untyped_storage().nbytes() == packed.nbytes, f"{name}: the rest of the weight is kept"
            torch.manual_seed(1)
            dtype = plain.lora_A.weight.dtype
            x, dy = (torch.randn(M, size, dtype=dtype) for size in (plain.in_features, plain.out_features))
            outputs = []
            for each in (plain, cut):
                each.x = x.clone().requires_grad_()
                torch.manual_seed(2)  # the dropout's
                outputs.append(each(each.x))
                outputs[-1].backward(dy)
            compare_layers(plain, cut, x, dy, outputs, by_rows, f"{name}, M={M}")
            assert_same_state(cut, before, name)


def compare_layers(plain, cut, x, dy, outputs, by_rows, what) -> None:
    A, B, scaling = plain.lora_A.weight.detach(), plain.lora_B.weight.detach(), plain.lora.scaling
    W = plain.dequantize(torch.float32)
    if by_rows:
        assert torch.equal(outputs[1], outputs[0]), f"{what}: y has other bits"
    assert_lora_within_bound(outputs[1].detach(), x, W.T, (A.T, B.T, scaling), f"{what}: y", plain.bias)
    assert_lora_within_bound(cut.x.grad, dy, W, (B, A, scaling), f"{what}: dx")
    if x.dtype != torch.float32:  # whose factors are rounded between the two sums
        return
    dy, x, A, B = (each.double() for each in (dy, x, A, B))
    for name, gradient, terms in (
        ("lora_A.weight", lambda dy, x, A, B: scaling * (dy @ B).T @ x, len(B) + len(x)),
        ("lora_B.weight", lambda dy, x, A, B: scaling * dy.T @ (x @ A.T), len(A.T) + len(x)),
        ("bias", lambda dy, *_: dy.sum(0), len(x)),
    ):
        parameter = cut.get_parameter(name) if cut.bias is not None or name != "bias" else None
        if parameter is not None:
            assert parameter.grad.placements == parameter.placements, what
            error = (whole(parameter.grad).double() - gradient(dy, x, A, B)).abs()
            worst = (terms + RANKS) * 2.0**-24 * gradient(dy.abs(), x.abs(), A.abs(), B.abs())  # each sum's rounding
            assert (error <= worst).all(), f"{what}: the gradient of {name}"


def assert_lora_within_bound(actual, a, matrix, lora, what, bias=None) -> None:
    """Of a @ matrix + scaling * a @ inner @ outer: section 7's, and what each rank's rounded a @ inner may be off."""
    inner, outer, scaling = lora
    _, bound = row_bounds(*joined(a, matrix, (a @ inner, outer, scaling)), bias)
    exact = a.double() @ (matrix.double() + scaling * inner.double() @ outer.double())
    magnitude = scaling * a.double().abs() @ inner.double().abs() @ outer.double().abs()
    rounding = (a.shape[1] + RANKS) * 2.0**-24 + (0 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps / 2)
    error = (actual.double() - exact - (0 if bias is None else bias.detach().double())).norm(dim=1)
    assert (error <= bound + rounding * magnitude.norm(dim=1)).all(), what


def check_columns() -> None:
    check_layers(COLUMN)


def check_rows() -> None:
    check_layers(ROW)


def check_dropout() -> None:
    """Column-wise with equal generators: the whole layer's mask. Row-wise: forward's own mask in backward."""
    mesh = init_device_mesh("cpu", (RANKS,))
    plain, by_columns = layer(dropout=0.5), parallelize_module(layer(dropout=0.5), mesh, COLUMN)
    by_rows = parallelize_module(layer(dropout=0.5), mesh, ROW)
    torch.manual_seed(1)
    x = torch.randn(6, 512)
    outputs = []
    for each in (plain, by_columns, by_rows, by_rows):
        torch.manual_seed(2)
        outputs.append(each(x))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[3], outputs[2])
    # of a linear function f of B alone: f(B) - f(0) = <B, gradient>
    by_rows.zero_grad()
    dy = torch.randn_like(x[:, :96])
    torch.manual_seed(2)
    y = by_rows(x)
    y.backward(dy)
    base = nf4.linear(x, plain.qweight, plain.bias)
    change = ((y - base).double() * dy).sum()
    predicted = (whole(by_rows.lora_B.weight.grad).double() * whole(by_rows.lora_B.weight)).sum()
    scale = (y.double() * dy).abs().sum()
    assert (change - predicted).abs() <= 512 * 2.0**-24 * scale, "backward has another mask than forward"


def check_life() -> None:
    """Adapters that come later, several of them, evaluation, other devices' moves, and a checkpoint of another cut."""
    mesh, tp = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    cut = nf4.QuantLinear.from_quantized(layer().qweight, compute_dtype=torch.bfloat16)
    plain = nf4.QuantLinear.from_quantized(layer().qweight, compute_dtype=torch.bfloat16)
    parallelize_module(cut, mesh, COLUMN)
    x = torch.randn(3, 512)
    dist.broadcast(x, 0)
    assert torch.equal(cut(x), plain(x))
    torch.manual_seed(dist.get_rank())  # the first rank's draw is taken
    cut.add_lora(LORA, torch.float32)
    cut.add_lora(LORA, torch.float32, "second")
    tiny.fill_adapters(cut)
    for name in ("default", "second"):
        config, lora_A, lora_B = cut.get_adapter(name)
        plain.add_lora(config, torch.float32, name)
        for factor, own in zip((lora_A, lora_B), plain.get_adapter(name)[1:]):
            own.weight.data.copy_(whole(factor.weight))
    for name in ("second", "default"):
        cut.set_adapter(name), plain.set_adapter(name)
        assert torch.equal(cut(x), plain(x)), name
    with nf4.disable_adapters(nn.ModuleList([cut])), nf4.disable_adapters(nn.ModuleList([plain])):
        assert torch.equal(cut(x), plain(x))
    cut.to(torch.float64).to(torch.float32)
    assert torch.equal(cut(x), plain(x)), "a cast reached the bytes"
    compiled = torch.compile(cut, backend="aot_eager")
    assert torch.equal(compiled(x), plain(x)), "compiled"
    directory = Path("layer")
    dcp.save({"layer": cut.state_dict()}, checkpoint_id=directory)
    for style, onto in ((ROW, tp), (COLUMN, tp), (None, None)):
        other = nf4.QuantLinear(512, 96, bias=False, dtype=torch.float32, lora=LORA, compute_dtype=torch.bfloat16)
        other.add_lora(LORA, torch.float32, "second")
        if style is not None:
            parallelize_module(other, onto, style)
        state = other.state_dict()
        dcp.load({"layer": state}, checkpoint_id=directory)
        other.load_state_dict(state)
        assert_same_state(other, {name: whole(each) for name, each in cut.state_dict().items()}, "resharded")
        if not isinstance(style, RowwiseParallel):
            assert torch.equal(other(x), cut(x)), "resharded"


def check_loaded() -> None:
    """Another state, as state_dict or written in place, is what the next product is of; adapters come late."""
    mesh = init_device_mesh("cpu", (RANKS,))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    for name, options in LAYERS.items():
        if options.get("dtype") or "N" in options:
            continue
        other, another = layer(**options), layer(**options)
        scaled = nf4.quantize(10 * other.dequantize(torch.float32), **other.quant_options)
        for each in (other, another):
            each.set_qweight(scaled)
        for style in (COLUMN, ROW):
            for load in ("state", "in place"):
                cut = parallelize_module(layer(**options), mesh, style)
                before = cut(x)
                if load == "state":
                    cut.load_state_dict(parallelize_module(copy.deepcopy(another), mesh, style).state_dict())
                else:
                    given = other.state_dict()
                    with torch.no_grad():
                        for key, own in cut.state_dict(keep_vars=True).items():
                            local_of(own).copy_(given[key][own_part(own)])
                y = cut(x)
                torch.testing.assert_close(y, other(x), rtol=1e-4, atol=1e-3, msg=f"{name}, {style}, {load}")
                assert not torch.allclose(y, before, rtol=0.1)
    plain = nf4.QuantLinear(512, 96, bias=False, dtype=torch.bfloat16)
    late = parallelize_module(plain, mesh, COLUMN)
    late.add_lora(LORA)
    assert late.lora_A.weight.dtype == torch.bfloat16
    check_refused(lambda: late.set_qweight(scaled), "a layer in tensor parallel loads a state")
    part = parallelize_module(experts(double_quant=False), mesh, ExpertParallel(input_layouts=Replicate()))
    part.load_state_dict(part.state_dict())
    for wrong in (5, -1):
        index = torch.tensor([[0, 1], [2, wrong]])
        with pytest.raises(RuntimeError, match=r"top_k_index must be in 0\.\."):
            part(torch.randn(2, 64), index, torch.rand(2, 2))


def step(model: nn.Module, ids: Tensor = tiny.IDS) -> tuple[Tensor, Tensor]:
    """(logits of `ids`, their loss, which has given gradients)."""
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach()


def steps(model: nn.Module) -> dict[str, Tensor]:
    """Logits and losses of three steps of gradient descent, and the last gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    made = {}
    for number in range(1, 4):
        optimizer.zero_grad()
        made[f"logits of step {number}"], made[f"loss of step {number}"] = step(model)
        optimizer.step()
    return made | gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_all_as_good(
    actual: dict[str, Tensor], others: list[dict[str, Tensor]], exact: dict[str, Tensor], what: str
) -> None:
    for name, each in exact.items():
        assert_as_good(actual[name], [other[name] for other in others], each, f"{what}: {name}", times=4)
    assert all(made.keys() == exact.keys() for made in (actual, *others))


def quantized(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**WIDE, **changes}
    model = tiny.llama(**sizes) if kind == "llama" else tiny.make("MixtralForCausalLM", num_local_experts=4, **sizes)
    model.requires_grad_(False)
    nf4.quantize_model(model, lora=LORA, progress=False)
    for module in model.modules():
        if isinstance(module, nf4.QuantExperts):
            module.remove_adapter()
    return tiny.fill_adapters(model).train()


def compare_models(plain: nn.Module, cut: nn.Module, what: str) -> None:
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    assert_same_state(cut, before, what)
    others = [plain, *(shaken(plain, seed) for seed in range(3))]
    actual, exactly, *others = (steps(model) for model in (cut, exact(plain), *others))
    assert_all_as_good(actual, others, exactly, what)


def check_models() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for kind in ("llama", "mixtral"):
        plain, cut = quantized(kind), quantized(kind)
        parallelize_module(cut, mesh["tp"], tensor_parallel_plan(cut, mesh["tp"]))
        kinds = {type(module).__name__ for module in cut.modules()}
        assert {"RowsOfLinear", "ColumnsOfLinear"} <= kinds
        assert ("PartOfExperts" in kinds) == (kind == "mixtral")
        compare_models(plain, cut, kind)
    plain, cut = quantized("llama"), quantized("llama")
    parallelize_module(cut, mesh["tp"], tensor_parallel_plan(cut, mesh["tp"]))
    cut.gradient_checkpointing_enable({"use_reentrant": False})
    for block in cut.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(cut, mesh=mesh["dp"])
    weight = cut.model.layers[0].mlp.down_proj.weight
    assert weight.to_local().numel() * 4 == weight.numel()
    compare_models(plain, cut, "fully_shard over tensor parallel")


def check_experts_beside_shards() -> None:
    """Ranks with sequences of their own: fully_shard averages attention's gradients, and tokens go to the experts."""
    mesh, rank = init_device_mesh("cpu", (RANKS,)), dist.get_rank()
    plain, cut = quantized("mixtral"), quantized("mixtral")
    parallelize_module(cut, mesh, {"model.layers.*.mlp.experts": ExpertParallel()})
    dealt = {p for module in cut.modules() if isinstance(module, nf4.QuantExperts) for p in module.parameters()}
    assert dealt
    for block in cut.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=dealt)
    fully_shard(cut, mesh=mesh, ignored_params=dealt)
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (RANKS, 6))
    whole_models = [exact(plain), plain, *(shaken(plain, seed) for seed in range(3))]
    own = slice(rank, rank + 1)
    logits, loss = step(cut, ids[own])
    dist.all_reduce(loss)
    actual = {"logits": logits, "loss": loss / RANKS} | gradients(cut)
    exactly, *others = (
        {"logits": logits[own], "loss": loss} | gradients(model)
        for model in whole_models
        for logits, loss in [step(model, ids)]
    )
    assert_all_as_good(actual, others, exactly, "experts beside shards")


def check_from_pretrained() -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from nf4kernels.integrations.transformers import Nf4Config

    heads = {"hidden_size": 256, "num_key_value_heads": 4}
    dense, packed, saved = Path("dense"), Path("packed"), Path("saved")
    config = Nf4Config()
    if dist.get_rank() == 0:
        tiny.llama(**{**WIDE, **heads}).save_pretrained(dense)
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(packed)
    dist.barrier()
    plain = AutoModelForCausalLM.from_pretrained(packed)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for directory, options in ((dense, {"quantization_config": config}), (packed, {})):
        asked = DistributedConfig(tp_plan="auto")
        cut = AutoModelForCausalLM.from_pretrained(directory, distributed_config=asked, **options)
        assert {"RowsOfLinear", "ColumnsOfLinear"} <= {type(module).__name__ for module in cut.modules()}
        assert "colwise" in cut.tp_plan.values()
        assert_same_state(cut, before, str(directory))
        with torch.no_grad():
            logits, own, exact_logits = (each(tiny.IDS).logits for each in (cut, plain, exact(plain)))
        assert_as_good(logits, [own], exact_logits, f"logits of {directory}")
        for module in cut.modules():
            if isinstance(module, nf4.QuantLinear):
                module.add_lora(LORA, torch.float32)
        step(cut)
        assert any(p.grad is not None and whole(p.grad).any() for p in cut.parameters())
        for module in cut.modules():
            if isinstance(module, nf4.QuantLinear):
                module.remove_adapter()
    cut.save_pretrained(saved)
    dist.barrier()
    assert_same_state(AutoModelForCausalLM.from_pretrained(saved), before, "saved from ranks")
    by_experts = {"ep_size": 4, "fsdp_size": 4}
    check_refused(
        lambda: AutoModelForCausalLM.from_pretrained(packed, distributed_config=DistributedConfig(**by_experts)),
        "ep_size must be 1 where from_pretrained distributes a model in 4 bits, got 4",
    )


def check_refused(do, *words: str) -> None:
    """One sentence on this rank; a rank that did not raise would leave the others in the next collective."""
    try:
        do()
    except ValueError as error:
        sentence = str(error)
    else:
        raise AssertionError(f"nothing was raised, expected {words}")
    assert "\n" not in sentence, sentence
    for each in words:
        assert each in sentence, sentence
    dist.barrier()


def check_bad_input() -> None:
    mesh, two = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2))
    for made, style, words in (
        (layer(N=98), COLUMN, "out_features=98 must be the same on each of 4 ranks; 1, 2, 7, 14, 49 would do"),
        (layer(K=192), ROW, "in_features=192 must be whole blocks of 64, the same on each of 4 ranks; 1, 3 would do"),
        (layer(K=96), ROW, "in_features=96 must be a multiple of block_size=64"),
        (layer(), torchs.ColwiseParallel(), "must be cut by the styles of nf4kernels.distributed"),
        (layer(), torchs.RowwiseParallel(), "must be cut by the styles of nf4kernels.distributed"),
    ):
        before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        check_refused(lambda made=made, style=style: parallelize_module(made, mesh, style), words)
        assert type(made) is nf4.QuantLinear
        assert_same_state(made, before, words)
    check_refused(lambda: parallelize_module(layer(), two, COLUMN), "the mesh must have one dimension")
    cut = parallelize_module(layer(), mesh, COLUMN)
    check_refused(lambda: parallelize_module(cut, mesh, COLUMN), "cut or sharded already")
    term = (cut.lora_A.weight, cut.lora_B.weight, 1.0, 0.0)
    check_refused(lambda: cut(torch.ones(1, 512), term=term), "has adapters of its own (add_lora), not PEFT's")
    llama = quantized("llama")
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    for do, words in (
        (lambda: tensor_parallel_plan(llama, mesh), "k_proj: 2 heads must be the same number on each of 4 ranks"),
        (lambda: tensor_parallel_plan(layer(), mesh), "must have a tp_plan"),
        (lambda: tensor_parallel_plan(llama, two), "device_mesh must have one dimension"),
        (lambda: tensor_parallel_plan(llama, mesh, {"nobody": "colwise"}), "must have names of the plan"),
        (lambda: tensor_parallel_plan(llama, mesh, {"model.norm": "packed_colwise"}), "packed_colwise for model.norm"),
        (lambda: parallelize_module(experts(E=3), mesh, ExpertParallel()), "3 experts must be the same number on each"),
        (lambda: parallelize_module(layer(), mesh, ExpertParallel()), "must be a QuantExperts"),
    ):
        check_refused(do, words)
    assert_same_state(llama, before, "refused")


CASES = {
    "columns": check_columns,
    "rows": check_rows,
    "dropout": check_dropout,
    "life": check_life,
    "loaded": check_loaded,
    "models": check_models,
    "experts beside shards": check_experts_beside_shards,
    "from_pretrained": check_from_pretrained,
    "bad input": check_bad_input,
    "experts": check_experts,
}

if __name__ == "__main__":
    check_on_ranks(lambda case: CASES[case]())
