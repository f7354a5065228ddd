"""Each loss of distillation against plain torch formulas in fp64, and gradients against closed forms."""

import math

import pytest
import torch
from torch import nn

from nf4kernels.recover.losses import (
    Contrastive,
    Cosine,
    Hint,
    TopK,
    contrast,
    hard_labels,
    soft_labels,
    teacher_log_probs,
    top_k,
)

ROWS, CLASSES = 7, 33


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_labels_are_the_divergence_times_the_square_of_the_temperature(temperature):
    z, t = draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1)
    p, q = ((x.double() / temperature).softmax(-1) for x in (t, z))
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    found = soft_labels(z, teacher_log_probs(t, temperature), temperature)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_the_temperature_times_the_difference_of_the_distributions(temperature):
    z, t = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    soft_labels(z, teacher_log_probs(t, temperature), temperature).sum().backward()
    p, q = ((x.detach().double() / temperature).softmax(-1) for x in (t, z))
    assert torch.allclose(z.grad.double(), temperature * (q - p), atol=1e-6)


def test_at_a_high_temperature_the_gradient_is_that_of_the_squared_difference_of_logits():
    """Hinton et al., 2015, section 2.1: with T² it tends to (z - v) / classes, for logits of mean zero in each row."""
    z, t = (x - x.mean(-1, keepdim=True) for x in (draw(ROWS, CLASSES), draw(ROWS, CLASSES, seed=1)))
    z.requires_grad_()
    temperature = 3000.0
    soft_labels(z.double(), teacher_log_probs(t.double(), temperature), temperature).sum().backward()
    expected = (z.detach() - t) / CLASSES
    assert (z.grad - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_all_classes_is_the_full_divergence(temperature):
    z, t = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1)
    log_p = teacher_log_probs(t, temperature)
    full, kept = soft_labels(z, log_p, temperature), soft_labels(z, top_k(log_p, CLASSES), temperature)
    assert torch.allclose(full, kept, rtol=1e-5, atol=1e-6)
    (of_full,), (of_kept,) = (torch.autograd.grad(x.sum(), z) for x in (full, kept))
    assert torch.allclose(of_full, of_kept, atol=1e-5)


def test_top_k_is_the_divergence_of_k_classes_and_the_rest():
    z, t, k = draw(ROWS, CLASSES).requires_grad_(), draw(ROWS, CLASSES, seed=1), 5
    kept = top_k(teacher_log_probs(t), k)
    p, q = (x.double().softmax(-1).gather(-1, kept.indices) for x in (t, z))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    expected = (p * (p / q).log()).sum(-1)
    found = soft_labels(z, kept)
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), z) for x in (found, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (found <= soft_labels(z, teacher_log_probs(t)) + 1e-6).all()


def test_probability_outside_the_k_is_punished():
    """Renormalised over the k classes the two would be equal."""
    t = draw(1, CLASSES)
    outside = top_k(teacher_log_probs(t), 2).indices.squeeze(0)
    z = torch.full((1, CLASSES), 9.0)
    z[0, outside] = t[0, outside]
    assert soft_labels(z, top_k(teacher_log_probs(t), 2)).item() > 1


def test_classes_that_the_teacher_excludes():
    t, z = draw(2, CLASSES), draw(2, CLASSES, seed=1)
    t[:, :4] = -torch.inf
    z[0, :2] = -torch.inf
    z.requires_grad_()
    log_p = teacher_log_probs(t)
    p, log_q = log_p[:, 4:].double().exp(), z.detach().double().log_softmax(-1)[:, 4:]
    expected = (p * (p.log() - log_q)).sum(-1)
    for teacher in (log_p, top_k(log_p, CLASSES), top_k(log_p, CLASSES - 4)):
        found = soft_labels(z, teacher)
        assert torch.allclose(found.double(), expected, rtol=1e-5)
        (grad,) = torch.autograd.grad(found.sum(), z)
        assert grad.isfinite().all()


@pytest.mark.parametrize("k", [0, CLASSES + 1])
def test_k_must_be_of_the_classes(k):
    with pytest.raises(ValueError, match=f"k must be from 1 to the {CLASSES} classes, got {k}"):
        top_k(draw(2, CLASSES), k)


def test_hard_labels_ignore_what_has_none():
    z, y = draw(ROWS, CLASSES), torch.tensor([3, -100, 0, 5, -100, 32, 1])
    found = hard_labels(z, y)
    log_q = z.double().log_softmax(-1)
    for row, target in enumerate(y.tolist()):
        assert math.isclose(found[row].item(), 0 if target == -100 else -log_q[row, target].item(), rel_tol=1e-5)


def test_cosine_of_rows():
    s, t = draw(ROWS, 12).double(), draw(ROWS, 12, seed=1).double()
    expected = (1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean()
    assert math.isclose(Cosine("a", "b")(s, t).item(), expected.item(), rel_tol=1e-5)
    assert Cosine("a", "b")(s, 2.5 * s).item() < 1e-6


def test_a_hint_goes_through_its_projection():
    hint = Hint("a", "b", (12, 5))
    s, t = draw(ROWS, 12), draw(ROWS, 5, seed=1)
    found = hint(s, t)
    expected = ((s @ hint.project.weight.T + hint.project.bias - t) ** 2).mean()
    assert torch.allclose(found, expected, rtol=1e-5)
    found.backward()
    assert hint.project.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_hint_between_layers_of_one_width_begins_as_their_distance(bias):
    s, t = draw(ROWS, 12), draw(ROWS, 12, seed=1)
    hint = Hint("a", "b", (12, 12), bias=bias)
    assert torch.allclose(hint(s, t), ((s - t) ** 2).mean(), rtol=1e-5)
    assert hint(t, t) == 0


def test_a_contrast_is_the_cross_entropy_of_similarities():
    s, t = draw(ROWS, 6), draw(ROWS, 6, seed=1)
    near = torch.tensor([[torch.cosine_similarity(a, b, dim=0) / 0.1 for b in t] for a in s]).double()
    expected = near.logsumexp(-1) - near.diag()
    assert torch.allclose(contrast(s, t, 0.1).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_contrastive_term_projects_both_and_takes_every_nth_row():
    term = Contrastive("a", "b", (6, 9), width=4, limit=4)
    s, t = draw(ROWS, 6), draw(ROWS, 9, seed=1)
    ours, theirs = term.project
    assert torch.allclose(term(s, t), contrast(ours(s[::2]), theirs(t[::2]), 0.1).mean())
    term(s, t).backward()
    assert all(each.weight.grad.abs().sum() > 0 for each in term.project)


def test_a_student_that_learns_the_contrast_finds_its_own_row():
    torch.manual_seed(0)
    s, t = draw(64, 8), draw(64, 24, seed=1)
    net = nn.Linear(8, 16)
    term = Contrastive("a", "b", (16, 24), width=16)
    optimizer = torch.optim.Adam([*net.parameters(), *term.parameters()], lr=1e-2)
    first = term(net(s), t).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = term(net(s), t)
        loss.backward()
        optimizer.step()
    assert first > math.log(64) * 0.8
    assert loss.item() < math.log(64) / 2, "half of what not knowing costs"


def test_a_top_k_of_fp16_is_near():
    z, log_p = draw(ROWS, CLASSES), teacher_log_probs(draw(ROWS, CLASSES, seed=1))
    kept = top_k(log_p, 8)
    half = TopK(kept.indices.int(), kept.log_probs.half(), kept.log_rest)
    assert torch.allclose(soft_labels(z, kept), soft_labels(z, half), rtol=1e-3)
