"""Files of examples: each form read, each kind of damage named with its place, the split, and what the model sees."""

import json

import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed: no examples are read")
trl = pytest.importorskip("trl", reason="trl is not installed: no example is shown as the model sees it")

from support.chat_model import CHAT_TEMPLATE, chat_model, chat_tokenizer  # noqa: E402

from nf4kernels.cli import main  # noqa: E402
from nf4kernels.stages.data.reading import Source, identity, read  # noqa: E402
from nf4kernels.stages.data.view import Viewer, marked  # noqa: E402
from nf4kernels.stages.errors import StageError  # noqa: E402

TURNS = [{"role": "user", "content": "What colour is snow?"}, {"role": "assistant", "content": "White."}]
RECORDS = {
    "text": {"text": "Snow is white."},
    "prompt": {"prompt": "Snow is", "completion": " white."},
    "messages": {"messages": TURNS},
    "alpaca": {"instruction": "Name the colour.", "input": "snow", "output": "White."},
}


def lines(path, records, raw=b""):
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + raw)
    return path


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("stored", ["jsonl", "json", "parquet", "directory"])
def test_every_form_in_every_kind_of_file(kind, stored, tmp_path):
    records = [{**RECORDS[kind], "id": str(i)} for i in range(3)]
    path = tmp_path / f"data.{stored}"
    if stored == "jsonl":
        lines(path, records)
    elif stored == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif stored == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    split = read([Source(path)], held_out=0)
    assert split.form == ("prompt" if kind == "alpaca" else kind)
    assert len(split.train) == 3
    assert not len(split.held_out)
    if kind == "alpaca":
        assert split.train[0]["completion"] == "White."
        assert "### Input:\nsnow\n\n### Response:\n" in split.train[0]["prompt"]
    else:
        assert {key: split.train[0][key] for key in RECORDS[kind]} == RECORDS[kind]
        assert "id" not in split.train.column_names


def test_no_example_is_on_both_sides(tmp_path):
    records = [{"text": f"text {i % 40}"} for i in range(100)]
    a, b = lines(tmp_path / "a.jsonl", records), lines(tmp_path / "b.jsonl", records[:50])
    split = read([Source(a), Source(b)], held_out=0.25, seed=3)
    train, held_out = {identity(row) for row in split.train}, {identity(row) for row in split.held_out}
    assert len(split.held_out) == len(held_out) == 10
    assert not train & held_out
    assert len(train | held_out) == 40
    again = read([Source(a), Source(b)], held_out=0.25, seed=3)
    assert again.train.to_list() == split.train.to_list()
    assert read([Source(a), Source(b)], held_out=0.25, seed=4).held_out.to_list() != split.held_out.to_list()


def test_weights_say_how_often_an_epoch_sees_an_example(tmp_path):
    a = lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(10)])
    b = lines(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(10)])
    texts = read([Source(a, 2.0), Source(b, 0.5)], held_out=0).train["text"]
    assert [sum(text == f"a{i}" for text in texts) for i in range(10)] == [2] * 10
    assert len({text for text in texts if text[0] == "b"}) == len(texts) - 20 == 5


GOOD = {"prompt": "a", "completion": "b"}
BROKEN = {
    "broken JSON": (b'{"prompt": "a", "completion": \n', "line 2: must be JSON: Expecting value at column 31"),
    "empty answer": (b'{"prompt": "a", "completion": " "}\n', "line 2: completion must not be empty"),
    "long line": (b'{"text": "' + b"a" * (1 << 20) + b'"}\n', "must be one example of at most 1000000 bytes, got"),
    "wrong keys": (b'{"question": "a", "answer": "b"}\n', "line 2: must have the keys text, prompt and completion"),
    "not UTF-8": (b'{"prompt": "\xe9", "completion": "b"}\n', "line 2: must be UTF-8, but byte 47 of the file is 0xe9"),
    "no object": (b"[1]\n", "line 2: must be an object with text"),
    "other form": (b'{"text": "a"}\n', "line 2: must be prompt as"),
    "number": (b'{"prompt": 3, "completion": "b"}\n', "line 2: prompt must be a string, got int"),
    "deep": (b"[" * 100_000 + b"\n", "line 2: must be JSON of a few levels"),
    "turns after text": (json.dumps({"prompt": TURNS[:1], "completion": TURNS[1:]}).encode(), "got prompt of turns"),
    "half a pair": (b'{"prompt": "a", "completion": "b\\ud83d"}\n', "must be text, got half a surrogate pair"),
    "no answer": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "must end with the assistant's turn"),
    "two users": (
        json.dumps({"messages": [TURNS[0], *TURNS]}).encode(), "turn 2 of messages must follow system or assistant",
    ),
    "tools": (
        json.dumps({"messages": TURNS, "tools": [{"type": "function"}]}).encode(), "line 2: tools are not read",
    ),
    "no role": (b'{"messages": [{"from": "human", "value": "a"}]}\n', "turn 1 of messages must have a role of system"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data_is_named_with_its_place(kind, tmp_path, capsys):
    raw, sentence = BROKEN[kind]
    path = lines(tmp_path / "data.jsonl", [GOOD], raw)
    with pytest.raises(StageError) as raised:
        read([Source(path)])
    assert str(raised.value).startswith(f"{path} line 2")
    assert sentence in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert main(["data", "check", str(path)]) == 1
    printed = capsys.readouterr().out
    assert f"broken: {raised.value}" in printed


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "must hold examples, got none"), (None, "must be a file of examples, got nothing there")],
)
def test_no_data(content, sentence, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError, match=sentence):
        read([Source(path)])
    assert main(["data", "check", str(path)]) == (2 if content is None else 1)
    captured = capsys.readouterr()
    assert content is None or f"broken: {path} {sentence}\n" in captured.out
    assert content is not None or captured.err == f"nf4kernels data: {path} {sentence}\n"


