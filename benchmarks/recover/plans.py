"""Print what plans are expected to cost beside what they cost, and what layers are told to beside what is measured.

    python -m benchmarks.recover.plans

The measured KL of plans is that of the rows in results/recover.csv; the layers' is measured here, in NF4.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from nf4kernels import recover
from nf4kernels.recover import Candidate

from ..report.tables import markdown
from . import table
from .makers import sensitivities
from .setting import Setting
from .ways import PLANS, plan_name

NF4 = Candidate({"codebook": "nf4", "block_size": 64})


def plans(setting: Setting) -> str:
    found = sensitivities(setting)
    measured = {record.way: record for record in table.read()}
    lines = []
    for bits in PLANS:
        plan = recover.make_plan(found, bits)
        record = measured[plan_name(bits)]
        dropped = sum(candidate.dropped for candidate in plan.layers.values())
        lines.append((f"{bits}", f"{plan.nbytes / 1e6:.2f}", f"{dropped}", f"{plan.kl:.3f}", f"{record.kl:.3f}"))
    return markdown(("bits a weight", "MB of layers", "dropped layers", "expected KL", "measured KL"), lines)


def layers(setting: Setting) -> str:
    """The layers' KL in NF4, measured and told by Fisher's information."""
    found, seconds = {}, {}
    for method in ("measured", "fisher"):
        began = time.perf_counter()
        options = sensitivities(setting, [NF4], method, drops=False).options
        found[method], seconds[method] = np.array([option.kl for option in options]), time.perf_counter() - began
    measured, told = found["measured"], found["fisher"]
    ratio = np.log(told / measured)
    correlation = np.corrcoef(np.log(measured), np.log(told))[0, 1]
    return (
        f"{len(told)} groups of layers, measured from {measured.min():.1e} to {measured.max():.1e} nats;"
        f" correlation of the logarithms {correlation:.2f}; told / measured {np.exp(ratio.mean()):.2f} in the geometric"
        f" mean, {np.exp(ratio.min()):.2f} to {np.exp(ratio.max()):.2f}, within 1.3 for"
        f" {(abs(ratio) < np.log(1.3)).sum()}; sums {told.sum():.3f} and {measured.sum():.3f};"
        f" {seconds['fisher']:.0f} and {seconds['measured']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recover.plans", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the model is (default: %(default)s)")
    setting = Setting(parser.parse_args().cache)
    print(plans(setting))
    print(layers(setting))


if __name__ == "__main__":
    main()
