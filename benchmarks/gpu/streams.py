"""Split products on two streams at once: each result has the bits of the same product alone.

    python -m benchmarks.gpu.streams

What two launches could share by mistake is a workspace of partial sums or a counter of arrivals. The products are so
small that both streams' blocks are resident together; each is repeated, called and in captured graphs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

import nf4kernels as nf4

from . import sides
from .exact import name_of
from .records import OK, REFUSED, WRONG, Records
from .reuse import REFUSAL, Forced

SHAPE = (512, 4096)  # 16 to 32 tiles: with 4 splits a fraction of any card
REPETITIONS = 300
FORCED = tuple(Forced("small", -1, splits) for splits in (0, 2, 4, 8)) + tuple(Forced("tiled", 0, s) for s in (0, 2, 4))
Call = Callable[[], Tensor]


def products(ops, device: str, M: int, shape: tuple[int, int] = SHAPE) -> list[Call]:
    """Two, with weights and inputs of their own."""
    calls = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        q = nf4.quantize(torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()).to(device)
        x = torch.randn(M, shape[1], generator=generator).bfloat16().to(device)
        calls.append(lambda q=q, x=x: ops.linear(x, *q.op_args(), None))
    return calls


def check(
    what: str, calls: Sequence[Call], streams: Sequence[Callable[[], AbstractContextManager]],
    synchronize: Callable[[], None], records: Records, repetitions: int = REPETITIONS,
) -> None:  # fmt: skip
    """Each call alone, then all at once, each on its stream."""
    try:
        alone = [call() for call in calls]
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        records.add(what, REFUSED, str(error).splitlines()[0][-120:])
        return
    synchronize()
    results: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(repetitions):
        for call, stream, found in zip(calls, streams, results):
            with stream():
                found.append(call().clone())
    synchronize()
    wrong = sum(not torch.equal(one, right) for found, right in zip(results, alone) for one in found)
    records.add(what, WRONG if wrong else OK, f"{wrong} of {len(calls) * repetitions} differ" if wrong else "")


def captured(call: Call, stream: torch.cuda.Stream) -> Call:
    """The call as a graph, which writes into the same result each time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.streams", description=__doc__)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--seconds", type=float, default=20, help="in all (default: %(default)s)")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.seconds
    records, force, synchronize = Records("streams", args.records), sides.forcing(), torch.cuda.synchronize
    own = [torch.cuda.Stream() for _ in range(2)]
    streams = [lambda stream=stream: torch.cuda.stream(stream) for stream in own]
    for forced in FORCED:
        M = 16 if forced.kernel == "small" else 32
        calls = products(torch.ops.nf4kernels, "cuda", M)
        synchronize()
        if time.perf_counter() > deadline:
            records.add(name_of(forced), REFUSED, "no time was left for it")
            continue
        with force(*forced):
            check(name_of(forced), calls, streams, synchronize, records)
            try:
                graphs = [captured(call, stream) for call, stream in zip(calls, own)]
            except RuntimeError as error:
                if REFUSAL not in str(error):
                    raise
                continue
        check(f"{name_of(forced)}, in graphs", graphs, streams, synchronize, records)
    print(f"two streams at once: {records}", flush=True)
    raise SystemExit(1 if records.wrong else 0)


if __name__ == "__main__":
    main()
