"""Who is measured on a GPU: ours, each kernel forced, Triton's and bitsandbytes."""

import importlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from nf4kernels.backends import native, select

from ..harness import BNB_DQ, OURS, Row


def optional(module: str, what: str) -> tuple[ModuleType | None, str | None]:
    """(the module, None), or (None, the reason why `what` is not measured)."""
    try:
        return importlib.import_module(module), None
    except ImportError as error:
        return None, f"{what} not measured: {error}"


bnb, BNB_MISSING = optional("bitsandbytes", "bitsandbytes is")
triton_backend, TRITON_MISSING = optional("nf4kernels.backends.triton", "our Triton kernels are")
Sides = dict[str, Callable[[], object]]
TRITON = "triton"  # our own kernels in Triton
FORCED = "kernel "
# The kernels that can be forced, and the largest M where each is worth its time: `any` is the plain one.
KERNELS = {"small": 16, "tiled": math.inf, "dequantize_gemm": math.inf, "any": 64}
GROUPED_KERNELS = {"small": math.inf, "tiled": math.inf}  # of experts


def cuda_library() -> native.CudaLibrary:
    """The one that runs here; exits with the reason where there is none."""
    library, obstacle = select.cuda_library()
    if library is None:
        raise SystemExit(f"no CUDA kernel can be forced: {obstacle}")
    return library


def forcing() -> Callable[..., AbstractContextManager]:
    """`native.running_kernel` of the CUDA library that runs here."""
    return partial(native.running_kernel, cuda_library().handle)


def is_ours(side: str) -> bool:
    return side in (OURS, TRITON) or side.startswith(FORCED)


def forced_sides(op: str, M: int) -> list[str]:
    """The kernels that run `op` and are worth their time at M rows; `small` is no dgrad's."""
    kernels = GROUPED_KERNELS if op.startswith("grouped") else KERNELS
    return [FORCED + name for name, most in kernels.items() if most >= M and not (name == "small" and "dgrad" in op)]


def forced_ms(row: Row) -> dict[str, float]:
    """kernel -> its time in this row."""
    return {side.removeprefix(FORCED): ms for side, ms in row.ms.items() if side.startswith(FORCED)}


def triton_side(run: Callable[[Mapping[str, Callable]], object]) -> Sides:
    """The side that `run` is with Triton's functions by op; none without Triton."""
    return {} if triton_backend is None else {TRITON: torch.no_grad()(lambda: run(triton_backend.OPS))}


def bnb_side(run: Callable[[], object]) -> Sides:
    """The side that `run` is; none without bitsandbytes."""
    return {} if bnb is None else {BNB_DQ: run}


def bnb_linear(x: Tensor, packed: Tensor, state) -> Tensor:
    return bnb.matmul_4bit(x, packed.t(), quant_state=state)


def bnb_dgrad(dy: Tensor, packed: Tensor, state) -> Tensor:
    """What its autograd does."""
    return dy @ bnb.functional.dequantize_4bit(packed, state)
