"""Who runs each op on each device, and why.

A device's backend is the first of native (a compiled library), triton and reference (plain PyTorch) that runs there, or
the one that NF4KERNELS_BACKEND names and no other. Where both of the first two run, a measurement on the card may give
an op, a dtype and a range of rows to one of them. Which of its kernels a backend runs is predicted (csrc/cuda/choose.h,
tuned/) until it was measured on the card (tuned_files.py).

The CPU's backend is settled at import. A GPU's is settled when the first op comes to one: only an initialised device
tells what it is, and an import that initialised it would break every fork after it.
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from .. import reference
from ..ops import LIBRARY, OPS, SCHEMAS
from . import native
from .arguments import checked
from .registration import Registration, check_is_complete, stand_in
from .tuned_files import Found, card_of, measured_table
from .tuned_table import BACKENDS, Rule, by_rules

VARIABLE = "NF4KERNELS_BACKEND"
OLDEST = (8, 0)  # compute capability, of the CUDA library's kernels and of Triton's compiler
GPU_KEYS = {"cuda": "CUDA", "xpu": "XPU"}  # device type -> dispatch key; AMD's GPUs are torch's cuda too
NATIVE_NAMESPACE = "nf4kernels_native"  # of the CUDA library's ops where it shares a device with another backend
INT8_NAMESPACE = "nf4kernels_int8"  # of the ops that the CUDA library hands on: it has no kernel of int8 weights
INT8_OPS = (
    "quantize", "dequantize", "dequantize_out", "linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad",
)  # fmt: skip
REFERENCE = {op: checked(op, getattr(reference, op)) for op in OPS}
_NATIVE_SCHEMAS = torch.library.Library(NATIVE_NAMESPACE, "DEF")
_INT8_LIBRARY = torch.library.Library(INT8_NAMESPACE, "DEF")


@dataclass(frozen=True)
class Decision:
    """What runs on a kind of device; backend None: nothing, and every op there is an error."""

    backend: str | None
    implementation: str  # for people: "native sm_90a"
    reason: str


def _forced_backend() -> str | None:
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"nf4kernels: {VARIABLE} must be one of {' '.join(BACKENDS)} or unset, got {forced}")
    return forced


FORCED = _forced_backend()
native.cuda_is_wanted()  # a wrong value is an error now, not at the first op on a GPU
for _variable in (native.ISA_VARIABLE, native.PRODUCTS_VARIABLE):
    if FORCED not in (None, "native") and _variable in os.environ:
        raise ValueError(f"nf4kernels: {_variable} must be unset where {VARIABLE}={FORCED} is set")
CPU_LIBRARY = native.load_cpu() if FORCED in (None, "native") else None


def cpu_multiplies_bf16() -> bool:
    """Whether both our kernels and torch's oneDNN use the CPU's bf16 instructions, as the environment has them run.

    oneDNN alone does not tell: it says yes on any AVX-512, where it emulates them at a third of fp32's speed.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent where torch has no oneDNN
    return CPU_LIBRARY is not None and CPU_LIBRARY.isa.endswith("_bf16") and supported is not None and bool(supported())


@functools.cache
def cuda_library() -> tuple[native.CudaLibrary | None, str]:
    """`native.load_cuda`, when it is first asked for."""
    return native.load_cuda()


def loaded_cuda_library() -> native.CudaLibrary:
    """The library, where it was decided that it runs."""
    library, why_not = cuda_library()
    if library is None:
        raise RuntimeError(f"nf4kernels: {why_not}")
    return library


def decide(device_type: str) -> Decision:
    """What runs on all this machine's devices of a type; initialises them."""
    candidates = (FORCED,) if FORCED else [b for b in BACKENDS if (device_type, b) != ("cpu", "triton")]
    reasons = []
    for backend in candidates:
        obstacle = _obstacle(backend, device_type)
        if obstacle is None:
            reasons += [f"forced by {VARIABLE}"] if FORCED else []
            return Decision(backend, _implementation(backend, device_type), _reason(backend, device_type, reasons))
        reasons.append(f"not {backend}: {obstacle}")
    return Decision(None, "none", f"{VARIABLE}={FORCED}, and {obstacle}")


