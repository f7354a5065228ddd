"""`nf4kernels finetune` on images beside text, on a tiny LLaVA, and what is said of images that cannot be read."""

import csv
import re

import pytest
from support.chat_model import chat_model
from support.finetune_run import arguments, names, write_rows

for needed in ("peft", "trl", "datasets", "matplotlib", "yaml", "PIL"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is fine-tuned")

from PIL import Image  # noqa: E402
from support.vision_model import IMAGE, vision_model  # noqa: E402

from nf4kernels.cli import main  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return vision_model(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture
def rows(tmp_path):
    """Examples whose answer is in the image alone; the images stand in a folder beside the file."""
    (tmp_path / "images").mkdir()
    made = []
    for i in range(18):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (16 + i, 20), COLOURS[name]).save(tmp_path / "images" / f"{i}.png")
        turns = [{"role": "user", "content": "What colour is it?"}, {"role": "assistant", "content": name}]
        made.append({"messages": turns, "images": [f"images/{i}.png"]})
    return made


def as_prompts(rows):
    for row in rows:
        asked, answer = (turn["content"] for turn in row["messages"])
        yield {"prompt": asked, "completion": answer, "image": row["images"][0]}


@pytest.mark.parametrize("form", ["messages", pytest.param("prompt", marks=pytest.mark.slow)])
def test_it_learns_what_is_in_the_images(model, rows, tmp_path, capsys, form):
    data = write_rows(tmp_path / "data.jsonl", rows if form == "messages" else as_prompts(rows))
    changes = {"max_steps": 30, "learning_rate": 5e-3, "lora_dropout": 0.0, "held_out": 3, "save_steps": 30}
    assert main(arguments(model, data, tmp_path / "out", **changes, per_device_train_batch_size=5)) == 0
    said = capsys.readouterr().out
    assert "training: 15 examples with images" in said
    assert f"{IMAGE * 4}What colour is it?" in said
    assert re.search(r"assistant\n⟦(red|green|blue)<\|im_end\|>", said)
    assert "memory: no estimate for examples with images" in said
    assert said.count("answered: ") == 3
    with (tmp_path / "out" / "log.csv").open(encoding="utf-8", newline="") as file:
        last = [float(row["mean_token_accuracy"]) for row in csv.DictReader(file)][-3:]
    assert min(last) > 0.9, "the question is always the same: without the images one colour in three is right"
    assert {"adapter_model.safetensors", "loss.png", "README.md"} <= set(names(tmp_path / "out"))


def broken(rows, tmp_path):
    (tmp_path / "images" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")


def cut(rows, tmp_path):
    file = tmp_path / "images" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])


def missing(rows, tmp_path):
    (tmp_path / "images" / "1.png").unlink()


def no_list(rows, tmp_path):
    rows[1]["images"] = "images/1.png"


def without(rows, tmp_path):
    del rows[1]["images"]


def beside_text(rows, tmp_path):
    rows[1] = {"text": "green", "images": ["images/1.png"]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (broken, "images/1.png must be an image that can be read"),
        (cut, "images/1.png must be an image that can be read"),
        (missing, "images/1.png must be there, got nothing"),
        (no_list, "images must be a list of paths"),
        (without, "must be messages with images as "),
        (beside_text, "images must stand beside messages or prompt and completion, got text"),
    ],
)
def test_what_is_wrong_with_an_image_is_said(model, rows, tmp_path, capsys, change, expected):
    change(rows, tmp_path)
    data = write_rows(tmp_path / "data.jsonl", rows)
    had = names(tmp_path)
    assert main(arguments(model, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data.jsonl line 2: " in error
    assert expected in error
    assert main(["data", "check", str(data)]) != 0
    assert "data.jsonl line 2: " in "".join(capsys.readouterr())
    assert names(tmp_path) == had


def test_images_need_a_model_that_sees(rows, tmp_path, capsys):
    data, model = write_rows(tmp_path / "data.jsonl", rows), chat_model(tmp_path / "chat", num_hidden_layers=1)
    had = names(tmp_path)
    assert main(arguments(model, data, tmp_path / "out")) == 2
    assert "must be a vision-language model, since the data has images" in capsys.readouterr().err
    assert names(tmp_path) == had


def test_an_image_that_is_cut_ends_the_run(model, rows, tmp_path, capsys):
    rows[7]["images"] *= 8  # 32 tokens
    data = write_rows(tmp_path / "data.jsonl", rows)
    assert main(arguments(model, data, tmp_path / "out", max_length=30, max_steps=5)) == 2
    assert capsys.readouterr().err.endswith("--max_length must leave the images of each example whole, got 30\n")


def test_packing_images_is_refused(model, rows, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", rows)
    had = names(tmp_path)
    assert main(arguments(model, data, tmp_path / "out", packing=True)) == 2
    assert "Packing is not supported for vision datasets" in capsys.readouterr().err
    assert names(tmp_path) == had
