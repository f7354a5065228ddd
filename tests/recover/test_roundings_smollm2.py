"""GPTQ on SmolLM2: how much of what plain rounding took is left, on text that was held out."""

import json
from importlib.resources import files

import pytest
import torch
from support import smollm2

import nf4kernels as nf4
from nf4kernels.recover import Gptq, agreement


@pytest.mark.slow
def test_a_fifth_of_the_divergence_is_gone():
    transformers = pytest.importorskip("transformers")
    directory = smollm2.directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    lines = (files("nf4kernels.demo") / "wordnet.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(record["prompt"] + record["completion"] for record in map(json.loads, lines[:400]))
    ids = torch.tensor(tokenizer(text)["input_ids"][: 14 * 128]).view(14, 128)
    held_out, calibration = [ids[:4]], [ids[4:]]

    def dense():
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    reference, plain, model = dense(), dense(), dense()
    nf4.quantize_model(plain, progress=False)
    report = nf4.quantize_model(model, progress=False, rounding=Gptq(calibration))
    kl, kl_plain = (agreement(each, reference, held_out).kl for each in (model, plain))
    print(f"KL {kl:.4f} nats a token, {kl_plain:.4f} with plain rounding")
    assert kl < 0.8 * kl_plain
    assert report.model_bytes_after == sum(
        {t.data_ptr(): t.nbytes for t in (*plain.parameters(), *plain.buffers())}.values()
    )
