"""A machine for the ops: ops.cpp as a process, under qemu or as it is, called as torch.ops is."""

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from arm.build import QEMU
from torch import Tensor

from nf4kernels.ops import SCHEMAS

# Every argument of an op, as nf4kernels/ops.py has them, and the values of the last ones where they are left out.
ARGUMENTS = {op.partition("(")[0]: op.partition(") ->")[0].split(",") for op in SCHEMAS}
DEFAULTS = {
    "linear": (None, None, None, 1.0),
    "linear_dgrad": (None, None, 1.0),
    "grouped_linear": (None, None, None, 1.0),
    "grouped_linear_dgrad": (None, None, 1.0),
    "lora_grad": (False,),
    "grouped_lora_inner": (False,),
    "grouped_lora_grad": (False,),
}
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64)


class Machine:
    """`machine.run("linear", x, *qweight.op_args(), None)`, and the other ops of ops.cpp."""

    def __init__(self, program: Path, cpu: str = "") -> None:
        """`cpu` is qemu's model of one; empty: the program runs on this processor."""
        self.command = [*([QEMU, "-cpu", cpu] if cpu else []), str(program)]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

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
        """By this instruction set, forced, and proven to have been so all the time."""
        best = self.isa
        assert not self.force_isa(isa)
        yield
        assert self.isa == isa, "something changed the instruction set during the test"
        assert not self.force_isa(best)

    def run(self, op: str, *arguments):
        """The op's result; quantize's two are flat."""
        defaults = DEFAULTS.get(op, ())
        missing = len(ARGUMENTS[op]) - len(arguments)
        result = self._call(op, arguments + defaults[len(defaults) - missing :])
        return result if len(result) > 1 else result[0]

    def _call(self, op: str, arguments: tuple) -> tuple[Tensor, ...]:
        request = b"".join([op.encode(), b"\n", _integers(len(arguments)), *map(_encoded, arguments)])
        self.process.stdin.write(request)
        self.process.stdin.flush()
        return tuple(self._tensor() for _ in range(self._integer()))

    def _read(self, nbytes: int) -> bytes:
        data = self.process.stdout.read(nbytes)
        if len(data) < nbytes:
            raise RuntimeError(f"{' '.join(self.command)} ended: {self.process.wait()}")
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
