"""An aarch64 machine for the ops: ops.cpp under qemu, one process for each model of CPU, called as torch.ops is."""

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from arm.build import QEMU
from torch import Tensor

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64)


class Machine:
    """`machine.linear(x, *qweight.op_args(), None)` and the other ops of ops.cpp, with their arguments in full."""

    def __init__(self, program: Path, cpu: str) -> None:
        self.cpu = cpu
        self.process = subprocess.Popen(
            [QEMU, "-cpu", cpu, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def close(self) -> None:
        self.process.communicate(timeout=60)

    @property
    def isas(self) -> list[str]:
        return _text(self._call("isas", ())).split()

    @property
    def isa(self) -> str:
        return _text(self._call("isa", ()))

    def force_isa(self, name: str) -> str:
        """The error, or nothing."""
        return _text(self._call("force_isa", (torch.frombuffer(bytearray(name.encode()), dtype=torch.uint8),)))

    @contextmanager
    def running(self, isa: str) -> Iterator[None]:
        best = self.isa
        assert not self.force_isa(isa)
        yield
        assert self.isa == isa, "something changed the instruction set during the test"
        assert not self.force_isa(best)

    def quantize(self, weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Both flat."""
        return self._call("quantize", (weight, code, block_size))

    def quantize_absmax(self, absmax: Tensor, scale_code: Tensor, scale_is_e4m3: bool) -> tuple[Tensor, ...]:
        return self._call("quantize_absmax", (absmax, scale_code, scale_is_e4m3))

    def dequantize(self, *arguments) -> Tensor:
        return self._call("dequantize", arguments)[0]

    def linear(self, x, *rest, bias=None, inner=None, factor=None, scaling=1.0) -> Tensor:
        return self._call("linear", (x, *rest, bias, inner, factor, scaling))[0]

    def linear_dgrad(self, dy, *rest, inner=None, factor=None, scaling=1.0) -> Tensor:
        return self._call("linear_dgrad", (dy, *rest, inner, factor, scaling))[0]

    def grouped_linear(self, x, *rest, bias=None, inner=None, factor=None, scaling=1.0) -> Tensor:
        return self._call("grouped_linear", (x, *rest, bias, inner, factor, scaling))[0]

    def grouped_linear_dgrad(self, dy, *rest, inner=None, factor=None, scaling=1.0) -> Tensor:
        return self._call("grouped_linear_dgrad", (dy, *rest, inner, factor, scaling))[0]

    def lora_grad(self, small, wide, scaling, dtype, transposed=False) -> Tensor:
        return self._call("lora_grad", (small, wide, scaling, dtype, transposed))[0]

    def grouped_lora_grad(self, small, wide, offsets, scaling, dtype, transposed=False) -> Tensor:
        return self._call("grouped_lora_grad", (small, wide, offsets, scaling, dtype, transposed))[0]

    def grouped_lora_inner(self, x, offsets, factor, transposed=False) -> Tensor:
        return self._call("grouped_lora_inner", (x, offsets, factor, transposed))[0]

    def combine_experts(self, rows, positions, weights, dtype) -> Tensor:
        return self._call("combine_experts", (rows, positions, weights, dtype))[0]

    def combine_experts_dgrad(self, dout, positions, weights, dtype) -> Tensor:
        return self._call("combine_experts_dgrad", (dout, positions, weights, dtype))[0]

    def combine_experts_wgrad(self, dout, rows, positions, dtype) -> Tensor:
        return self._call("combine_experts_wgrad", (dout, rows, positions, dtype))[0]

    def _call(self, op: str, arguments: tuple) -> tuple[Tensor, ...]:
        request = b"".join([op.encode(), b"\n", _integers(len(arguments)), *map(_encoded, arguments)])
        self.process.stdin.write(request)
        self.process.stdin.flush()
        return tuple(self._tensor() for _ in range(self._integer()))

    def _read(self, nbytes: int) -> bytes:
        data = self.process.stdout.read(nbytes)
        if len(data) < nbytes:
            raise RuntimeError(f"the program ended under qemu-aarch64 -cpu {self.cpu}: {self.process.wait()}")
        return data

    def _integer(self) -> int:
        return struct.unpack("<q", self._read(8))[0]

    def _tensor(self) -> Tensor:
        dtype = ELEMENTS[self._integer()]
        shape = [self._integer() for _ in range(self._integer())]
        out = torch.zeros(shape, dtype=dtype)
        data = self._read(out.numel() * out.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else out


def _integers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _encoded(argument) -> bytes:
    if argument is None:
        return b"n"
    if isinstance(argument, torch.dtype):
        return b"i" + _integers(ELEMENTS.index(argument))
    if isinstance(argument, int):
        return b"i" + _integers(argument)
    if isinstance(argument, float):
        return b"d" + struct.pack("<d", argument)
    data = argument.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return b"t" + _integers(ELEMENTS.index(argument.dtype), argument.dim(), *argument.shape) + data


def _text(result: tuple[Tensor, ...]) -> str:
    return bytes(result[0].tolist()).decode()
