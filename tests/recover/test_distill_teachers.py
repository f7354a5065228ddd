"""Teachers: one, several, the student's earlier self, and what is kept on disk, each against the live one."""

import pytest
import torch
from safetensors import safe_open
from support.byte_lm import ByteLM
from torch import nn

import nf4kernels as nf4
from nf4kernels.recover import teacher_cache
from nf4kernels.recover.distill import DistillLoss, Training, distill
from nf4kernels.recover.losses import Cosine, Hint, TopK
from nf4kernels.recover.sampling import sample_text
from nf4kernels.recover.teacher import EarlierSelf, LiveTeacher
from nf4kernels.recover.teacher_cache import CachedTeacher, cache_teacher

ROWS = torch.tensor([0, 3, 5])


def texts(count=3, rows=4, length=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (rows, length), generator=draw)} for _ in range(count)]


def adapted(seed=1):
    model = ByteLM(seed=seed)
    nf4.quantize_model(model, lora=nf4.LoraConfig(r=2), progress=False)
    return nf4.prepare_for_training(model, checkpointing=False)


def counting(model):
    """The model, and a list that grows with each of its calls."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return model, calls


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ((3, 1), (0.75, 0.25))])
def test_several_teachers_say_the_average_of_their_probabilities(weights, shares):
    models, batch = [ByteLM(seed=1), ByteLM(width=32, seed=2)], texts(1)[0]
    found = LiveTeacher(*models, weights=weights).answer(batch).target(ROWS, 2.0, None)
    with torch.no_grad():
        own = [(m(**batch)["logits"][:, :-1].reshape(-1, 64)[ROWS] / 2).softmax(-1) for m in models]
    assert torch.allclose(found.exp(), shares[0] * own[0] + shares[1] * own[1], atol=1e-6)


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, float("nan"))])
def test_weights_must_be_one_positive_number_each(weights):
    with pytest.raises(ValueError, match="weights must be a positive number for each of 2 models"):
        LiveTeacher(ByteLM(), ByteLM(), weights=weights)


def test_the_student_without_its_adapters_teaches():
    model, batch = adapted(), texts(1)[0]
    for layer in model.modules():
        if isinstance(layer, nf4.QuantLinear):
            nn.init.normal_(layer.lora_B.weight, std=0.1)
    teacher = LiveTeacher(model, within=lambda: nf4.disable_adapters(model))
    with nf4.disable_adapters(model), torch.no_grad():
        expected = model(**batch)["logits"][:, :-1].reshape(-1, 64)[ROWS].log_softmax(-1)
    assert torch.allclose(teacher.answer(batch).target(ROWS, 1.0, None), expected, atol=1e-6)
    assert DistillLoss()(model, teacher, batch).loss > 1e-4


def test_an_earlier_self_is_what_the_student_was():
    model, batches = adapted(), texts()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    fixed, average = EarlierSelf(model), EarlierSelf(model, decay=0.75)
    assert sum(each.numel() for each in fixed.kept.values()) == sum(
        each.numel() for each in model.parameters() if each.requires_grad
    )
    with torch.no_grad():
        said = model(**batches[0])["logits"][:, :-1].reshape(-1, 64)[ROWS].log_softmax(-1)
    distill(model, average, batches, Training(3, learning_rate=1e-2), DistillLoss(soft=1.0, hard=1.0))
    after = {name: each.clone() for name, each in model.state_dict().items()}
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert torch.allclose(fixed.answer(batches[0]).target(ROWS, 1.0, None), said, atol=1e-6)
    assert all(torch.equal(each, after[name]) for name, each in model.state_dict().items()), "it is put back"
    moved = list(average.kept.values())
    assert any(not torch.equal(a, b) for a, b in zip(moved, fixed.kept.values()))
    parameter, kept = next(iter(average.kept.items()))
    average.after_step()
    average.decay = 0.0
    average.after_step()
    assert torch.equal(kept, parameter)


def test_an_average_follows_its_formula():
    net = nn.Linear(2, 2)
    teacher, w0 = EarlierSelf(net, decay=0.75), net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    teacher.after_step()
    assert torch.allclose(teacher.kept[net.weight], 0.75 * w0 + 0.25 * (w0 + 1))


def test_a_cached_teacher_says_what_the_live_one_says(tmp_path):
    teacher, student, batches = ByteLM(seed=1), ByteLM(seed=2), texts()
    cached = cache_teacher(teacher, batches, tmp_path, k=64, dtype=torch.float32)
    half = cache_teacher(teacher, batches, tmp_path / "half", k=16)
    assert len(cached) == 12
    for batch in batches:
        live, kept = (DistillLoss()(student, each, batch).loss for each in (teacher, cached))
        assert torch.allclose(live, kept, rtol=1e-6)
        live, kept = (DistillLoss(k=16)(student, each, batch).loss for each in (teacher, half))
        assert torch.allclose(live, kept, rtol=1e-3)
        live, kept = (DistillLoss(k=4)(student, each, batch).loss for each in (teacher, cached))
        assert torch.allclose(live, kept, rtol=1e-5)


def test_examples_are_found_in_any_batch_and_however_they_are_padded(tmp_path):
    teacher = ByteLM(seed=1)
    ids, mask = texts(1, 5)[0]["input_ids"], torch.ones(5, 12, dtype=torch.long)
    mask[1, 7:], mask[3, 9:] = 0, 0
    cached = cache_teacher(teacher, [{"input_ids": ids, "attention_mask": mask}], tmp_path, dtype=torch.float32)
    other = {
        "input_ids": torch.cat([ids[[3, 1]], torch.zeros(2, 4, dtype=torch.long)], 1),
        "attention_mask": torch.cat([mask[[3, 1]], torch.zeros(2, 4, dtype=torch.long)], 1),
        "labels": torch.full((2, 16), -100),
    }
    live, kept = (each.answer(other) for each in (LiveTeacher(teacher), cached))
    rows = torch.arange(8 + 6)
    assert len(live) == len(kept) == len(rows)
    found, expected = kept.target(rows, 1.0, None), live.target(rows, 1.0, 64)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
    assert torch.equal(found.indices.long(), expected.indices)


def test_a_cache_is_gone_on_with(tmp_path, monkeypatch):
    teacher, calls = counting(ByteLM(seed=1))
    batches, save, files = texts(4), teacher_cache.save_file, []

    def dies(tensors, path, note):
        if len(files) == 2:
            raise KeyboardInterrupt
        files.append(path)
        save(tensors, path, note)

    monkeypatch.setattr(teacher_cache, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, batches, tmp_path / "cut")
    monkeypatch.undo()
    assert len(CachedTeacher(tmp_path / "cut")) == 8
    calls.clear()
    cache_teacher(teacher, batches, tmp_path / "cut")
    assert len(calls) == 3, "the first batch, which says how large all is, and the two that were left"
    cache_teacher(teacher, batches, tmp_path / "whole")
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_cache_is_of_one_teacher_and_has_a_size(tmp_path):
    batches = texts()
    cached = cache_teacher(ByteLM(seed=1), batches, tmp_path, k=8)
    rows = 3 * 4 * 11
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as stored:
        assert stored.get_tensor("log_probs").shape == (44, 8)
    assert rows * (8 * 6 + 4) < cached.nbytes < rows * (8 * 6 + 4) + 3 * 1500
    for change, name in (({"k": 4}, "k"), ({"temperature": 2.0}, "temperature"), ({"dtype": torch.float32}, "dtype")):
        with pytest.raises(ValueError, match=f"whose {name} is"):
            cache_teacher(ByteLM(seed=1), batches, tmp_path, **{"k": 8, **change})
    with pytest.raises(ValueError, match="whose identity is"):
        cache_teacher(ByteLM(seed=2), batches, tmp_path, k=8)
    with pytest.raises(ValueError, match=f"limit must be at least the {rows * 52} bytes"):
        cache_teacher(ByteLM(seed=1), batches, tmp_path / "other", k=8, limit=rows * 52 - 1)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="identity must be given for a EarlierSelf"):
        cache_teacher(EarlierSelf(ByteLM(seed=1)), batches, tmp_path / "other")


@pytest.mark.parametrize(
    ("loss", "batch", "said"),
    [
        (DistillLoss(k=9), texts(1)[0], "k must be at most the stored 8, got 9"),
        (DistillLoss(temperature=2.0), texts(1)[0], "temperature must be the stored 1.0, got 2.0"),
        (DistillLoss(), texts(1, seed=7)[0], "batch must be of examples that the teacher was asked, got another at 0"),
        (DistillLoss(layers=[Cosine("layers.0", "layers.0")]), texts(1)[0], "hidden states are not kept"),
    ],
)
def test_what_a_cache_has_not_is_said(tmp_path, loss, batch, said):
    cached = cache_teacher(ByteLM(seed=1), texts(), tmp_path, k=8)
    with pytest.raises(ValueError, match=said):
        loss(ByteLM(seed=2), cached, batch)


def test_images_are_cached_too(tmp_path):
    teacher, student = (nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)) for width in (32, 4))
    batches = [{"input": x, "labels": torch.zeros(6, dtype=torch.long)} for x in torch.randn(3, 6, 8)]
    cached = cache_teacher(teacher, batches, tmp_path, k=4, dtype=torch.float32)
    shuffled = {"input": torch.cat([batches[2]["input"][:2], batches[0]["input"][3:]])}
    live, kept = (DistillLoss(temperature=1.0)(student, each, shuffled).loss for each in (teacher, cached))
    assert torch.allclose(live, kept, rtol=1e-5)


def test_hidden_states_of_the_text_alone():
    student, teacher = ByteLM(seed=1), ByteLM(width=32, seed=2)
    batch = texts(1)[0]
    batch["attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    batch["attention_mask"][2, 5:] = 0
    kept, states = batch["attention_mask"].bool(), []
    for model, layer in ((student, student.layers[0]), (teacher, teacher.layers[1])):
        handle = layer.register_forward_hook(lambda module, inputs, output: states.append(output[kept]))
        model(batch["input_ids"])
        handle.remove()
    hint = Hint("layers.0", "layers.1", (64, 32), weight=0.5)
    found = DistillLoss(layers=[hint])(student, teacher, batch)
    expected = ((hint.project(states[0]) - states[1]) ** 2).mean()
    assert torch.allclose(found.terms["hint"], expected, rtol=1e-5)
    assert torch.allclose(found.loss, found.terms["soft"] + 0.5 * expected, rtol=1e-5)
    found.loss.backward()
    assert hint.project.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in teacher.parameters())


def test_hidden_states_are_compared_in_fp32_under_autocast():
    hint = Hint("layers.0", "layers.0", (64, 64))
    inputs = []
    hint.project.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        found = DistillLoss(soft=0, layers=[hint])(ByteLM(seed=1), ByteLM(seed=2), texts(1)[0])
    ((own, projected),) = inputs
    assert projected.dtype == torch.float32
    assert torch.equal(projected, hint.project(own))
    assert found.loss.dtype == torch.float32


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="layer must name one module of the ByteLM, got 'q_proj' which is"):
        DistillLoss(layers=[Cosine("q_proj", "layers.0")])(ByteLM(), ByteLM(), texts(1)[0])


def test_sampled_text_is_the_models_own():
    model = ByteLM(seed=1)
    with torch.no_grad():
        model.lm_head.weight *= 20  # far from uniform
    prompts = torch.randint(0, 64, (5, 2), generator=torch.Generator().manual_seed(0))
    text = sample_text(model, prompts, 9, greedy=3, batch=2)
    assert text.shape == (5, 9)
    assert torch.equal(text[:, :2], prompts)
    with torch.no_grad():
        likeliest = model(text)["logits"].argmax(-1)
    assert torch.equal(text[:, 2:5], likeliest[:, 1:4])
    assert torch.equal(text, sample_text(model, prompts, 9, greedy=3, batch=2))
    assert not torch.equal(text, sample_text(model, prompts, 9, greedy=3, batch=2, seed=1))
    assert torch.equal(sample_text(model, prompts, 9, 1e-4), sample_text(model, prompts, 9, greedy=7))


def test_drawn_tokens_have_the_models_frequencies():
    model = nn.Embedding(8, 8)  # logits of the last token alone
    p = (model.weight[3] / 2).softmax(-1).detach()
    text = sample_text(model, torch.full((4000, 1), 3), 2, 2.0, batch=4000)
    found = torch.bincount(text[:, 1], minlength=8) / 4000
    assert (found - p).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_k_is_a_tuple_of_what_is_kept(tmp_path):
    cached = cache_teacher(ByteLM(seed=1), texts(), tmp_path, k=8)
    kept = cached.answer(texts(1)[0]).target(ROWS, 1.0, 3)
    assert isinstance(kept, TopK)
    total = kept.log_probs.float().exp().sum(-1) + kept.log_rest.exp()
    assert torch.allclose(total, torch.ones(3), atol=2e-3)
