"""The rows of the table, group by group."""

from torch import nn

import nf4kernels as nf4

from .setting import Setting, Way


def dense(setting: Setting, seed: int) -> nn.Module:
    return setting.dense()


def plain(setting: Setting, seed: int) -> nn.Module:
    model = setting.dense()
    nf4.quantize_model(model, progress=False)
    return model


WAYS = (
    Way("bf16", "start", dense),
    Way("NF4", "start", plain),
)
