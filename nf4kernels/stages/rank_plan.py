"""What one of many ranks takes for a training step, by formula and by simulation, and what it sends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import StageError
from .estimate import DTYPES, Built, Estimate, Options, read_config
from .simulated_ranks import Simulated, Step, simulate

NODE = 8  # GPUs that are in one machine
WITHIN_NODE = {"nvlink": 450.0, "pcie5": 55.0}  # GB/s each way, of one GPU
BETWEEN_NODES = {"8x400g": 360.0, "400g": 45.0, "25g": 2.8}  # GB/s each way, of one machine
LINKS = {**WITHIN_NODE, **BETWEEN_NODES}


@dataclass(frozen=True)
class RankPlan:
    """A rank's step under FSDP2: estimated, and simulated."""

    estimate: Estimate
    simulated: Simulated

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step of all its micro-batches."""
        return self.simulated.sent * self.estimate.options.accumulation

    def seconds(self, link: str) -> float | None:
        """The time that the exchange takes in a ring, which is as fast as its slowest link; None: it does not reach."""
        if link in WITHIN_NODE and self.simulated.ranks > NODE:
            return None
        return self.sent / (speed(link) * 1e9)

    def as_dict(self, links: Sequence[str]) -> dict[str, Any]:
        """For JSON."""
        simulated = {"ranks": self.simulated.ranks, "peak": self.simulated.peak, "parts": self.simulated.parts}
        exchanged = {"gathered": self.simulated.gathered, "reduced": self.simulated.reduced, "sent": self.sent}
        seconds = {link: self.seconds(link) for link in links}
        return {**simulated, **exchanged, "seconds": seconds, "estimate": self.estimate.as_dict()}


def speed(link: str) -> float:
    """GB/s of a link by its name, or of one that is said as a number.

    Raises:
        StageError: it is neither.
    """
    try:
        found = LINKS[link] if link in LINKS else float(link)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise StageError(f"--link must be one of {', '.join(LINKS)} or a number of GB/s, got {link}")
    return found


def rank_plans(
    config: Path | dict[str, Any],
    ranks: Sequence[int],
    batches: Sequence[int],
    lengths: Sequence[int],
    adapter_ranks: Sequence[int],
    options: Options | None = None,
) -> Iterator[RankPlan]:
    """One for each number of ranks of every adapter rank, batch and length, in that order of nesting.

    Raises:
        StageError: as `estimate`; or `ranks` has a number below 1, or the options are not FSDP2's.
    """
    options = options or Options()
    for count in ranks:
        if count < 1:
            raise StageError(f"--ranks must be 1 or more, got {count}")
    if options.gpus != 1:
        raise StageError("--ranks and --gpus must not both be given: the one simulates what the other estimates")
    if options.shard != "fsdp2":
        raise StageError(f"--ranks simulates FSDP2, so --shard must be fsdp2, got {options.shard}")
    if options.offload_activations:
        raise StageError("--ranks simulates what stays on the device, so --offload-activations must be left out")
    cases = [
        [replace(options, rank=rank, batch=batch, length=length) for batch in batches for length in lengths]
        for rank in adapter_ranks
    ]
    return _rank_plans(read_config(config), ranks, cases)


def _rank_plans(config: Any, ranks: Sequence[int], cases: list[list[Options]]) -> Iterator[RankPlan]:
    for of_rank in cases:
        built = Built(config, of_rank[0])
        for case in of_rank:
            for count in ranks:
                yield _rank_plan(built, replace(case, gpus=count))


def _rank_plan(built: Built, options: Options) -> RankPlan:
    estimated = built.estimate(options)
    numbers = estimated.adapters // DTYPES[options.adapter_dtype].itemsize
    step = Step(
        options.batch, options.length, options.optimizer, estimated.optimizer / numbers,
        DTYPES[options.dtype] if options.device == "cuda" else None, options.accumulation > 1,
        options.reshard_after_forward, options.mixed_precision,
    )  # fmt: skip
    built.prepare_training(options)
    try:
        return RankPlan(estimated, simulate(built.peft, options.gpus, step))
    except StageError:
        raise
    except Exception as error:  # a model's own code on tensors without values
        line = str(error).strip().split("\n")[0]
        raise StageError(f"a {built.model.config.model_type} cannot be simulated: {line}") from None
