"""make_plan against brute force, what a plan makes of a model, and its files."""

import itertools
import math

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

from nf4kernels import LoraConfig, QuantLinear, load_checkpoint, quantize_model, save_checkpoint
from nf4kernels.recover import Candidate, Dropped, Option, Plan, Sensitivities, apply_plan, make_plan

WIDE = Candidate({"codebook": "nf4", "block_size": 4096})
FINE = Candidate({"codebook": "nf4", "block_size": 32})
INT4 = Candidate({"codebook": "int4", "double_quant": False})
DENSE, DROPPED = Candidate(), Candidate(dropped=True)


def random_problem(seed: int, layers: int = 5, drops: bool = True) -> Sensitivities:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    options = []
    for layer in range(layers):
        for candidate in (WIDE, FINE, INT4, DENSE):
            options.append(Option((f"l{layer}",), candidate, number(50, 1000), number(1, 10**6) / 1e7))
    if drops:
        options.append(Option(("l0", "l1"), DROPPED, 0, number(1, 10**6) / 5e6))
        options.append(Option(("l1", "l2"), FINE, number(50, 1000), number(1, 10**6) / 5e6))
    return Sensitivities(layers * 1000, 1, "measured", tuple(options))


def by_brute_force(found: Sensitivities, budget: int) -> float:
    """The least sum over every set of options that has each layer once."""
    names = sorted({name for option in found.options for name in option.layers})
    best = math.inf

    def place(missing: frozenset, size: int, cost: float) -> None:
        nonlocal best
        if size > budget or cost >= best:
            return
        if not missing:
            best = cost
            return
        first = min(missing)
        for option in found.options:
            if first in option.layers and set(option.layers) <= missing:
                place(missing - set(option.layers), size + option.nbytes, cost + option.kl)

    place(frozenset(names), 0, 0.0)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_that_of_brute_force(seed):
    found = random_problem(seed, drops=seed % 2 == 0)
    feasible = 0
    for budget in range(200, 4000, 350):
        best = by_brute_force(found, budget)
        if math.isinf(best):
            with pytest.raises(ValueError, match=r"the budget must be at least \d+ bytes"):
                make_plan(found, nbytes=budget)
            continue
        feasible += 1
        plan = make_plan(found, nbytes=budget)
        assert plan.kl == pytest.approx(best, rel=1e-12)
        assert plan.nbytes <= budget
        assert list(plan) == [f"l{i}" for i in range(5)]
    assert feasible >= 5


@pytest.mark.parametrize("seed", range(3))
def test_a_limit_of_seconds_is_kept_at_the_optimum(seed):
    found = random_problem(seed, layers=4, drops=False)
    draw = torch.Generator().manual_seed(seed)
    seconds = {option: float(torch.rand((), generator=draw)) for option in found.options}
    of_layer = [[o for o in found.options if o.layers == (f"l{i}",)] for i in range(4)]
    every = list(itertools.product(*of_layer))
    for most in (1.0, 1.6, 2.5):
        within = [c for c in every if sum(o.nbytes for o in c) <= 2500 and sum(map(seconds.get, c)) <= most]
        if not within:
            with pytest.raises(ValueError, match="most_seconds must be at least"):
                make_plan(found, nbytes=2500, seconds=seconds, most_seconds=most)
            continue
        plan = make_plan(found, nbytes=2500, seconds=seconds, most_seconds=most)
        assert plan.kl == pytest.approx(min(sum(o.kl for o in c) for c in within), rel=1e-12)
    assert within


def test_the_least_budget_that_an_error_names_is_enough_and_one_byte_less_is_not():
    found = random_problem(3)
    with pytest.raises(ValueError, match="must be at least") as raised:
        make_plan(found, bits=0.001)
    least = int(str(raised.value).split("at least ")[1].split(" bytes")[0])
    assert make_plan(found, nbytes=least).nbytes == least
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        make_plan(found, nbytes=least - 1)


def test_bits_are_of_the_weights_that_the_layers_hold():
    found = random_problem(4)
    plan = make_plan(found, bits=4.0)
    assert plan == make_plan(found, nbytes=2500)
    assert plan.bits == 8 * plan.nbytes / 5000


def test_a_layer_that_diverges_is_left_out_and_one_that_is_unknown_refused():
    options = (Option(("a",), WIDE, 10, math.inf), Option(("a",), FINE, 20, 0.1))
    assert make_plan(Sensitivities(40, 1, "measured", options), nbytes=30).layers == {"a": FINE}
    unknown = Sensitivities(40, 1, "measured", (Option(("a",), WIDE, 10), *options))
    with pytest.raises(ValueError, match="must have every KL"):
        make_plan(unknown, nbytes=30)
    for wrong in ({}, {"bits": 4.0, "nbytes": 3}):
        with pytest.raises(ValueError, match="bits or nbytes must be given"):
            make_plan(unknown, **wrong)


PLANNED = {
    "layers.0.q_proj": Candidate({"codebook": "fp4", "block_size": 32}),
    "layers.0.k_proj": INT4,
    "layers.0.v_proj": Candidate({"codebook": "nf4", "lora": LoraConfig(r=4, init="loftq")}),
    "layers.0.o_proj": DENSE,
    "layers.0.up_proj": Candidate({"codebook": torch.linspace(-1, 1, 16)}),
    "layers.0.down_proj": WIDE,
}


def plan_with(**others) -> Plan:
    layers = PLANNED | {f"layers.1.{name}": candidate for name, candidate in others.items()}
    return Plan(layers, 1000, 5000, 0.5)


