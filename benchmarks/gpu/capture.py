"""Products captured into a CUDA graph by the first call of a process, replayed with other inputs.

    python -m benchmarks.gpu.capture                  each case in a process of its own
    python -m benchmarks.gpu.capture --case linear

Nothing warms up: no kernel has run, no codebook is rounded and no workspace is there when the capture begins. Weights
are quantized on the CPU. Cases that end in cuBLAS are told apart by `dense`, a product of torch's own.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import nf4kernels as nf4

from .records import OK, REFUSED, WRONG, Records

N, K, RANK = 1024, 4096, 16
REPLAYS = 3
SECONDS = 20  # of a case's process
Run = Callable[[Tensor], Tensor]


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


def check(case: str, device: str, capture: Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]],
          records: Records, sizes: tuple[int, int] = (N, K)) -> None:  # fmt: skip
    """`capture` records a call without running it: (its result, what runs it again)."""
    M, build = runs(device, sizes)[case]
    run, width = build(), sizes[0] if case == "dgrad" else sizes[1]
    M = 40 if case == "dgrad" else M
    inputs = [torch.randn(M, width).bfloat16().to(device) for _ in range(REPLAYS)]
    x = inputs[0].clone()
    with torch.no_grad():
        try:
            result, replay = capture(lambda: run(x))
        except RuntimeError as error:
            # cuBLAS itself may refuse to begin within a capture
            records.add(case, REFUSED if case == "dense" else WRONG, str(error).splitlines()[0])
            return
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
                records.add(case, WRONG, f"replay {i} differs from the call by up to {difference:.3g}")
                return
    records.add(case, OK)


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
    args = parser.parse_args()
    if args.case:
        records = Records("capture", args.records)
        check(args.case, "cuda", capture_on_gpu, records)
        raise SystemExit(1 if records.wrong else 0)
    more = ["--records", str(args.records)] if args.records else []
    command = [sys.executable, "-m", "benchmarks.gpu.capture", *more, "--case"]
    processes = {case: subprocess.Popen([*command, case]) for case in runs("cpu")}
    raise SystemExit(wait_for(processes, Records("capture", args.records)))


def wait_for(processes: dict[str, subprocess.Popen], records: Records, seconds: float = SECONDS) -> int:
    """1 if one of them failed; one that does not end is killed and recorded."""
    failed = 0
    for case, process in processes.items():
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
            records.add(case, WRONG, f"did not end within {seconds:.0f} s")
        if status not in (0, 1) and status >= 0:
            records.add(case, WRONG, f"its process ended with status {status}")
        failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    main()
