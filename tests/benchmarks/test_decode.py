"""The decode benchmark: what its sides are, and what it times and checks."""

from types import SimpleNamespace

import pytest
import torch
from support import tiny

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the benchmarks have no peer")

import bitsandbytes as bnb

from benchmarks.harness import BNB, DENSE, OURS
from benchmarks.model import bench_decode
from benchmarks.model.bench_decode import HEAD, NEW, PROMPT, Decoder
from nf4kernels import QuantLinear


@pytest.mark.parametrize(
    ("side", "inner", "head"),
    [
        (OURS, QuantLinear, torch.nn.Linear),
        (HEAD, QuantLinear, QuantLinear),
        (BNB, bnb.nn.LinearNF4, torch.nn.Linear),
        (DENSE, torch.nn.Linear, torch.nn.Linear),
    ],
)
def test_sides(side, inner, head):
    model = bench_decode.as_side(side, tiny.llama(torch.bfloat16, tie_word_embeddings=True))
    assert type(model.model.layers[0].mlp.up_proj) is inner
    assert type(model.lm_head) is head
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not model.training
    assert model(input_ids=tiny.IDS).logits.isfinite().all()


class Counts:
    """A model that expects token t + 1 after t, its cache all that it has read."""

    config, vocabulary = None, 100

    def __init__(self) -> None:
        self.lengths, self.strides = [], set()

    def forward(self, input_ids, use_cache, past_key_values):
        read = [] if past_key_values is None else past_key_values
        read = [*read, *input_ids[0].tolist()]
        self.lengths.append(input_ids.shape[1])
        self.strides |= {input_ids.stride()} if input_ids.shape[1] == 1 else set()
        logits = 20.0 * torch.nn.functional.one_hot((input_ids + 1) % self.vocabulary, self.vocabulary)
        return SimpleNamespace(logits=logits, past_key_values=read)

    def __call__(self, **arguments):
        return self.forward(**arguments)


def test_a_prompt_is_read_at_once_and_then_one_token_after_the_other():
    model = Counts()
    decoder = Decoder(model, model, is_static=False)
    ids = torch.arange(PROMPT + NEW)[None]
    assert decoder.milliseconds(ids[:, :PROMPT]) > 0
    assert model.lengths == [PROMPT, *[1] * NEW]
    expected = torch.nn.functional.cross_entropy(20.0 * torch.eye(100)[:1], torch.tensor([0])).item()
    assert decoder.loss(ids) == pytest.approx(expected)
    ids[0, -1] = 0  # the last one is another than the model expects
    assert NEW * decoder.loss(ids) == pytest.approx(NEW * expected + 20)
    assert len(model.strides) == 1, "a compiled step is compiled for each of them"


def test_losses_that_are_far_from_dense_are_refused():
    bench_decode.check_losses("decode", {OURS: 2.9, DENSE: 2.6})
    with pytest.raises(AssertionError, match=f"{OURS}: 3.300, dense 2.600"):
        bench_decode.check_losses("decode", {OURS: 3.3, DENSE: 2.6})
