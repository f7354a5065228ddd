"""SmolLM2-135M through transformers: quantized while it is read, saved, read again, generating."""

import pytest
import torch
from support import tiny
from support.directories import load, same_state, transformers
from support.paths import ROOT

import nf4kernels as nf4
from nf4kernels.demo import smollm2
from nf4kernels.integrations.transformers import Nf4Config


@pytest.fixture(scope="module")
def directory():
    pytest.importorskip("gguf", reason="gguf is not installed: the fetched weights cannot be read")
    return smollm2.fetch(ROOT / ".cache")  # where the demo has it, too


@pytest.mark.slow
def test_load_save_reload_generate(directory, tmp_path):
    model = load(directory, quantization_config=Nf4Config())
    expected = load(directory)
    count, dense_bytes = expected.num_parameters(), expected.get_memory_footprint()
    report = nf4.quantize_model(expected, progress=False)
    assert same_state(model, expected)
    assert len(report.layers) == len(tiny.layers(model)) == 210
    assert model.num_parameters() == count
    assert model.get_memory_footprint() < 0.5 * dense_bytes

    model.save_pretrained(tmp_path, max_shard_size="40MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load(tmp_path)
    assert same_state(again, model)

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = [m.generate(**ids, max_new_tokens=12, do_sample=False) for m in (again, expected)]
    assert torch.equal(*tokens)
    assert "Paris" in tokenizer.decode(tokens[0][0, ids["input_ids"].shape[1] :])
