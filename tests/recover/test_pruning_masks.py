"""Zeros in weights: which ones by each score and pattern, dense and in 4 bits, and that they stay."""

import pytest
import torch
from support.byte_lm import ByteLM
from support.unchanged import assert_unchanged, snapshot
from torch import nn

import nf4kernels as nf4
from nf4kernels.codebook import CODEBOOKS
from nf4kernels.recover import apply_masks, find_masks, prune_model, share_of_zeros
from nf4kernels.recover.pruning import masks as masks_module
from nf4kernels.recover.pruning.masks import keep_by_layer, keep_by_model, keep_by_row, keep_n_of_m
from nf4kernels.recover.pruning.scores import gradient, input_norms

LAYERS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                                            "up_proj", "down_proj")]  # fmt: skip

WRITTEN = [name for name in CODEBOOKS if name not in ("iq4_nl", "q4_0")]  # by quantize; the two are only read


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers_of(model):
    return {name: model.get_submodule(name) for name in LAYERS}


def test_two_of_four_keeps_the_two_largest():
    scores = drawn(6, 32).abs()
    kept = keep_n_of_m(scores, 2, 4).reshape(-1, 4)
    assert kept.sum(1).eq(2).all()
    assert kept.scatter(1, scores.reshape(-1, 4).topk(2).indices, False).sum() == 0
    assert keep_n_of_m(torch.ones(1, 4), 1, 4).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("method", ["wanda", "gradient"])
def test_scores_that_are_not_finite_are_refused(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    batch = {"input": torch.full((2, 8), torch.inf), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="scores must be finite, got NaN or inf at 0"):
        find_masks(model, 0.5, method=method, batches=[batch])
    with torch.no_grad():
        model[1].weight[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="the weight of 1 must be finite"):
        find_masks(model, 0.5, method="magnitude")


def test_the_smallest_of_a_row_a_layer_and_a_model():
    first, second = drawn(4, 10).abs(), 3 * drawn(5, 8, seed=1).abs()
    assert keep_by_row(first, 0.3).sum(1).eq(7).all()
    assert (first * keep_by_row(first, 0.3)).sum().item() == pytest.approx(first.topk(7).values.sum().item())
    assert torch.equal(keep_by_layer(first, 0.25), first >= first.flatten().sort().values[10])
    found = dict(keep_by_model(lambda: iter({"a": first, "b": second}.items()), 0.4))
    limit = torch.cat([first.flatten(), second.flatten()]).sort().values[32]
    assert torch.equal(found["a"], first >= limit)
    assert torch.equal(found["b"], second >= limit)


def test_ties_are_cut_at_the_count_wherever_they_are_looked_for():
    same = {"a": torch.ones(3, 4), "b": torch.full((2, 4), -1.0), "c": torch.ones(2, 2)}
    found = dict(keep_by_model(lambda: iter(same.items()), 0.5))
    assert [int((~each).sum()) for each in found.values()] == [4, 8, 0]
    assert int(keep_by_layer(same["a"], 0.5).sum()) == 6
    assert all(each.all() for each in dict(keep_by_model(lambda: iter(same.items()), 0)).values())


def test_wanda_by_the_formula_on_what_the_layer_reads():
    model, ids = ByteLM(), text(2, 30)
    seen = []
    model.layers[1].up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 11:] = 0
    norms = input_norms(model, layers_of(model), [{"input_ids": ids, "attention_mask": mask}, ids])
    rows = torch.cat([seen[0][mask.bool()], seen[1].reshape(60, -1)])
    torch.testing.assert_close(norms["layers.1.up_proj"], rows.norm(dim=0), rtol=1e-5, atol=0)
    kept = find_masks(model, 0.5, method="wanda", batches=[ids], progress=False)["layers.1.up_proj"]
    scores = model.layers[1].up_proj.weight.detach().abs() * seen[1].reshape(60, -1).norm(dim=0)
    assert (scores * kept).sum().item() == pytest.approx(scores.topk(32).values.sum().item(), rel=1e-5)


def test_wanda_of_equal_activations_is_magnitude_by_row():
    model = nn.Sequential(nn.Linear(16, 8))
    by_wanda = find_masks(model, 0.5, method="wanda", batches=[torch.ones(5, 16)], progress=False)
    by_row = find_masks(model, 0.5, scope="row", progress=False)
    assert torch.equal(by_wanda["0"], by_row["0"])


