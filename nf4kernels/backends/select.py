"""Who runs each op on each device, and why.

A device's backend is the first of native (a compiled library), triton and reference (plain PyTorch) that runs there, or
the one that NF4KERNELS_BACKEND names and no other. Where both of the first two run, `measured.csv` can give an op, a
dtype and a range of rows to one of them; no measurement is committed yet. Which of its kernels a backend runs is its own
table's choice (csrc/cuda/choose.h, triton/tuned).

The CPU's backend is settled at import. A GPU's is settled when the first op comes to one, by a stand-in: only an
initialised device tells what it is, and an import that initialised it would break every fork after it.
"""

import csv
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import reference
from ..ops import LIBRARY, SCHEMAS
from . import native

OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)
VARIABLE = "NF4KERNELS_BACKEND"
BACKENDS = ("native", "triton", "reference")
KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}  # device type -> dispatch key; AMD's devices are cuda's too
MEASURED = Path(__file__).parent / "measured.csv"
NATIVE_NAMESPACE = "nf4kernels_native"  # of the CUDA library's ops where another backend shares the device
ANY_ROWS = 1 << 62


@dataclass(frozen=True)
class Decision:
    """What runs on a kind of device; backend None: nothing, and every op there is an error."""

    backend: str | None
    implementation: str  # "native sm_90a", for people
    reason: str


@dataclass(frozen=True)
class Rule:
    """A measured choice: this backend for the op in this dtype, up to so many rows of its first argument."""

    op: str
    dtype: str
    rows: int
    backend: str
    reason: str


@dataclass(frozen=True)
class BackendInfo:
    """What runs where: device type -> (implementation, reason); and which kernels a device's products take."""

    devices: dict[str, tuple[str, str]]
    kernels: dict[str, list[str]] = field(default_factory=dict)  # device type -> lines

    def __str__(self) -> str:
        lines = [f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"]
        for device, (implementation, reason) in self.devices.items():
            lines.append(f"{device:5} {', '.join(OPS)}: {implementation} ({reason})")
            lines += [f"      {line}" for line in self.kernels.get(device, ())]
        lines.append(f"{VARIABLE} can be one of: {' '.join(BACKENDS)}")
        lines.append(f"{native.ISA_VARIABLE} can be one of: {' '.join(self.cpu_isas) or 'none'}")
        return "\n".join(lines)

    @property
    def cpu_isas(self) -> list[str]:
        return [] if CPU_LIBRARY is None else CPU_LIBRARY.isas


def _forced_backend() -> str | None:
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"nf4kernels: {VARIABLE} must be one of {' '.join(BACKENDS)} or unset, got {forced}")
    return forced


FORCED = _forced_backend()
CPU_LIBRARY = native.load_cpu() if FORCED in (None, "native") else None


@functools.cache
def cuda_library() -> native.CudaLibrary | None:
    """Loaded when it is first asked for; None where `native.load_cuda` has a reason."""
    return native.load_cuda()[0]


def decide(device_type: str, forced: str | None = FORCED) -> Decision:
    """What runs on this machine's devices of a type, all of them; initialises them."""
    passed_over = []
    for backend in BACKENDS if forced is None else (forced,):
        obstacle = _obstacle(backend, device_type)
        if obstacle is None:
            reasons = [f"forced by {VARIABLE}"] if forced is not None else passed_over
            return Decision(backend, *_described(backend, device_type, reasons))
        passed_over.append(f"no {backend}: {obstacle}")
    return Decision(None, "none", f"{VARIABLE}={forced}, and {obstacle}")


