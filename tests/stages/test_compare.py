"""`nf4kernels compare`: its numbers against a computation of their own, what it reads, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from support import smollm2
from support.compared_model import TEXT, small_model, transformers

import nf4kernels
from nf4kernels.cli import main
from nf4kernels.quantized_weight import BLOCK_SIZES
from nf4kernels.stages import text_loss
from nf4kernels.stages.compare import text as compare
from nf4kernels.stages.compare.variants import CODEBOOKS, SCALES, Variant, variants
from nf4kernels.stages.errors import StageError

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path):
    small_model(tmp_path / "model")
    return tmp_path / "model"


def ids_of(directory, text=TEXT):
    return transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"]


@pytest.mark.parametrize(
    "variant", [("nf4", 64, "e4m3"), ("int4", 4096, "float32"), ("mxfp4", 32, "e8m0"), ("fp4", 16, "dynamic8")]
)
def test_numbers_are_those_of_quantize_model(directory, variant):
    """Loss, KL and agreement in float64, of the model that `quantize_model` makes, a window at a time."""
    variant = Variant(*variant)
    ids = ids_of(directory)
    assert len(ids) > 30
    rows = [ids[:20], ids[20:31]]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    got = compare.compare_model(model, text_loss.batches_of(rows, CPU), [variant], progress=False)

    dense = transformers.AutoModelForCausalLM.from_pretrained(directory)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(directory)
    report = nf4kernels.quantize_model(quantized, progress=False, **variant.quantize_options())
    loss = base = kl = same = 0
    with torch.no_grad():
        for row in rows:
            x, y = torch.tensor([row[:-1]]), torch.tensor(row[1:])
            p, q = (m(x).logits[0].double().log_softmax(-1) for m in (dense, quantized))
            base -= p[range(len(y)), y].sum().item()
            loss -= q[range(len(y)), y].sum().item()
            kl += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    tokens = sum(len(row) - 1 for row in rows)
    (row,) = got.rows
    assert (got.tokens, got.layers) == (tokens, len(report.layers))
    assert got.dense_loss == pytest.approx(base / tokens, rel=1e-5)
    assert row.loss == pytest.approx(loss / tokens, rel=1e-4)
    assert row.kl == pytest.approx(kl / tokens, rel=1e-3)
    assert row.kl > 1e-3
    assert row.top1 * tokens == pytest.approx(same, abs=1.01)  # a tie may fall either way
    assert row.rms_error == pytest.approx(report.rms_error)
    weights = sum(math.prod(layer.shape) for layer in report.layers)
    assert row.bits == pytest.approx(8 * report.bytes_after / weights, rel=0.01)


def test_dense_weights_come_back(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = text_loss.batches_of([ids_of(directory)[:9]], CPU)
    compared = variants(["nf4", "nvfp4"], [64], ["float32"])
    first = compare.compare_model(model, batches, compared, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again = compare.compare_model(model, batches, compared[::-1], progress=False)
    assert [row.kl for row in again.rows] == [row.kl for row in first.rows[::-1]]


def test_every_variant():
    every = variants(CODEBOOKS, BLOCK_SIZES, SCALES)
    assert len(every) == len(set(every)) == 5 * 9 * 3 + 2
    for variant in every:
        weight = nf4kernels.quantize(torch.ones(1, 4096), **variant.quantize_options())
        assert (weight.codebook, weight.block_size) == (variant.codebook, variant.block_size)
        assert variant.scales == (weight.scale_codebook or weight.scales)


def test_windows_count_predicted_tokens():
    def tokenizer(text):
        return {"input_ids": list(map(int, text.split()))}

    assert text_loss.windows(["1 2 3 4 5", "6", "7 8"], tokenizer, 3, 99) == [[1, 2, 3], [4, 5], [7, 8]]
    assert text_loss.windows(["1 2 3 4 5", "6", "7 8"], tokenizer, 3, 3) == [[1, 2, 3], [4, 5]]
    assert text_loss.windows(["1 2 3 4 5"], tokenizer, 9, 2) == [[1, 2, 3]]


def test_padding_changes_nothing(directory):
    ids = ids_of(directory)
    rows = [ids[:20], ids[20:25]]
    (together,) = text_loss.batches_of(rows, CPU)
    alone = [batch for row in rows for batch in text_loss.batches_of([row], CPU)]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    compared = variants(["nf4"], [64], ["e4m3"])
    padded, unpadded = (compare.compare_model(model, b, compared, progress=False) for b in ([together], alone))
    assert padded.tokens == unpadded.tokens == 23
    assert padded.rows[0].kl == pytest.approx(unpadded.rows[0].kl, rel=1e-4)
    assert padded.dense_loss == pytest.approx(unpadded.dense_loss, rel=1e-5)


def test_every_row_is_in_one_batch_of_few_tokens():
    rows = [[i] * (2 + i % 50) for i in range(200)]
    batches = text_loss.batches_of(rows, CPU)
    assert sorted(int(i) for batch in batches for i in batch.ids[:, 0]) == [*range(200)]
    assert all(batch.ids.numel() <= text_loss.BATCH_TOKENS for batch in batches)


def test_the_loss_is_of_the_chosen_tokens_alone(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = ids_of(directory)
    rows, chosen = [ids[:9], ids[9:14]], [[False] * 4 + [True] * 5, [False, True, False, True, True]]
    expected = []
    for row, has_loss in zip(rows, chosen):
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected += [-float(log_p[i - 1, row[i]]) for i in range(1, len(row)) if has_loss[i]]
    loss = text_loss.held_out_loss(model, text_loss.batches_of(rows, CPU, chosen))
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert len(expected) == 8


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "must hold text, got an empty file"),
        ("a.txt", b"\xff\xfe", "must be UTF-8"),
        ("a.jsonl", b"\n", "must hold text, got an empty file"),
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', "line 2: must hold JSON"),
        ("a.jsonl", b'{"text": "good"}\n{"words": 1}\n', "line 2: must be an object with a string \"text\", got ['"),
        ("a.jsonl", b"[1]\n", 'line 1: must be an object with a string "text", got list'),
    ],
)  # fmt: skip
def test_bad_text(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError) as error:
        list(text_loss.read_documents(tmp_path / name, 1000))
    assert expected in str(error.value)
    assert name in str(error.value)


def test_command(directory, tmp_path, capsys):
    text, plot = tmp_path / "text.jsonl", tmp_path / "plot.png"
    text.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)), encoding="utf-8")
    flags = ["--codebooks", "nf4", "mxfp4", "--block-sizes", "32", "64", "--tokens", "40", "--plot", str(plot)]
    assert main(["compare", str(directory), "--text", str(text), *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 40
    assert len(result["variants"]) == 5
    assert all(row["kl"] > 0 for row in result["variants"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(directory), "--text", str(text), "--no-double-quant", "--codebooks", "nf4"]) == 0
    out = capsys.readouterr().out
    assert "float32" in out
    assert "e4m3" not in out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--text", "absent.txt"], "--text must be a file that can be read"),
        (["--skip", "absent"], "--skip must match a layer, got 'absent'"),
        (["--device", "abacus"], "--device must be one that is there, got abacus"),
        (["--tokens", "0"], "--tokens and --length must be at least 1 and 2, got 0 and 512"),
        (["--plot", "picture.bmp"], "--plot must end with .png"),
        (["--plot", "absent/picture.png"], "--plot must be a file in a directory that exists"),
    ],
)
def test_refused(directory, tmp_path, capsys, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", str(directory), "--text", "text.txt", *flags]) == 2
    *_, error = capsys.readouterr().err.splitlines()  # after transformers' progress bar
    assert error.startswith("nf4kernels compare: ")
    assert expected in error
    assert sorted(tmp_path.rglob("*")) == before


def test_models_refused(directory, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text = ["--text", str(tmp_path / "text.txt")]
    assert main(["compare", str(tmp_path), *text]) == 2
    assert "MODEL must be the directory of a causal language model" in capsys.readouterr().err
    assert main(["quantize", str(directory), str(tmp_path / "nf4")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "nf4"), *text]) == 2
    assert "MODEL must be dense, got one quantized by bitsandbytes" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_on_held_out_definitions(tmp_path):
    """The data-type comparison of QLoRA on a real model: nf4 before fp4 and int4, and larger blocks cost more."""
    from nf4kernels.demo.data import HELD_OUT, definitions

    directory = smollm2.directory()
    text = tmp_path / "held_out.txt"
    held_out = definitions()[-HELD_OUT:]
    text.write_text("\n".join(row["prompt"] + row["completion"] for row in held_out), encoding="utf-8")
    compared = variants(["nf4", "fp4", "int4"], [64], ["e4m3"])
    compared += variants(["nf4"], [1024], ["e4m3"])
    got = compare.compare_directory(directory, text, compared, tokens=512, progress=False)
    nf4, fp4, int4, large = got.rows
    assert 2 < got.dense_loss < 3.5
    assert got.tokens == 512
    assert nf4.kl < fp4.kl
    assert nf4.kl < int4.kl
    assert nf4.kl < large.kl
    assert got.dense_loss < nf4.loss < large.loss
    assert nf4.top1 > 0.6
    assert large.bits < nf4.bits < 4.2
