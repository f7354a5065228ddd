"""accelerate's offloading of a model without adapters: parameters on meta, brought in by hooks when they are needed."""

import pytest
import torch
from support import tiny


def offloaded(model, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    return accelerate.dispatch_model(
        model, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                "model.rotary_emb": "cpu", "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path / "offload"),
        force_hooks=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_an_offloaded_model_gives_the_same_numbers(tmp_path, how):
    """Report's kind: device_map="auto" with too little memory: tensors on meta."""
    model = tiny.quantized_llama()
    with torch.no_grad():
        expected = model(tiny.IDS).logits
        model = offloaded(model, how, tmp_path)
        got = model(tiny.IDS).logits
    assert torch.equal(got, expected)