def _obstacle(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on the devices of a type; None if it can."""
    if backend == "reference":
        return None
    if backend == "native" and device_type == "cpu":
        return native.NOT_BUILT if CPU_LIBRARY is None else None
    if backend == "native":
        return _native_gpu_obstacle(device_type)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu":
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interprets else "Triton runs on GPUs, or on the CPU with TRITON_INTERPRET=1, for tests"
    if device_type == "cuda" and torch.version.hip is None:
        too_old = [c for c in _capabilities() if c < (8, 0)]
        return "this device is sm_{}{}, and Triton needs sm_80".format(*too_old[0]) if too_old else None
    return None


def _native_gpu_obstacle(device_type: str) -> str | None:
    if device_type != "cuda" or torch.version.hip is not None:
        return "the compiled kernels are for NVIDIA's GPUs"
    library = cuda_library()
    if library is None:
        return native.load_cuda()[1]
    why_not = (library.code_for(capability)[1] for capability in _capabilities())
    return next(filter(None, why_not), None)


def _capabilities() -> list[tuple[int, int]]:
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _described(backend: str, device_type: str, reasons: list[str]) -> tuple[str, str]:
    """(implementation, reason) for people."""
    if device_type == "cpu":
        name = {"native": f"native {CPU_LIBRARY and CPU_LIBRARY.isa}", "reference": "reference (plain PyTorch)"}
        chosen = [CPU_LIBRARY.reason] if backend == "native" else []
        # Triton is no backend of the CPU that a user could be missing.
        return name.get(backend, "triton, interpreted"), "; ".join(
            chosen + [reason for reason in reasons if not reason.startswith("no triton")]
        )
    devices = [torch.get_device_module(device_type).get_device_name(0)] + reasons
    if backend == "native":
        codes = dict.fromkeys(cuda_library().code_for(capability)[0] for capability in _capabilities())
        return f"native {' '.join(codes)}", "; ".join(devices)
    return "reference (plain PyTorch)" if backend == "reference" else backend, "; ".join(devices)


def measured_rules(architecture: str, path: Path = MEASURED) -> list[Rule]:
    """The rows of measured.csv for an architecture ("sm_90"), fewest rows first.

    Raises ValueError for a row that names no op, dtype or backend of ours.
    """
    rules = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["op"] not in OPS or row["backend"] not in BACKENDS or not hasattr(torch, row["dtype"]):
                raise ValueError(f"nf4kernels: {path.name} must have ops, dtypes and backends of ours, got {row}")
            if row["architecture"] == architecture:
                rows = int(row["rows"]) if row["rows"] else ANY_ROWS
                rules.append(Rule(row["op"], row["dtype"], rows, row["backend"], row["reason"]))
    return sorted(rules, key=lambda rule: rule.rows)


def by_rules(op: str, rules: list[Rule], kernels: dict[str, Callable], default: str) -> Callable:
    """The op by the first rule that fits its first argument's dtype and rows, else by the default backend."""
    own = [rule for rule in rules if rule.op == op]

    def run(tensor, *arguments):
        dtype, rows = str(tensor.dtype).removeprefix("torch."), tensor.shape[:-1].numel()
        fits = (rule.backend for rule in own if rule.dtype == dtype and rows <= rule.rows)
        return kernels[next(fits, default)](tensor, *arguments)

    return run


def _triton_ops() -> dict[str, Callable]:
    from . import triton  # imports Triton, which only this backend needs

    return triton.OPS


class _Device:
    """A device type's registrations: a stand-in until `install`, which decides, then those of what was decided."""

    def __init__(self, device_type: str) -> None:
        self.type, self.key = device_type, KEYS[device_type]
        self.decision: Decision | None = None
        self.rules: list[Rule] = []
        self._lock = threading.Lock()
        self._library = torch.library.Library("nf4kernels", "IMPL")

    def stand_in(self) -> None:
        for op in OPS:
            self._library.impl(op, functools.partial(self._first_call, op), self.key)

    def _first_call(self, op: str, *arguments):
        self.install()
        return getattr(torch.ops.nf4kernels, op)(*arguments)

    def install(self) -> Decision:
        with self._lock:
            if self.decision is None:
                decision = decide(self.type)
                self.rules = self._applicable_rules(decision)
                self._library._destroy()  # of the stand-in: a kernel over another one makes torch warn
                self._library = torch.library.Library("nf4kernels", "IMPL")
                self._register(decision)
                self.decision = decision
            return self.decision

    def _applicable_rules(self, decision: Decision) -> list[Rule]:
        if self.type != "cuda" or decision.backend is None or FORCED is not None or torch.version.hip is not None:
            return []
        architectures = {"sm_{}{}".format(*capability) for capability in _capabilities()}
        rules = measured_rules(architectures.pop()) if len(architectures) == 1 else []
        return [
            rule for rule in rules if rule.backend == decision.backend or _obstacle(rule.backend, self.type) is None
        ]

    def _register(self, decision: Decision) -> None:
        others = {rule.backend for rule in self.rules} - {decision.backend}
        if decision.backend is None:
            self._register_each(lambda op: functools.partial(_refuse, op, decision.reason))
        elif others:
            kernels = {backend: self._kernels(backend) for backend in others | {decision.backend}}
            self._register_each(
                lambda op: by_rules(op, self.rules, {b: k[op] for b, k in kernels.items()}, decision.backend)
            )
        elif decision.backend == "native" and self.type != "cpu":  # the CPU's registered itself when it was loaded
            cuda_library().register()
        elif decision.backend == "triton":
            self._register_each(_triton_ops().__getitem__)

    def _register_each(self, function_of: Callable[[str], Callable]) -> None:
        for op in OPS:
            self._library.impl(op, function_of(op), self.key)

    def _kernels(self, backend: str) -> dict[str, Callable]:
        if backend == "triton":
            return _triton_ops()
        if backend == "reference":
            return {op: getattr(reference, op) for op in OPS}
        library = torch.library.Library(NATIVE_NAMESPACE, "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        cuda_library().register(NATIVE_NAMESPACE)
        self.native_schemas = library  # they live as long as this object
        return {op: getattr(getattr(torch.ops, NATIVE_NAMESPACE), op) for op in OPS}


def _refuse(op: str, reason: str, *arguments):
    raise RuntimeError(f"nf4kernels.{op}: no backend runs on this device: {reason}")


for _name in OPS:
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")  # for any device without one of its own

_DEVICES = {device_type: _Device(device_type) for device_type in KEYS}
_DEVICES["cpu"].install()
for _name in ("cuda", "xpu"):
    _DEVICES[_name].stand_in()


def backend_info() -> BackendInfo:
    """What would run on this machine, and why. Settles it, and so initialises the GPUs."""
    devices, kernels = {}, {}
    for device_type, device in _DEVICES.items():
        if device_type == "cpu" or torch.get_device_module(device_type).is_available():
            decision = (
                decide("cpu") if device_type == "cpu" else device.install()
            )  # the CPU's instruction set can change
            devices[device_type] = (decision.implementation, decision.reason)
            kernels[device_type] = list(_kernel_lines(device_type, decision, device.rules))
        elif device_type == "cuda":
            reason = "torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            devices[device_type] = ("none", reason)
    return BackendInfo(devices, kernels)


def _kernel_lines(device_type: str, decision: Decision, rules: list[Rule]) -> Iterator[str]:
    """Which kernels the products of a GPU take, by rows of x."""
    for rule in rules:
        rows = "any rows" if rule.rows == ANY_ROWS else f"up to {rule.rows} rows"
        yield f"{rule.op} {rule.dtype}, {rows}: {rule.backend} ({rule.reason})"
    if decision.backend == "native" and device_type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        for op, dgrad in (("linear", False), ("linear_dgrad", True)):
            *bounded, last = cuda_library().choices(dgrad, _capabilities()[0], multiprocessors)
            for rows, kernel, reason in bounded:
                yield f"{op} bf16, fp16, up to {rows} rows of x: {kernel} ({reason})"
            yield f"{op} bf16, fp16, more rows: {last[1]} ({last[2]})"
