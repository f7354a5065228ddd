"""distill: it closes the gap, resumes to the same bytes, and says what is wrong before anything changes."""

import math

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.recover import agreement
from nf4kernels.recover.distill import DistillLoss, Training, distill
from nf4kernels.recover.losses import Contrastive, Hint
from nf4kernels.recover.teacher import EarlierSelf


def texts(count=6, rows=4, length=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (rows, length), generator=draw)} for _ in range(count)]


def peaked(seed=1):
    model = ByteLM(seed=seed)
    with torch.no_grad():
        model.lm_head.weight *= 10
    return model


def student(seed=1):
    model = peaked(seed)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=8, alpha=16, dropout=0.1), progress=False)
    return nf4.prepare_for_training(model, checkpointing=False)


def trained(model):
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def test_it_closes_a_part_of_the_gap_on_other_text():
    torch.manual_seed(0)
    teacher, model = peaked(), student()
    held_out = texts(4, seed=9)
    before = agreement(model, teacher, held_out)
    seen = []
    log = distill(
        model, teacher, texts(16), Training(80, learning_rate=3e-3), callback=lambda step, found: seen.append(step)
    )
    after = agreement(model, teacher, held_out)
    assert after.kl < before.kl / 2
    assert seen == list(range(1, 81))
    assert len(log) == 80
    assert all(set(row) == {"loss", "soft"} for row in log)
    assert sum(row["loss"] for row in log[-8:]) < sum(row["loss"] for row in log[:8])


class StoppedError(Exception):
    pass


def stops_at(last):
    def callback(step, found):
        if step == last:
            raise StoppedError

    return callback


@pytest.mark.parametrize("last", [3, 7])
def test_stopped_and_gone_on_with_it_gives_the_same_bytes(tmp_path, last):
    training = Training(9, learning_rate=3e-3, accumulate=2, save_steps=2, seed=3)
    found = []
    for name in ("whole", "cut"):
        torch.manual_seed(0)
        model = student()
        loss = DistillLoss(
            hard=0.1, layers=[Hint("layers.0", "layers.0", (64, 64)), Contrastive("layers.1", "layers.1", (64, 64))]
        )
        state = tmp_path / name
        if name == "cut":
            begun, projections = trained(model), {key: each.clone() for key, each in loss.state_dict().items()}
            with pytest.raises(StoppedError):
                distill(model, peaked(2), texts(), training, loss, state=state, callback=stops_at(last))
            with torch.no_grad():  # what a new process has
                for key, each in model.named_parameters():
                    if key in begun:
                        each.copy_(begun[key])
            loss.load_state_dict(projections)
        log = distill(model, peaked(2), texts(), training, loss, state=state)
        assert not state.exists()
        found.append((log, trained(model), loss.state_dict()))
    (log, weights, projections), (log_cut, weights_cut, projections_cut) = found
    assert log == log_cut
    assert all(torch.equal(weights[name], weights_cut[name]) for name in weights)
    assert all(torch.equal(projections[name], projections_cut[name]) for name in projections)


def test_a_running_average_is_gone_on_with(tmp_path):
    training, kept = Training(6, learning_rate=3e-3, save_steps=2), []
    for name in ("whole", "cut"):
        torch.manual_seed(0)
        model = student()
        teacher = EarlierSelf(model, 0.5)
        loss = DistillLoss(hard=1.0)
        if name == "cut":
            with pytest.raises(StoppedError):
                distill(model, teacher, texts(), training, loss, state=tmp_path / name, callback=stops_at(3))
        distill(model, teacher, texts(), training, loss, state=tmp_path / name)
        kept.append(list(teacher.kept.values()))
    assert all(torch.equal(a, b) for a, b in zip(*kept))