def test_taylor_is_the_weight_times_autograds_gradient():
    model, batches = ByteLM(), [text(2, 20), text(3, 9, seed=1)]
    expected = dict.fromkeys(LAYERS, 0)
    for ids in batches:
        logits = model(ids)["logits"][:, :-1]
        loss = nn.functional.cross_entropy(logits.reshape(-1, 64), ids[:, 1:].reshape(-1))
        for name, layer in layers_of(model).items():
            expected[name] = expected[name] + (layer.weight * torch.autograd.grad(loss, layer.weight, retain_graph=True)
                                               [0]).abs()  # fmt: skip
    for memory in (1, 2**30):  # a layer at a time, and all
        for name, found in gradient(model, layers_of(model), lambda: batches, memory):
            torch.testing.assert_close(found, expected[name].detach(), rtol=1e-4, atol=1e-8)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_taylor_in_4_bits_is_that_of_the_decoded_weights():
    model, ids = ByteLM(), text(2, 20)
    nf4.quantize_model(model, progress=False)
    dense = ByteLM()
    for name in LAYERS:
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.float32)
    expected = dict(gradient(dense, layers_of(dense), lambda: [ids]))
    for name, found in gradient(model, layers_of(model), lambda: [ids]):
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-7)


def test_taylor_of_a_linear_loss_is_what_zeroing_a_weight_does():
    """Two classes whose logits are w x and 0: the first-order term, against the loss itself."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    batch = {"input": drawn(6, 4), "labels": torch.tensor([0, 1, 0, 0, 1, 1])}

    def loss():
        return nn.functional.cross_entropy(model[0](batch["input"]).double(), batch["labels"])

    (_, scores), = gradient(model, {"0": model[0]}, lambda: [batch])  # fmt: skip
    whole = loss()
    for index in ((0, 0), (0, 3), (1, 2)):
        kept = model[0].weight[index].item()
        with torch.no_grad():
            model[0].weight[index] = 0
            change = (loss() - whole).abs().item()
            model[0].weight[index] = kept
        assert scores[index].item() == pytest.approx(change, rel=2e-2)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "gradient"])
@pytest.mark.parametrize("in_4_bits", [False, True])
def test_a_second_call_changes_nothing(pattern, method, in_4_bits):
    model = ByteLM()
    if in_4_bits:
        nf4.quantize_model(model, progress=False)
    options = {"share": 0.5, "pattern": pattern, "method": method, "batches": [text(2, 30)], "progress": False}
    prune_model(model, **options)
    assert share_of_zeros(model, LAYERS) >= 0.5 - 1e-9
    before = snapshot(model)
    prune_model(model, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("scope", ["row", "layer", "model"])
def test_the_share_is_what_was_asked_for(scope):
    model = ByteLM()
    masks = prune_model(model, 0.25, scope=scope, progress=False)
    assert share_of_zeros(model, LAYERS) == pytest.approx(0.25, abs=1e-3)
    assert list(masks) == LAYERS
    assert not (model.lm_head.weight == 0).any(), "heads are left alone"
    by_layer = [share_of_zeros(model, [name]) for name in LAYERS]
    assert (max(by_layer) - min(by_layer) < 1e-3) == (scope != "model")


@pytest.mark.parametrize("codebook", WRITTEN)
@pytest.mark.parametrize("shape", [(6, 64), (5, 33), (4, 128)])
def test_zeros_survive_every_codebook_that_quantize_writes(codebook, shape):
    weight = drawn(*shape).bfloat16()
    mask = keep_by_row(weight.float().abs(), 0.5)
    qweight = nf4.quantize(weight * mask, codebook)
    assert (nf4.dequantize(qweight)[~mask] == 0).all()


@pytest.mark.parametrize("codebook", [*WRITTEN, "custom"])
@pytest.mark.parametrize("shape", [(6, 64), (5, 33)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_masked_codes_are_zero_and_the_others_as_before(codebook, shape, double_quant):
    levels = torch.linspace(-1, 1, 16).sort().values if codebook == "custom" else codebook
    if codebook == "custom":
        levels[7] = 0
    layer = nn.Linear(shape[1], shape[0], bias=False)
    model = nn.Sequential(nf4.QuantLinear.from_linear(layer, codebook=levels, double_quant=double_quant))
    before, mask = model[0].dequantize(torch.float32), drawn(*shape) > 0
    bytes_before = model[0].nbytes
    apply_masks(model, {"0": mask})
    assert torch.equal(model[0].dequantize(torch.float32), before * mask)
    assert model[0].nbytes == bytes_before
    model[0](torch.ones(1, shape[1]))  # the bytes are meant: no complaint about their checksum


def test_columns_that_act_order_permuted():
    qweight = nf4.quantize(drawn(4, 64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()
    permuted = nf4.QuantLinear.from_quantized(nf4.quantized_weight.replace(qweight, column_order=order))
    mask, before = drawn(4, 64, seed=1) > 0, permuted.dequantize(torch.float32)
    apply_masks(nn.Sequential(permuted), {"0": mask})
    assert torch.equal(permuted.dequantize(torch.float32), before * mask)


def test_a_codebook_without_a_zero_is_refused_before_anything_changes():
    levels = torch.linspace(-1, 1, 16)
    model = nn.Sequential(nf4.QuantLinear(64, 4), nf4.QuantLinear(64, 4, codebook=levels))
    before = snapshot(model)
    with pytest.raises(ValueError, match="find_masks: layer 1: a codebook must have a level that is exactly 0"):
        find_masks(model, 0.5)
    masks = {name: torch.zeros(4, 64, dtype=torch.bool) for name in ("0", "1")}
    with pytest.raises(ValueError, match="apply_masks: a codebook must have a level that is exactly 0"):
        apply_masks(model, masks)
    assert_unchanged(model, before)


def test_the_orders_of_pruning_and_rounding():
    """Rounded then masked, W's scales stay; pruned then rounded, a block's scale is that of what is left."""
    weight = torch.ones(1, 64) / 4
    weight[0, 0] = 1
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 0] = False
    layer = nf4.QuantLinear.from_linear(_with(weight), double_quant=False)
    apply_masks(nn.Sequential(layer), {"0": mask})
    pruned = nf4.QuantLinear.from_linear(_with(weight * mask), double_quant=False)
    assert (layer.absmax.item(), pruned.absmax.item()) == (1, 0.25)
    assert torch.equal(pruned.dequantize(torch.float32), weight * mask)
    assert layer.dequantize(torch.float32)[0, 1] == nf4.codebook.NF4[(nf4.codebook.NF4 - 0.25).abs().argmin()]


def _with(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


BAD = {
    "share": ({"share": 1.0}, "share must be in"),
    "no share": ({}, "share must be given"),
    "share of 2:4": ({"share": 0.25, "pattern": "2:4"}, "share must be 0.5 or None"),
    "pattern": ({"share": 0.5, "pattern": "4:2"}, "pattern must be"),
    "method": ({"share": 0.5, "method": "luck"}, "method must be one of"),
    "scope": ({"share": 0.5, "scope": "column"}, "scope must be one of"),
    "scope of 2:4": ({"pattern": "2:4", "scope": "row"}, "scope must be None"),
    "batches": ({"share": 0.5, "method": "wanda"}, "batches must be given"),
    "skip": ({"share": 0.5, "skip": ["nothing"]}, "skip must match"),
    "columns": ({"pattern": "2:5"}, "must be a multiple of 5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_change_nothing(kind):
    options, message = BAD[kind]
    model = ByteLM()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"nf4kernels.recover.prune_model: .*{message}"):
        prune_model(model, **options)
    assert_unchanged(model, before)


def test_a_classifier_without_labels_has_no_gradient():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="batches must have labels"):
        prune_model(model, 0.5, method="gradient", batches=[torch.ones(2, 8)], progress=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_masks_that_do_not_fit():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    before = snapshot(model)
    good = torch.zeros(4, 8, dtype=torch.bool)
    bad = [({"0": good, name: good}, "must name layers") for name in ("1", "x")]
    bad += [({"0": each}, r"must be bool \[4, 8\]") for each in (good[:2], good.float())]
    for masks, message in bad:
        with pytest.raises(ValueError, match=f"{masks_module.WHO}: .*{message}"):
            apply_masks(model, masks)
    assert_unchanged(model, before)


def test_gradient_over_the_whole_model_reads_an_iterator_once():
    model = ByteLM()
    masks = find_masks(model, 0.3, method="gradient", batches=iter([text(2, 20)]), scope="model", memory=1,
                       progress=False)  # fmt: skip
    pruned = sum(int((~each).sum()) for each in masks.values())
    assert pruned == round(0.3 * sum(each.numel() for each in masks.values()))


def test_codebooks_that_are_only_read():
    qweight = nf4.quantize(drawn(4, 64), "int4")
    of_q4_0 = nf4.quantized_weight.replace(qweight, code=CODEBOOKS["q4_0"], codebook="q4_0")
    assert masks_module.zero_code(of_q4_0) == 8
    with pytest.raises(ValueError, match="got iq4_nl whose nearest is 1"):
        masks_module.zero_code(nf4.quantized_weight.replace(qweight, code=CODEBOOKS["iq4_nl"], codebook="iq4_nl"))
