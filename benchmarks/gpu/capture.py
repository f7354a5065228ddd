"""Products captured into a CUDA graph by the first call of a process, replayed with other inputs.

    python -m benchmarks.gpu.capture                  each case in a process of its own
    python -m benchmarks.gpu.capture --case linear

Nothing warms up: no kernel has run, no codebook is rounded and no workspace is there when the capture begins. Weights
are quantized on the CPU. torch itself may refuse to begin with cuBLAS within a capture: `dense`, a product of its own,
is tried first, and where that is refused, so may be the cases that end in cuBLAS. Each of these is captured another
time after a product of torch's own, which alone has run then.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import nf4kernels as nf4

from .records import OK, REFUSED, WRONG, Records

N, K, RANK = 1024, 4096, 16
REPLAYS = 3
SECONDS = 30  # of all cases' processes
ENDS_IN_CUBLAS = ("lora", "dequantize + GEMM", "dense")
STATUS = {OK: 0, WRONG: 10, REFUSED: 11}  # with which a case's process ends; Python's own are 1 and 2
Run = Callable[[Tensor], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]


def runs(device: str, sizes: tuple[int, int] = (N, K)) -> dict[str, tuple[int, Callable[[], Run]]]:
    """case -> (M, what builds the function of x that is captured)"""
    rows, columns = sizes

    def weight():
        torch.manual_seed(0)
        return nf4.quantize(torch.randn(rows, columns).mul_(0.02).bfloat16()).to(device)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).mul_(0.02).bfloat16().to(device)

    def linear() -> Run:
        q, bias = weight(), random(rows)
        return lambda x: nf4.linear(x, q, bias)

    def lora() -> Run:
        q, A, B = weight(), random(RANK, columns), random(rows, RANK)
        return lambda x: nf4.lora_linear(x, q, A, B, 2.0)

    def dgrad() -> Run:
        q = weight()
        return lambda dy: torch.ops.nf4kernels.linear_dgrad(dy, *q.op_args())

    def dense() -> Run:
        w = random(rows, columns)
        return lambda x: torch.nn.functional.linear(x, w)

    return {"linear": (1, linear), "linear 40": (40, linear), "lora": (4, lora), "dgrad": (rows, dgrad),
            "dequantize + GEMM": (2100, linear), "dense": (40, dense)}  # fmt: skip


def check(
    case: str, device: str, capture: Capture, records: Records, sizes: tuple[int, int] = (N, K), is_warm: bool = False,
    may_refuse: bool = False,
) -> str:  # fmt: skip
    """`capture` records a call without running it: (its result, what runs it again). Returns what was recorded.

    is_warm: torch's own product has run before. may_refuse: torch refused to capture that as a first call.
    """
    M, build = runs(device, sizes)[case]
    run, width = build(), sizes[0] if case == "dgrad" else sizes[1]
    M = 40 if case == "dgrad" else M
    what = f"{case}, cuBLAS warm" if is_warm else case
    inputs = [torch.randn(M, width).bfloat16().to(device) for _ in range(REPLAYS)]
    x = inputs[0].clone()

    def found(verdict: str, detail: str = "") -> str:
        records.add(what, verdict, detail)
        return verdict

    with torch.no_grad():
        if is_warm:
            torch.nn.functional.linear(inputs[0], inputs[0])
        try:
            result, replay = capture(lambda: run(x))
        except RuntimeError as error:
            is_torchs = not is_warm and (case == "dense" or (may_refuse and case in ENDS_IN_CUBLAS))
            why = "torch's own limit: " if is_torchs else ""
            return found(REFUSED if is_torchs else WRONG, why + str(error).splitlines()[0])
        replayed = []
        for new in inputs:
            x.copy_(new)
            result.zero_()
            replay()
            replayed.append(result.clone())
        for i, (new, got) in enumerate(zip(inputs, replayed)):
            x.copy_(new)
            expected = run(x)
            if not torch.equal(got, expected):
                difference = (got.double() - expected.double()).abs().max().item()
                return found(WRONG, f"replay {i} differs from the call by up to {difference:.3g}")
    return found(OK)


def capture_on_gpu(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.capture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", type=Path)
    parser.add_argument("--case")
    parser.add_argument("--warm", action="store_true", help="cuBLAS, by a product of torch's own")
    parser.add_argument("--may-refuse", action="store_true", help="torch refused to capture a first call of cuBLAS")
    args = parser.parse_args()
    records = Records("capture", args.records)
    if args.case:
        verdict = check(args.case, "cuda", capture_on_gpu, records, is_warm=args.warm, may_refuse=args.may_refuse)
        raise SystemExit(STATUS[verdict])
    more = ["--records", str(args.records)] if args.records else []

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.capture", *more, *arguments])

    raise SystemExit(check_each(start, records))


def check_each(start: Callable[..., subprocess.Popen], records: Records, seconds: float = SECONDS) -> int:
    """Every case in a process that `start` starts; 1 if one of them failed."""
    deadline = time.monotonic() + seconds
    dense = start("--case", "dense")
    failed = wait_for({"dense": dense}, records, seconds)
    may_refuse = ["--may-refuse"] if dense.returncode == STATUS[REFUSED] else []
    processes = {case: start("--case", case, *may_refuse) for case in runs("cpu") if case != "dense"}
    processes |= {f"{case}, cuBLAS warm": start("--case", case, "--warm") for case in ENDS_IN_CUBLAS}
    return failed | wait_for(processes, records, deadline - time.monotonic())


def wait_for(processes: dict[str, subprocess.Popen], records: Records, seconds: float = SECONDS) -> int:
    """1 if one of them failed; one that does not end within the seconds of all is killed and recorded."""
    failed, deadline = 0, time.monotonic() + seconds
    for case, process in processes.items():
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
            records.add(case, WRONG, f"did not end within {seconds:.0f} s")
        else:
            if status not in STATUS.values():
                records.add(case, WRONG, f"its process ended with status {status}")
        failed |= status not in (STATUS[OK], STATUS[REFUSED])
    return int(failed)


if __name__ == "__main__":
    main()