def test_a_state_of_another_run_is_refused(tmp_path):
    torch.manual_seed(0)
    model, state = student(), tmp_path / "state"
    with pytest.raises(StoppedError):
        distill(model, peaked(2), texts(), Training(6, save_steps=2), state=state, callback=stops_at(3))
    before = trained(model)
    with pytest.raises(ValueError, match=r"state must be of this run, got .* whose learning_rate differ"):
        distill(model, peaked(2), texts(), Training(6, learning_rate=1.0, save_steps=2), state=state)
    with pytest.raises(ValueError, match="whose batches differ"):
        distill(model, peaked(2), texts(seed=5), Training(6, save_steps=2), state=state)
    with pytest.raises(ValueError, match="whose teacher differ"):
        distill(model, EarlierSelf(model), texts(), Training(6, save_steps=2), state=state)
    with pytest.raises(ValueError, match="whose loss differ"):
        distill(model, peaked(2), texts(), Training(6, save_steps=2), DistillLoss(temperature=2.0), state=state)
    assert all(torch.equal(before[name], each) for name, each in trained(model).items())


def test_accumulated_batches_are_one_batch():
    results = []
    for batches, accumulate in ((texts(2), 2), ([{"input_ids": torch.cat([b["input_ids"] for b in texts(2)])}], 1)):
        model = ByteLM(seed=1)
        distill(
            model, ByteLM(seed=2), batches, Training(1, 1e-2, warmup=0, accumulate=accumulate, clip=0, shuffle=False)
        )
        results.append(trained(model))
    for name, each in results[0].items():
        assert torch.allclose(each, results[1][name], atol=2e-4), name


def test_the_rate_of_each_step():
    training = Training(20, learning_rate=2.0, warmup=0.25)
    assert [training.rate(step) for step in range(5)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert training.rate(5) == pytest.approx(2.0)
    assert training.rate(19) == pytest.approx(1 + math.cos(math.pi * 14 / 15))
    linear = Training(10, learning_rate=1.0, warmup=0, schedule="linear")
    assert [linear.rate(step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert Training(10, 1.0, warmup=0, schedule="constant").rate(9) == 1.0


def test_everything_outside_is_as_it_was():
    model, teacher = student(), peaked(2)
    model.layers[0].eval()
    modes = [each.training for each in model.modules()]
    random = torch.get_rng_state()
    weights = {name: each.clone() for name, each in teacher.state_dict().items()}
    distill(model, teacher, texts(2), Training(2))
    assert modes == [each.training for each in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(weights[name], each) for name, each in teacher.state_dict().items())
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"accumulate": 0}, "accumulate must be 1 or more"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant, got 'step'"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_how_it_trains_is_checked(change, said):
    with pytest.raises(ValueError, match=said):
        Training(**{"steps": 1, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"soft": 0.0}, "weights must be 0 or more and one of them above 0"),
        ({"hard": -1.0}, "weights must be 0 or more"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"k": 0}, "k must be above 0, got 0"),
    ],
)
def test_a_loss_is_checked(change, said):
    with pytest.raises(ValueError, match=said):
        DistillLoss(**change)


def test_what_cannot_be_distilled():
    frozen, training = ByteLM().requires_grad_(False), Training(1)
    with pytest.raises(ValueError, match="model must have parameters that require a gradient"):
        distill(frozen, ByteLM(), texts(1), training)
    with pytest.raises(ValueError, match="batches must be one or more"):
        distill(ByteLM(), ByteLM(), [], training)
    with pytest.raises(ValueError, match="teacher must have the student's classes, got 32 beside 64"):
        distill(ByteLM(), ByteLM(32), [{"input_ids": torch.zeros(2, 4, dtype=torch.long)}], training)
    with pytest.raises(ValueError, match="batch must have labels"):
        distill(nn.Linear(4, 3), nn.Linear(4, 3), [torch.randn(2, 4)], training, DistillLoss(hard=1.0))
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="loss must be finite, got nan at step 1"):
        distill(model, nn.Linear(4, 3), [torch.full((2, 4), torch.nan)], training)
    assert model.weight.grad is None


def test_gradients_of_before_are_none_of_the_first_step():
    made = []
    for has_one in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        if has_one:
            model.weight.grad = torch.full((3, 4), 1e3)
        distill(model, nn.Linear(4, 3), [torch.randn(2, 4)], Training(1))
        made.append(model.weight.detach())
    assert torch.equal(*made)
