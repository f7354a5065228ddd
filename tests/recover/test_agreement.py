"""agreement: loss, KL divergence and top-1 of one model beside another, against torch on the whole logits."""

import pytest
import torch
from support.byte_lm import ByteLM
from torch import nn
from torch.nn import functional

from nf4kernels.recover import agreement
from nf4kernels.recover.batches import counted_rows, logits_in, run, targets


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_causal_model_against_the_whole_logits(is_padded):
    model, reference = ByteLM(seed=1), ByteLM(seed=2)
    mask = torch.ones(3, 100, dtype=torch.long)
    if is_padded:
        mask[1, 40:] = 0
    batch = {"input_ids": text(3, 100), "attention_mask": mask}
    q, p = (m(**batch)["logits"][:, :-1][mask[:, 1:].bool()].double().log_softmax(-1) for m in (model, reference))
    wanted = batch["input_ids"][:, 1:][mask[:, 1:].bool()]
    found = agreement(model, reference, [batch])
    assert found.rows == len(wanted) == int(mask[:, 1:].sum())
    assert found.loss == pytest.approx(functional.nll_loss(q, wanted).item(), rel=1e-5)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1 == (q.argmax(-1) == p.argmax(-1)).double().mean().item()


def test_a_model_agrees_with_itself():
    model = ByteLM(seed=1)
    found = agreement(model, model, [text(2, 20), text(1, 7, seed=1)])
    assert (found.rows, found.kl, found.top1) == (44, 0, 1)


def test_a_classifier_with_labels_of_which_one_is_ignored():
    model, reference = nn.Linear(8, 5), nn.Linear(8, 5)
    x, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, -100, 4, 3])

    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixels):
            return (self.inner(pixels),)

    found = agreement(Named(model), Named(reference), [{"pixels": x, "labels": labels}])
    assert found.rows == 6
    assert found.loss == pytest.approx(functional.cross_entropy(model(x), labels).item(), rel=1e-5)


def test_modes_come_back_and_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5))
    model[1].eval()
    found = agreement(model, model, [torch.ones(4, 8)])
    assert found.kl == 0
    assert [m.training for m in model.modules()] == [True, True, False]


def test_other_classes_and_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"must predict the model's classes, got logits \[4, 6\] beside \[4, 5\]"):
        agreement(nn.Linear(8, 5), nn.Linear(8, 6), [torch.ones(4, 8)])
    with pytest.raises(ValueError, match="must have rows that count, got none"):
        agreement(nn.Linear(8, 5), nn.Linear(8, 5), [torch.ones(0, 8)])


def test_labels_of_a_causal_model_are_shifted():
    batch = {"input_ids": text(2, 9)}
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    logits = logits_in(run(ByteLM(), batch))
    assert counted_rows(logits, batch).shape == (16, 64)
    found = targets(logits, batch | {"labels": labels}).view(2, 8)
    assert torch.equal(found, labels[:, 1:])
