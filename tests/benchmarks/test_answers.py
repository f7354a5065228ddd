"""The batches that the tables of benchmarks/model train on."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: no table is made")

from benchmarks.model import answers


def test_training_batches_use_every_row_before_one_comes_again():
    rows = [([i] * (2 + i % 5), [False] + [True] * (1 + i % 5)) for i in range(70)]
    batches = answers.training_batches(rows, batch=5, steps=14, seed=0)
    assert sorted(int(i) for batch in batches for i in batch.ids[:, 0]) == sorted([*range(70)])
    again = answers.training_batches(rows, batch=5, steps=14, seed=0)
    assert all(a.ids.equal(b.ids) for a, b in zip(batches, again))


def test_the_completion_and_the_end_alone_are_predicted():
    tokenizer = pytest.importorskip("support.chat_model").chat_tokenizer(None)
    ids, has_loss = answers.encode({"prompt": "The sky is", "completion": " blue."}, tokenizer, 64)
    assert tokenizer.decode([token for token, has in zip(ids, has_loss) if has]) == f" blue.{tokenizer.eos_token}"
    assert answers.encode({"prompt": "The sky is", "completion": " blue."}, tokenizer, 3) == (ids[:3], has_loss[:3])
