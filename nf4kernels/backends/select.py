"""Who runs each op on each device, and why."""

from dataclasses import dataclass

import torch

from .. import reference
from ..ops import LIBRARY, SCHEMAS
from . import native

OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)


@dataclass(frozen=True)
class BackendInfo:
    """What runs where: device type -> (implementation, reason)."""

    devices: dict[str, tuple[str, str]]
    cpu_isas: list[str]
    cpu_threads: int
    torch_version: str

    def __str__(self) -> str:
        lines = [f"torch {self.torch_version}, {self.cpu_threads} CPU threads"]
        for device, (implementation, reason) in self.devices.items():
            lines.append(f"{device:5} {', '.join(OPS)}: {implementation} ({reason})")
        lines.append(f"{native.ISA_VARIABLE} can be one of: {' '.join(self.cpu_isas) or 'none'}")
        return "\n".join(lines)


for _name in OPS:
    # Every device without a compiled kernel runs the reference; a compiled library's registration for a device wins.
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

CPU_LIBRARY = native.load_cpu()


def backend_info() -> BackendInfo:
    """What would run on this machine, and why."""
    if CPU_LIBRARY is None:
        devices = {"cpu": ("reference (plain PyTorch)", native.NOT_BUILT)}
    else:
        devices = {"cpu": (f"native {CPU_LIBRARY.isa}", CPU_LIBRARY.reason)}
    if torch.cuda.is_available():
        devices["cuda"] = ("reference (plain PyTorch)", "no CUDA kernels in this version")
    else:
        devices["cuda"] = ("none", "torch sees no CUDA device")
    isas = [] if CPU_LIBRARY is None else CPU_LIBRARY.isas
    return BackendInfo(devices, isas, torch.get_num_threads(), torch.__version__)