def available(device_type: str) -> list[str]:
    """The backends whose kernels run on the devices of a type, the reference apart, the forced one alone."""
    candidates = [b for b in BACKENDS if b != "reference" and FORCED in (None, b)]
    return [backend for backend in candidates if _obstacle(backend, device_type) is None]


def _obstacle(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on the devices of a type; None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type == "cpu":
            return native.NOT_BUILT if CPU_LIBRARY is None else None
        return _native_gpu_obstacle(device_type)
    if device_type == "cpu":
        return "Triton runs on GPUs"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter is wrong for bf16"
    if device_type == "cuda" and torch.version.hip is None:
        too_old = [capability for capability in _capabilities() if capability < OLDEST]
        if too_old:
            return "this device is sm_{}{}, and Triton needs sm_80".format(*too_old[0])
    try:
        triton_backend()
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def _native_gpu_obstacle(device_type: str) -> str | None:
    if device_type != "cuda" or torch.version.hip is not None:
        return "the compiled kernels are for NVIDIA's GPUs"
    library, why_not = cuda_library()
    if library is None:
        return why_not
    return next((why for code, why in map(library.code_for, _capabilities()) if code is None), None)


def _capabilities() -> list[tuple[int, int]]:
    """Of the CUDA devices. One that no kernel runs on, beside one that some do, has no say: an op on it is an error."""
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return [capability for capability in found if capability >= OLDEST] or found


def _implementation(backend: str, device_type: str) -> str:
    if backend == "reference":
        return "reference (plain PyTorch)"
    if backend == "triton":
        return "triton"
    if device_type == "cpu":
        return "native" if CPU_LIBRARY is None else f"native {CPU_LIBRARY.isa}"
    code_for = loaded_cuda_library().code_for
    return " ".join(["native", *dict.fromkeys(str(code_for(capability)[0]) for capability in _capabilities())])


def _reason(backend: str, device_type: str, reasons: list[str]) -> str:
    if device_type != "cpu":
        if backend == "native":
            why = (loaded_cuda_library().code_for(capability)[1] for capability in _capabilities())
            reasons = [*filter(None, dict.fromkeys(why)), *reasons]
        module = torch.get_device_module(device_type)
        reasons = [*dict.fromkeys(map(module.get_device_name, range(module.device_count()))), *reasons]
    elif backend == "native" and CPU_LIBRARY is not None:
        reasons = [CPU_LIBRARY.reason, *reasons]
    return "; ".join(reasons)


@functools.cache
def found_tables(device_type: str) -> tuple[Found, ...]:
    """What was measured on each of this machine's devices of a type, or on such a card; read once in a process."""
    if device_type not in GPU_KEYS:
        return ()
    count = torch.get_device_module(device_type).device_count()
    return tuple(measured_table(card_of(device_type, index)) for index in range(count))


def usable_tables(device_type: str) -> list[Found]:
    """`found_tables`, without what was measured of other CUDA kernels than the library's."""
    library = cuda_library()[0] if device_type == "cuda" and "native" in available(device_type) else None
    return [found if library is None else _of_the_library(found, library) for found in found_tables(device_type)]


def _of_the_library(found: Found, library: native.CudaLibrary) -> Found:
    if found.table is None:
        return found
    try:
        native.check_tiles(library.handle, found.table.cuda)
    except ValueError as error:
        name = f"the table of {found.table.card}, {found.table.origin}"
        why = f"{name}, is ignored for CUDA's kernels and the choice between backends: it {error}"
        table = replace(found.table, cuda={}, rules=())
        return replace(found, table=table, ignored="; ".join(filter(None, [found.ignored, why])))
    return found


def measured_rules(device_type: str) -> list[Rule]:
    """The measured choices between backends for this machine's devices of a type; none where one is forced."""
    tables = [] if FORCED else [found.table for found in usable_tables(device_type)]
    if not tables or tables[0] is None or any(table != tables[0] for table in tables):
        return []
    return [rule for rule in tables[0].rules if _obstacle(rule.backend, device_type) is None]


def ignored_tables(device_type: str) -> list[str]:
    """Why files of the user's cache, or some of their rows, are ignored."""
    return list(dict.fromkeys(found.ignored for found in usable_tables(device_type) if found.ignored))


def _tune_cuda_library() -> None:
    """Tells the library what was measured on each device."""
    handle = loaded_cuda_library().handle
    for index, found in enumerate(usable_tables("cuda")):
        if found.table is None:
            continue
        try:
            native.tune_cuda(handle, index, found.table.cuda, f"{found.source}, {found.table.origin}")
        except ValueError as error:
            text = f"the table of {found.table.card} is ignored for CUDA's kernels: it {error}"
            warnings.warn(f"nf4kernels: {text}", stacklevel=2)


def implement(device_type: str) -> Mapping[str, Callable] | None:
    """What `Registration` asks for; the CUDA library is told to register itself."""
    decision, rules = decide(device_type), measured_rules(device_type)
    if decision.backend is None:
        return {op: functools.partial(_refuse, op, decision.reason) for op in OPS}
    if decision.backend == "reference" and not FORCED:
        warnings.warn(f"nf4kernels: plain PyTorch runs on {device_type}: {decision.reason}", stacklevel=2)
    for ignored in ignored_tables(device_type):
        warnings.warn(f"nf4kernels: {ignored}", stacklevel=2)
    backends = {decision.backend, *(rule.backend for rule in rules)}
    if device_type == "cuda" and "native" in backends:
        _tune_cuda_library()
    if len(backends) > 1:
        kernels = {backend: kernels_of(backend) for backend in backends}
        return {op: by_rules(op, rules, {b: own[op] for b, own in kernels.items()}, decision.backend) for op in OPS}
    if decision.backend == "native":
        loaded_cuda_library().register("nf4kernels")
        return {}
    return None if decision.backend == "reference" else kernels_of(decision.backend)


def kernels_of(backend: str) -> Mapping[str, Callable]:
    """A backend's functions, by op, for a GPU."""
    if backend == "reference":
        return REFERENCE
    return _native_ops() if backend == "native" else check_is_complete(triton_backend().OPS, backend)


def triton_backend():
    from . import triton  # imports Triton itself, which nothing else needs

    return triton


@functools.cache
def int8_kernels(device_type: str) -> tuple[Mapping[str, Callable], str]:
    """What int8 weights run by where the CUDA library has the ops, and what that is called: Triton, else reference."""
    if device_type == "cpu":  # of the tests' host executor
        return REFERENCE, "reference"
    obstacle = _obstacle("triton", device_type)
    if obstacle is None:
        return kernels_of("triton"), "triton, as the CUDA library has no kernel of them"
    return REFERENCE, f"reference (plain PyTorch), as the CUDA library has no kernel of them; not triton: {obstacle}"


def _run_int8(op: str, tensor, *arguments, **keywords):
    return int8_kernels(tensor.device.type)[0][op](tensor, *arguments, **keywords)


for _schema in SCHEMAS:
    if _schema.partition("(")[0] in INT8_OPS:
        _INT8_LIBRARY.define(_schema)
for _op in INT8_OPS:
    _INT8_LIBRARY.impl(_op, functools.partial(_run_int8, _op), "CompositeExplicitAutograd")


def triton_choices():
    """Triton's backends/triton/choose.py, where `available` names Triton."""
    return triton_backend().choose


@functools.cache
def _native_ops() -> Mapping[str, Callable]:
    for schema in SCHEMAS:
        _NATIVE_SCHEMAS.define(schema)
    loaded_cuda_library().register(NATIVE_NAMESPACE)
    return {op: getattr(getattr(torch.ops, NATIVE_NAMESPACE), op).default for op in OPS}


def _refuse(op: str, reason: str, *arguments, **keywords):
    raise RuntimeError(f"nf4kernels.{op}: no backend runs on this device: {reason}")


REGISTRATIONS = {
    name: Registration("nf4kernels", key, functools.partial(implement, name)) for name, key in GPU_KEYS.items()
}
if FORCED == "triton" or (FORCED == "native" and CPU_LIBRARY is None):
    REGISTRATIONS["cpu"] = Registration("nf4kernels", "CPU", functools.partial(implement, "cpu"))
for _op in OPS:
    LIBRARY.impl(_op, stand_in("nf4kernels", _op, REFERENCE[_op], REGISTRATIONS), "CompositeExplicitAutograd")
