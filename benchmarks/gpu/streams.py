"""Split products on two streams at once: each result has the bits of the same product alone.

    python -m benchmarks.gpu.streams

What two launches could share by mistake is a workspace of partial sums or a counter of arrivals. The products are so
small that both streams' blocks are resident together; each is repeated, called and in captured graphs.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import nf4kernels as nf4

from . import sides
from .exact import name_of
from .records import OK, REFUSED, WRONG, Records
from .reuse import REFUSAL, Forced

SHAPE = (512, 4096)  # at most 16 tiles, whose contraction several blocks share: a fraction of a large card
REPETITIONS = 300
INPUTS = 2  # of each product, in turn, so that what is left of the repetition before shows
# Rows and kernel: the tiles of small have 8 rows or 16; it shares its contraction out by itself.
FORCED = ((5, Forced("small")), (16, Forced("small")), *((32, Forced("tiled", 0, splits)) for splits in (0, 2, 4)))
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    call: Call
    inputs: tuple[Tensor, ...]


def products(ops, device: str, M: int, shape: tuple[int, int] = SHAPE) -> list[Product]:
    """Two, with weights and inputs of their own."""
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        q = nf4.quantize(torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()).to(device)
        inputs = tuple(torch.randn(M, shape[1], generator=generator).bfloat16().to(device) for _ in range(INPUTS))
        found.append(Product(lambda x, q=q: ops.linear(x, *q.op_args(), None), inputs))
    return found


def alone(some: Sequence[Product], synchronize: Callable[[], None]) -> list[list[Tensor]]:
    """The result of each product for each of its inputs, one after the other."""
    right = []
    for product in some:
        right.append([])
        for x in product.inputs:
            right[-1].append(product.call(x).clone())
            synchronize()
    return right


def check(
    what: str, some: Sequence[Product], right: Sequence[Sequence[Tensor]],
    streams: Sequence[Callable[[], AbstractContextManager]], synchronize: Callable[[], None], records: Records,
    repetitions: int = REPETITIONS,
) -> None:  # fmt: skip
    """All at once, each on its stream, against the results that they have alone."""
    results: list[list[Tensor]] = [[] for _ in some]
    for i in range(repetitions):
        for product, stream, found in zip(some, streams, results):
            with stream():
                found.append(product.call(product.inputs[i % INPUTS]).clone())
    synchronize()
    wrong = sum(
        not torch.equal(one, expected[i % INPUTS])
        for found, expected in zip(results, right)
        for i, one in enumerate(found)
    )
    records.add(what, WRONG if wrong else OK, f"{wrong} of {len(some) * repetitions} differ" if wrong else "")


def captured(product: Product, stream: torch.cuda.Stream) -> Product:
    """The product as a graph, which reads the same input and writes the same result each time."""
    x, graph = product.inputs[0].clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        result = product.call(x)
    return Product(replaying(graph.replay, x, result), product.inputs)


def replaying(replay: Callable[[], None], x: Tensor, result: Tensor) -> Call:
    """A function of what is to be in `x`; an element of the result that the replay does not write is NaN."""

    def call(new: Tensor) -> Tensor:
        x.copy_(new)
        result.fill_(torch.nan)
        replay()
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.streams", description=__doc__)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--seconds", type=float, default=20, help="in all (default: %(default)s)")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.seconds
    records, force, synchronize = Records("streams", args.records), sides.forcing(), torch.cuda.synchronize
    own = [torch.cuda.Stream() for _ in range(2)]
    streams = [lambda stream=stream: torch.cuda.stream(stream) for stream in own]
    for M, forced in FORCED:
        what = f"{name_of(forced)}, M={M}"
        if time.perf_counter() > deadline:
            records.add(what, REFUSED, "no time was left for it")
            continue
        some = products(torch.ops.nf4kernels, "cuda", M)
        with force(*forced):
            try:
                right = alone(some, synchronize)
            except RuntimeError as error:
                if REFUSAL not in str(error):
                    raise
                records.add(what, REFUSED, str(error).splitlines()[0][-120:])
                continue
            check(what, some, right, streams, synchronize, records)
            graphs = [captured(product, stream) for product, stream in zip(some, own)]
        check(f"{what}, in graphs", graphs, right, streams, synchronize, records)
    print(f"two streams at once: {records}", flush=True)
    raise SystemExit(1 if records.wrong else 0)


if __name__ == "__main__":
    main()
