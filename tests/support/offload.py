"""A tiny language model as accelerate offloads it: parameters on meta, brought in by hooks."""

import pytest

HOW = ("cpu_offload", "disk_offload", "dispatch_model")


def offloaded(model, how, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: nothing is offloaded")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    return accelerate.dispatch_model(
        model, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                "model.rotary_emb": "cpu", "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path / "offload"),
        force_hooks=True,
    )  # fmt: skip
