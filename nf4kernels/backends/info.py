"""What runs where, for people: the backend of each kind of device, the kernels of its products, and why."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import native, select
from .tuned_files import NVIDIA_DRIVER
from .tuned_table import BACKENDS, CUDA_PRODUCTS


@dataclass(frozen=True)
class BackendInfo:
    """What runs where: device type -> (implementation, reason), and which kernels its products take."""

    devices: dict[str, tuple[str, str]]
    kernels: dict[str, list[str]]
    cpu_isas: list[str]

    def __str__(self) -> str:
        lines = [f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"]
        for device, (implementation, reason) in self.devices.items():
            lines.append(f"{device:5} {implementation} ({reason})")
            lines += [f"      {line}" for line in self.kernels.get(device, ())]
        lines.append(f"{select.VARIABLE} can be one of: {' '.join(BACKENDS)}")
        lines.append(f"{native.ISA_VARIABLE} can be one of: {' '.join(self.cpu_isas) or 'none'}")
        products = native.CPU_PRODUCTS if self.cpu_isas else ("none",)
        lines.append(f"{native.PRODUCTS_VARIABLE} can be one of: {' '.join(products)}")
        return "\n".join(lines)


def backend_info() -> BackendInfo:
    """What would run on this machine, and why. Settles it for the GPUs, which initialises them."""
    cpu = select.decide("cpu")
    devices = {"cpu": (cpu.implementation, cpu.reason)}
    kernels = {"cpu": list(_cpu_kernel_lines())} if cpu.backend == "native" else {}
    for device_type in select.GPU_KEYS:
        if torch.get_device_module(device_type).is_available():
            select.REGISTRATIONS[device_type].settle()
            decision = select.decide(device_type)
            devices[device_type] = (decision.implementation, decision.reason)
            kernels[device_type] = list(_kernel_lines(device_type, decision))
        elif device_type == "cuda":
            devices[device_type] = ("none", _why_no_cuda_device())
    return BackendInfo(devices, kernels, [] if select.CPU_LIBRARY is None else select.CPU_LIBRARY.isas)


def _cpu_kernel_lines() -> Iterator[str]:
    """Whether 16-bit products multiply the packed bytes or go through torch's GEMM, by rows of x."""
    if select.CPU_LIBRARY is None:
        return
    by_name = {
        name: select.CPU_LIBRARY.choices(dtype) for name, dtype in (("bf16", native.BFLOAT16), ("fp16", native.FLOAT16))
    }
    if by_name["bf16"] == by_name["fp16"]:
        by_name = {"bf16, fp16": by_name["bf16"]}
    for name, choices in by_name.items():
        for rows, products, reason in choices:
            limit = f"up to {rows} rows" if rows < native.MOST_ROWS else "more rows" if len(choices) > 1 else "any rows"
            yield f"products of {name}, {limit}: {products} ({reason})"


def _why_no_cuda_device() -> str:
    """Where torch's `is_available` says no."""
    if torch.version.hip is not None:
        return "torch sees no AMD GPU"
    if torch.version.cuda is None:
        has_driver = NVIDIA_DRIVER.exists()
        return (
            "torch has no CUDA"
            + ", and this machine has an NVIDIA driver: a CUDA build of torch could use it" * has_driver
        )
    library, _ = select.cuda_library()
    if library is not None:
        driver = library.driver_version
        if driver == 0:
            return "this machine has no NVIDIA driver"
        if driver // 1000 < int(torch.version.cuda.partition(".")[0]):
            known = native.version_name(driver)
            return f"torch was built with CUDA {torch.version.cuda}, the driver is for CUDA {known}: update one of them"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "torch sees no CUDA device" + ("" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}")


def _kernel_lines(device_type: str, decision: select.Decision) -> Iterator[str]:
    """Measured choices between backends, and the kernels of a GPU's products by rows of x."""
    yield from select.ignored_tables(device_type)
    yield from map(str, select.measured_rules(device_type))
    index, name = _shown_device(device_type)
    if name and decision.backend in ("native", "triton"):
        yield f"the rows below are those of {device_type}:{index}, {name}; other devices here may have others"
    if decision.backend == "triton":
        yield from select.triton_backend().kernel_lines(torch.device(device_type, index))
    if decision.backend != "native" or device_type != "cuda":
        return
    capability = torch.cuda.get_device_capability(index)
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    for op in CUDA_PRODUCTS:
        dtypes, of_each = ("bf16", " of each expert") if op.startswith("grouped_") else ("bf16, fp16", "")
        for rows, kernel, reason in select.loaded_cuda_library().choices(op, index, capability, multiprocessors):
            limit = f"up to {rows} rows{of_each}" if rows < native.MOST_ROWS else f"more rows{of_each}"
            yield f"{op} {dtypes}, {limit}: {kernel} ({reason})"
    yield f"weights of int8: {select.int8_kernels(device_type)[1]}"


def _shown_device(device_type: str) -> tuple[int, str]:
    """(index, name) of the first device that kernels run on; "" where all devices are alike."""
    module, tables = torch.get_device_module(device_type), select.usable_tables(device_type)
    names = [module.get_device_name(index) for index in range(module.device_count())]
    index = 0
    if device_type == "cuda" and torch.version.hip is None:
        able = (i for i in range(len(names)) if torch.cuda.get_device_capability(i) >= select.OLDEST)
        index = next(able, 0)
    are_alike = len(set(names)) <= 1 and all(table == tables[0] for table in tables)
    return index, "" if are_alike else names[index]
