"""Whether a model is as it was: its state, its modules and its adapters' settings."""

import copy

import torch

from nf4kernels import QuantLinear


def snapshot(model):
    names = [(name, type(module)) for name, module in model.named_modules()]
    adapters = {name: layer.lora for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    return copy.deepcopy(model.state_dict()), names, adapters


def assert_unchanged(model, before):
    state, names, adapters = before
    now, names_now, adapters_now = snapshot(model)
    assert names_now == names
    assert adapters_now == adapters
    assert list(now) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=0, equal_nan=True)
