"""accelerate's offloading of a model without adapters: parameters on meta, brought in by hooks when they are needed."""

import pytest
import torch
from support import tiny
from support.offload import HOW, offloaded


@pytest.mark.parametrize("how", HOW)
def test_an_offloaded_model_gives_the_same_numbers(tmp_path, how):
    """Report's kind: device_map="auto" with too little memory: tensors on meta."""
    model = tiny.quantized_llama()
    with torch.no_grad():
        expected = model(tiny.IDS).logits
        model = offloaded(model, how, tmp_path)
        got = model(tiny.IDS).logits
    assert torch.equal(got, expected)