@pytest.mark.parametrize(("held_out", "weight"), [(3, 1.0), (-0.1, 1.0), (1.5, 1.0), (0.1, 0.0), (0.1, float("nan"))])
def test_no_split_without_sense(held_out, weight, tmp_path):
    path = lines(tmp_path / "data.jsonl", [{"text": f"{i}"} for i in range(3)])
    with pytest.raises(StageError, match="must"):
        read([Source(path, weight)], held_out=held_out)


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(StageError, match="must be a Parquet file, got"):
        read([Source(path)])


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("form", ["text", "prompt", "messages"])
def test_the_answer_alone_has_a_loss(form, chat):
    tokenizer = chat_tokenizer() if chat else chat_tokenizer(None)
    if form == "messages" and not chat:
        with pytest.raises(StageError, match="must have a chat template"):
            Viewer(tokenizer, form)
        return
    viewer = Viewer(tokenizer, form)
    view = viewer.view(RECORDS[form])
    learned = tokenizer.decode([token for token, loss in zip(view.ids, view.has_loss) if loss])
    expected = {
        "text": f"{tokenizer.bos_token}Snow is white.{tokenizer.eos_token}",
        "prompt": f" white.{tokenizer.eos_token}",
        "messages": f"White.{tokenizer.eos_token}",
    }[form]
    assert learned == expected
    assert f"⟦{expected}⟧" in marked(view, tokenizer)


def test_check_tells_what_is_there(tmp_path, capsys):
    chat_tokenizer().save_pretrained(tmp_path / "model")
    records = [
        {"messages": TURNS},
        {"messages": TURNS},
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
    ]
    path = lines(tmp_path / "data.jsonl", records)
    arguments = ["data", "check", str(path), "--model", str(tmp_path / "model"), "--max-length", "30"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tokenizer = chat_tokenizer()
    counts = [len(tokenizer.apply_chat_template(record["messages"])["input_ids"]) for record in records]
    assert told["token_count"] == sum(counts)
    assert told["cut"] == sum(count > 30 for count in counts)
    assert (told["duplicates"], told["forms"]) == (1, {"messages": 3})
    assert told["characters"]["most"] == told["characters"]["least"] + len("Be brief.")
    assert main(arguments) == 0
    assert "⟦White.<|im_end|>⟧" in capsys.readouterr().out


def test_a_template_that_refuses_is_named(tmp_path, capsys):
    tokenizer = chat_tokenizer(
        "{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}" + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path / "model")
    path = lines(tmp_path / "data.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}])
    assert main(["data", "check", str(path), "--model", str(tmp_path / "model")]) == 1
    assert f"broken: {path} line 1: the chat template refuses an example: no system here" in capsys.readouterr().out


def test_marks_that_no_template_has_are_asked_for(tmp_path, capsys):
    unmarked = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    chat_tokenizer(unmarked).save_pretrained(tmp_path / "model")
    path = lines(tmp_path / "data.jsonl", [RECORDS["messages"]])
    assert main(["data", "check", str(path), "--model", str(tmp_path / "model")]) == 1
    printed = capsys.readouterr().out
    assert "broken: the model's chat template must mark the answers by {% generation %}" in printed
    assert "exact duplicates: 0" in printed


def test_a_byte_order_mark_and_a_byte_after_it(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read([Source(path)], held_out=0).train[0] == {"text": "a"}
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xe9"}\n')
    with pytest.raises(StageError, match="line 1: must be UTF-8, but byte 13 of the file is 0xe9"):
        read([Source(path)])


def test_turns_keep_their_own_keys(tmp_path):
    def called(arguments):
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": [*turns, {"role": "tool", "name": "look", "content": "White."}, TURNS[1]]}

    records = [called({"at": "snow"}), called({"far": 3}), called("all"), {"messages": TURNS}]
    assert read([Source(lines(tmp_path / "data.jsonl", records))], held_out=0).train.to_list() == records


SEEN = {
    **{kind: [record] for kind, record in RECORDS.items()},
    "ended text": [{"text": "Snow is white.<|im_end|>"}],
    "begun text": [{"text": "<|begin|>Snow is white."}],
    "two answers": [{"messages": [*TURNS, *TURNS]}, RECORDS["messages"]],
    "turns before": [{"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]}],
}


@pytest.mark.parametrize(
    ("kind", "chat"),
    [(kind, True) for kind in SEEN]
    + [(kind, False) for kind in SEEN if isinstance(next(iter(SEEN[kind][0].values())), str)],
)
def test_the_trainer_sees_the_same(kind, chat, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: nothing is fine-tuned")
    from nf4kernels.stages.finetune.recipe import read_recipe
    from nf4kernels.stages.finetune.run import _trainer

    chat_model(tmp_path / "model", CHAT_TEMPLATE if chat else None, num_hidden_layers=1)
    path = lines(tmp_path / "data.jsonl", SEEN[kind])
    fields = {"model": tmp_path / "model", "data": path, "output_dir": tmp_path / "out", "held_out": 0}
    recipe = read_recipe(None, [f"--{name}={value}" for name, value in fields.items()])
    split, tokenizer = read([Source(path)], held_out=0), chat_tokenizer(CHAT_TEMPLATE if chat else None)
    trained = _trainer(recipe, split, tokenizer).train_dataset
    viewer = Viewer(tokenizer, split.form)
    for row, seen in zip(split.train, trained, strict=True):
        view = viewer.view(row)
        assert view.ids == seen["input_ids"]
        labels = seen.get("labels") or seen["input_ids"]
        assert view.has_loss == [label != -100 for label in labels]