def test_a_plan_is_a_mapping_that_quantize_model_takes(tmp_path):
    plan, model = plan_with(), ByteLM()
    report = quantize_model(model, plan=plan, progress=False)
    block = model.layers[0]
    assert (block.q_proj.codebook, block.q_proj.block_size) == ("fp4", 32)
    assert (block.k_proj.codebook, block.k_proj.scales) == ("int4", "float32")
    assert block.v_proj.lora == LoraConfig(r=4, init="loftq")
    assert type(block.o_proj) is nn.Linear
    assert (block.up_proj.codebook, block.down_proj.block_size) == ("custom", 4096)
    assert model.layers[1].q_proj.codebook == "nf4"
    assert [entry.name for entry in report.skipped if "plan" in entry.reason] == ["layers.0.o_proj"]

    ids = torch.randint(0, 64, (2, 9))
    save_checkpoint(model, tmp_path / "mixed.safetensors")
    loaded = ByteLM(seed=1)
    load_checkpoint(loaded, tmp_path / "mixed.safetensors")
    assert torch.equal(loaded(ids)["logits"], model(ids)["logits"])
    assert loaded.layers[0].up_proj.codebook == "custom"


def test_bytes_are_those_of_the_layers():
    model = ByteLM()
    for name, candidate in PLANNED.items():
        dense = model.get_submodule(name)
        before = candidate.nbytes(dense)
        made = candidate.layer(dense)
        held = made.weight.nbytes if type(made) is nn.Linear else made.qweight.nbytes
        adapters = [getattr(made, factor, None) for factor in ("lora_A", "lora_B")]
        assert before == held + sum(each.weight.nbytes for each in adapters if each is not None), name
    low = Candidate({"codebook": "nf4"}, rank=8)
    assert low.nbytes(dense) == sum(layer.qweight.nbytes for layer in low.layer(dense))
    assert DROPPED.nbytes(dense) == 0
    assert DENSE.nbytes(dense, torch.bfloat16) == 2 * dense.weight.numel()


def test_what_quantize_model_cannot_make_it_refuses_and_apply_plan_makes(tmp_path):
    low = Candidate({"codebook": "nf4"}, rank=8)
    dropped = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), DROPPED)
    plan = plan_with(q_proj=low, k_proj=Candidate(rank=8), **dropped)
    assert not plan.is_plain
    model = ByteLM()
    for name in ("q_proj", "up_proj"):
        alone = Plan({f"layers.1.{name}": plan.layers[f"layers.1.{name}"]}, 0, 1, 0.0)
        with pytest.raises(TypeError, match=f"layers.1.{name}"):
            quantize_model(model, plan=alone, progress=False)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())

    apply_plan(model, plan, progress=False)
    block = model.layers[1]
    assert [type(each) for each in block.q_proj] == [QuantLinear, QuantLinear]
    assert [type(each) for each in block.k_proj] == [nn.Linear, nn.Linear]
    assert isinstance(block.up_proj, Dropped)
    assert not list(block.down_proj.parameters())
    x = torch.randn(2, 3, 64)
    assert not block.down_proj(torch.randn(2, 3, 128)).any()

    save_checkpoint(model, tmp_path / "shrunk.safetensors")
    with torch.device("meta"):
        loaded = ByteLM()
    apply_plan(loaded, plan, progress=False)
    load_checkpoint(loaded, tmp_path / "shrunk.safetensors")
    assert torch.equal(loaded.layers[1](x), block(x))


def test_names_that_the_model_lacks_change_nothing():
    model = ByteLM()
    with pytest.raises(ValueError, match=r"plan must name layers of the model, got 'layers\.7\.q_proj'"):
        apply_plan(model, Plan({"layers.0.q_proj": DROPPED, "layers.7.q_proj": DENSE}, 0, 1, 0.0))
    assert type(model.layers[0].q_proj) is nn.Linear


def test_a_file(tmp_path):
    plan = plan_with(q_proj=Candidate({"codebook": "nf4", "compute_dtype": torch.bfloat16}, rank=3), k_proj=DROPPED)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    for content in ("{}", "[]", '{"version": 2}', "no", '{"version": 1, "layers": 3}'):
        (tmp_path / "other.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="must hold a plan, version 1"):
            Plan.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="must be a file that can be read"):
        Plan.load(tmp_path / "none.json")


def test_a_low_rank_is_the_best_one():
    dense = nn.Linear(24, 16)
    x = torch.randn(5, 24)
    made = Candidate(rank=4).layer(dense)
    U, S, Vh = torch.linalg.svd(dense.weight.double())
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    assert torch.allclose(made(x).double(), x.double() @ best.T + dense.bias.double(), atol=1e-5)
    whole = Candidate(rank=99).layer(dense)
    assert whole[0].out_features == 16
    assert torch.allclose(whole(x), dense(x), atol=1e-5)


def test_candidates_are_told_apart_and_wrong_ones_refused():
    every = [WIDE, FINE, INT4, DENSE, DROPPED, Candidate(rank=2), Candidate({"codebook": "nf4"}, rank=2)]
    assert all((a == b) == (a is b) for a, b in itertools.product(every, every))
    assert len({each.name for each in every}) == len(every) == len(set(every))
    for wrong in ({"rank": 0}, {"dropped": True, "rank": 3}, {"options": {"codebook": "nf5"}}):
        with pytest.raises(ValueError, match="must"):
            Candidate(**wrong)
    with pytest.raises(TypeError):
        Candidate({"codebok": "nf4"})
