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
CUDA_LIBRARY, _NO_CUDA_LIBRARY = native.load_cuda()


def backend_info() -> BackendInfo:
    """What would run on this machine, and why."""
    if CPU_LIBRARY is None:
        devices = {"cpu": ("reference (plain PyTorch)", native.NOT_BUILT)}
    else:
        devices = {"cpu": (f"native {CPU_LIBRARY.isa}", CPU_LIBRARY.reason)}
    isas = [] if CPU_LIBRARY is None else CPU_LIBRARY.isas
    return BackendInfo(devices | _cuda_devices(), isas, torch.get_num_threads(), torch.__version__)


def _cuda_devices() -> dict[str, tuple[str, str]]:
    """One row for all CUDA devices, or one each where they differ."""
    if not torch.cuda.is_available():
        reason = "torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return {"cuda": ("none", reason)}
    if CUDA_LIBRARY is None:
        return {"cuda": ("reference (plain PyTorch)", _NO_CUDA_LIBRARY)}
    rows = {}
    for i in range(torch.cuda.device_count()):
        code, why_not = CUDA_LIBRARY.code_for(torch.cuda.get_device_capability(i))
        without = f"{why_not}; with {native.CUDA_VARIABLE}=0 the reference would run"
        rows[f"cuda:{i}"] = ("none", without) if code is None else (f"native {code}", torch.cuda.get_device_name(i))
    return {"cuda": rows["cuda:0"]} if len(set(rows.values())) == 1 else rows
