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
        return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16


def _cpu_multiplies_bf16() -> bool:
    """Whether both our kernels and torch's oneDNN use the CPU's bf16 instructions, as the environment has them run.

    oneDNN alone does not tell: it says yes on any AVX-512, where it emulates them at a third of fp32's speed.
    """
    library = select.CPU_LIBRARY
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent where torch has no oneDNN
    return library is not None and library.isa.endswith("_bf16") and supported is not None and bool(supported())
