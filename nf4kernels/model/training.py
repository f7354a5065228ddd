"""What the dense parts of a model are trained in, by machine."""

import torch

from ..backends import select


def training_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """The dtype for what is not in 4 bits: bfloat16 where the device multiplies in it at full speed, else float32.

    On a CPU without bf16 instructions torch's bf16 products have no fast path, backward above all: one training step
    of a small language model took 13 times as long as in float32.

    Args:
        device: where the model is; None is torch's default device.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cpu":
        return torch.bfloat16 if select.cpu_multiplies_bf16() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16
