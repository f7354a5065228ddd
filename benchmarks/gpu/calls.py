"""Kernel launches and allocations of one linear and one lora_linear on a CUDA device, counted without one.

    python -m benchmarks.gpu.calls [--shape 4096x4096] [--arch 90] [--multiprocessors 132]

The package's own bindings and launchers run for the host executor (tests/executor), which logs each launch without
running it. What torch does beside them, in Python or called from the bindings, is seen by a dispatch mode: a view
launches nothing, another op once, and a product with a bias twice where torch's cuBLAS path copies the bias first. An
allocation is a tensor with a storage of its own that an op returns. Not counted: the bias' gradient, which is a sum.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nf4kernels as nf4
from nf4kernels import autograd, autograd_lora, functional, grouped
from nf4kernels.model.report import table as aligned

from .launches import slices_of_a_device

ROOT = Path(__file__).parents[2]
ROWS = (1, 16, 64, 2048)
RANK, SCALING = 16, 2.0
OPS = ("linear", "linear_dgrad", "lora_grad")
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
PRODUCTS = ("mm", "addmm", "linear", "matmul")


@dataclass
class Count:
    launches: int = 0
    allocations: int = 0
    names: Counter[str] = field(default_factory=Counter)  # of the launches

    def __str__(self) -> str:
        return f"{self.launches} / {self.allocations}"

    def launched(self, name: str, times: int) -> None:
        self.launches += times
        self.names[name] += times

    def listed(self) -> str:
        return ", ".join(name if times == 1 else f"{times} {name}" for name, times in self.names.items())


class Recorder(TorchDispatchMode):
    """Counts what torch does; the ops of `namespace` run, and what they call of torch is counted as well."""

    def __init__(self, namespace: str):
        super().__init__()
        self.namespace, self.count = namespace, Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == self.namespace:
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = {_storage(t) for t in _tensors([args, list(kwargs.values())])}
        results = self.without_arithmetic(name, func, args, kwargs)
        fresh = {_storage(t) for t in _tensors([results])} - given
        self.count.allocations += len(fresh)
        if not func.is_view and name not in ALLOCATING and (fresh or _writes(func)):
            self.count.launched(name, 2 if self.copies_bias(name, args, kwargs) else 1)
        return results

    @staticmethod
    def copies_bias(name: str, args: Any, kwargs: Any) -> bool:
        """cuBLASLt adds a vector to a contiguous result alone; for another torch writes it there first."""
        out = kwargs.get("out")
        biases = [t for t in _tensors([args]) if t.dim() == 1]
        return name in PRODUCTS and bool(biases) and out is not None and not out.is_contiguous()

    @staticmethod
    def without_arithmetic(name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Products would take minutes, and nobody looks at their numbers."""
        if name not in PRODUCTS:
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        a, b = args[-2:]
        return a.new_empty(a.shape[0], b.shape[1])


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _writes(func: Any) -> bool:
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)


@contextmanager
def ops_of(namespace: str) -> Iterator[None]:
    """The functions of the package on the ops of this namespace, and as on a device that is no CPU."""
    ops, modules = getattr(torch.ops, namespace), (autograd, autograd_lora, functional, grouped)
    names = [(module, f"_{op}", getattr(ops, op).default) for op in OPS for module in modules]
    replaced = [(module, name, op) for module, name, op in names if hasattr(module, name)]
    replaced.append((autograd_lora, "_multiplies_as_one_expert", lambda x: False))
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, op in replaced:
        setattr(module, name, op)
    yield
    for module, name, op in before:
        setattr(module, name, op)


def counted(executor: Any, namespace: str, call: Any) -> tuple[Count, Any]:
    """What the call launches and allocates, and its result."""
    executor.reset()
    with executor.planning(), ops_of(namespace), Recorder(namespace) as recorder:
        result = call()
    for launch in executor.launches():
        recorder.count.launched(launch.kernel.partition("<")[0], launch.count)
    return recorder.count, result


Table = dict[tuple[int, bool, bool], tuple[Count, Count]]  # (M, LoRA, bias) -> forward, backward


def table(executor: Any, namespace: str, N: int, K: int, rows: Sequence[int] = ROWS) -> Table:
    """Of double-quantized NF4 and x in bf16. The backward is that of x and of the adapter."""
    with slices_of_a_device(executor.library):
        return _table(executor, namespace, N, K, rows)


def _table(executor: Any, namespace: str, N: int, K: int, rows: Sequence[int]) -> Table:
    qweight = nf4.quantize(torch.zeros(N, K, dtype=torch.bfloat16))
    factors = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((RANK, K), (N, RANK))]
    some_bias = torch.zeros(N, dtype=torch.bfloat16)
    counts = {}
    for M, lora, has_bias in itertools.product(rows, (False, True), (False, True)):
        x = torch.zeros(M, K, dtype=torch.bfloat16, requires_grad=True)
        bias = some_bias if has_bias else None
        call = partial(nf4.lora_linear, x, qweight, *factors, SCALING) if lora else partial(nf4.linear, x, qweight)
        ahead, y = counted(executor, namespace, partial(call, bias=bias))
        wanted, dy = (x, *factors) if lora else (x,), torch.zeros(M, N, dtype=torch.bfloat16)
        back, _ = counted(executor, namespace, partial(torch.autograd.grad, y, wanted, dy))
        counts[M, lora, has_bias] = (ahead, back)
    return counts


def lines(counts: Table) -> list[tuple[str, ...]]:
    yes = {False: "", True: "yes"}
    header = ("M", "LoRA", "bias", "forward", "backward", "kernels forward", "kernels backward")
    return [header] + [
        (str(M), yes[lora], yes[bias], str(ahead), str(back), ahead.listed(), back.listed())
        for (M, lora, bias), (ahead, back) in counts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="4096x4096", metavar="NxK")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--multiprocessors", type=int, default=132)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from support import cuda_backend

    executor = cuda_backend.load()
    executor.library.nf4kernels_executor_device(args.arch, args.multiprocessors)
    N, K = map(int, args.shape.split("x"))
    print("launches / allocations, of one call")
    print(aligned(lines(table(executor, cuda_backend.NAMESPACE, N, K)), left=(1, 2, 5, 6)))


if __name__ == "__main__":
    main()
