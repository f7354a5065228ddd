"""Losses on parts of the rows at a time: equal to whole logits, and never more than a part in memory."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nf4kernels as nf4
from nf4kernels.recover.distill import DistillLoss
from nf4kernels.recover.heads import HeadReader, find_head, summed_by_chunks
from nf4kernels.recover.losses import soft_labels, teacher_log_probs
from nf4kernels.recover.teacher import LiveTeacher

VOCABULARY = 512


class Sizes(TorchDispatchMode):
    """The most elements of a floating tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.most = max(self.most, each.numel())
        return out


class Capped(ByteLM):
    def forward(self, input_ids, attention_mask=None):
        return {"logits": torch.tanh(super().forward(input_ids)["logits"])}


def text(rows=3, length=40):
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :10] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole(student, teacher, batch, temperature, hard):
    """The same by whole logits in plain torch."""
    kept = batch["attention_mask"][:, 1:].bool()
    z, t = (m(batch["input_ids"])["logits"][:, :-1][kept] for m in (student, teacher))
    log_p, log_q = (x.div(temperature).log_softmax(-1) for x in (t.detach(), z))
    soft = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return soft + hard * nn.functional.cross_entropy(z, batch["labels"][:, 1:][kept])


@pytest.mark.parametrize("trained", ["hidden", "head", "all"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_equal_the_whole(trained, chunk):
    student, teacher = ByteLM(VOCABULARY, seed=1), ByteLM(VOCABULARY, width=32, seed=2)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained == "all" or ("lm_head" in name) == (trained == "head"))
    parameters = [each for each in student.parameters() if each.requires_grad]
    batch = text()
    expected = whole(student, teacher, batch, 2.0, 0.3)
    of_expected = torch.autograd.grad(expected, parameters)
    found = DistillLoss(temperature=2.0, hard=0.3, chunk=chunk)(student, teacher, batch)
    of_found = torch.autograd.grad(3 * found.loss, parameters)
    assert torch.allclose(found.loss, expected, rtol=1e-5)
    assert torch.allclose(found.terms["soft"] + 0.3 * found.terms["hard"], expected, rtol=1e-5)
    for ours, theirs in zip(of_found, of_expected):
        assert (ours - 3 * theirs).norm() <= 1e-5 * (3 * theirs).norm()


def test_the_largest_tensor_is_a_chunk_of_logits():
    student, teacher = ByteLM(VOCABULARY, 16, inner=16, seed=1), ByteLM(VOCABULARY, 16, inner=16, seed=2)
    batch, rows, chunk = text(4, 64), 4 * 63, 16
    with Sizes() as plain:
        whole(student, teacher, batch, 1.0, 0.0).backward()
    with Sizes() as chunked:
        DistillLoss(chunk=chunk)(student, teacher, batch).loss.backward()
    assert plain.most >= (rows - 40) * VOCABULARY
    assert chunked.most <= max(chunk * VOCABULARY, VOCABULARY * 16)


def test_a_head_in_4_bits_with_an_adapter():
    student, teacher = ByteLM(VOCABULARY, seed=1), ByteLM(VOCABULARY, seed=2)
    student.lm_head = nf4.QuantLinear.from_linear(student.lm_head, lora=nf4.LoraConfig(r=4))
    nn.init.normal_(student.lm_head.lora_B.weight)
    adapter = [student.lm_head.lora_A.weight, student.lm_head.lora_B.weight]
    batch = text()
    expected = torch.autograd.grad(whole(student, teacher, batch, 1.0, 0.0), adapter)
    found = torch.autograd.grad(DistillLoss(chunk=13)(student, teacher, batch).loss, adapter)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_without_gradients_the_values_are_the_same():
    student, teacher, batch = ByteLM(VOCABULARY, seed=1), ByteLM(VOCABULARY, seed=2), text()
    with torch.no_grad():
        found = DistillLoss(chunk=7)(student, teacher, batch)
    assert not found.loss.requires_grad
    assert torch.equal(found.loss, DistillLoss(chunk=7)(student, teacher, batch).loss)


def test_a_model_that_changes_its_heads_output_is_run_whole():
    model, batch = Capped(VOCABULARY), text()
    reader = HeadReader(model)
    assert reader.head is model.lm_head
    rows = reader.rows(batch)
    assert reader.head is None
    kept = batch["attention_mask"][:, 1:].bool()
    assert torch.equal(rows.logits(torch.arange(len(rows))), model(batch["input_ids"])["logits"][:, :-1][kept])
    with pytest.raises(ValueError, match="head must be the module whose output is the model's logits"):
        HeadReader(model, model.lm_head).rows(batch)


class Trained(ByteLM):
    """Its forward is under autocast as a trainer's is, and the loss after it is not."""

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*args, **kwargs)


def test_the_head_runs_under_the_autocast_of_its_model():
    model, batch = Trained(VOCABULARY), text()
    found = HeadReader(model).rows(batch)
    assert found.head is not None
    kept = batch["attention_mask"][:, 1:].bool()
    logits = found.logits(torch.arange(len(found)))
    assert torch.equal(logits, model(batch["input_ids"])["logits"][:, :-1][kept])
    DistillLoss()(model, LiveTeacher(model), batch).loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()


class Backwards(nn.Module):
    """Its last nn.Linear is its first layer."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(16, 4), nn.Linear(8, 16)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_linear_that_is_no_head_is_found_out():
    net, x = Backwards(), torch.randn(5, 8)
    reader = HeadReader(net)
    assert reader.head is net.first
    assert torch.equal(reader.rows(x).values, net(x))
    assert reader.head is None


def test_the_head_is_as_it_was():
    model, batch = ByteLM(VOCABULARY), text()
    before = model(batch["input_ids"])["logits"]
    HeadReader(model).rows(batch)
    assert "forward" not in vars(model.lm_head)
    model.lm_head.forward = mine = model.lm_head.forward  # as accelerate's hooks put one
    HeadReader(model).rows(batch)
    assert model.lm_head.forward is mine
    assert torch.equal(model(batch["input_ids"])["logits"], before)


def test_the_head_of_a_model_that_names_none_is_its_last_linear():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert find_head(net) is net[2]
    x = torch.randn(5, 8)
    rows = HeadReader(net).rows(x)
    assert rows.head is net[2]
    assert rows.values.shape == (5, 16)
    assert torch.equal(rows.logits(torch.arange(5)), net(x))
    assert HeadReader(nn.Sequential(nn.ReLU())).rows(x).head is None


def test_sums_are_those_of_the_rows_that_were_named():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), torch.randn(9, 8)
    log_p = teacher_log_probs(torch.randn(9, 4))
    which = torch.tensor([1, 4, 8])
    total, terms = summed_by_chunks(
        HeadReader(net).rows(x), lambda z, at: soft_labels(z, log_p[at])[None], which, chunk=2
    )
    expected = soft_labels(net(x)[which], log_p[which]).sum()
    assert torch.allclose(total, expected)
    assert torch.equal(total.detach(), terms.sum())
