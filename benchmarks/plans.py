"""Which weights, ops and rows a run measures, by what was selected on the command line."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

from . import forced
from .harness import DTYPES, Plan
from .shapes import FOCUS, LONG, layer_names

ALL_M = {"linear": (1, 4, 16, 64, 512), "linear_dgrad": (16, 64, 512), "lora": (16, 64, 512)}
LONG_M = (1, 2, 3, 4)  # of linear, of the weights with long rows
FEWER_M = {"linear": (1, 64), "linear_dgrad": (64,)}  # of the shapes that are not in focus; no other op is measured
Work = tuple[tuple[int, int], str, list[tuple[str, Plan]]]  # a weight, the dtype of x, and a plan of each op


def work(args: argparse.Namespace, ops: tuple[str, ...]) -> Iterator[Work]:
    dtype = args.dtype or "bf16"
    for weight in args.shapes or dict.fromkeys((*layer_names(), *LONG)):
        chosen = [op for op in ops if not args.ops or op in args.ops]
        planned = [(op, plan) for op in chosen for plan in _plans(op, weight, dtype, args)]
        if planned:
            yield weight, dtype, planned


def _plans(op: str, weight: tuple[int, int], dtype: str, args: argparse.Namespace) -> Iterator[Plan]:
    caches = (
        (args.cache,) if args.cache else ("out", "in") if args.all or args.shapes or weight == FOCUS[0] else ("out",)
    )
    if args.all or args.shapes or weight in FOCUS:
        yield Plan(args.rows or ALL_M.get(op, ()), args.threads, caches, args.seconds, dtype)
        return
    if op not in FEWER_M or args.cache == "in":
        return
    rows = args.rows or FEWER_M[op]
    if weight in LONG and op == "linear":
        yield Plan(args.rows or LONG_M, args.threads, ("out",), args.seconds, dtype)
        rows = tuple(M for M in rows if M not in LONG_M and not args.rows)
    if weight in layer_names() and rows:
        yield Plan(rows, args.threads_given or args.threads[:1], ("out",), args.seconds, dtype)


def forced_work(args: argparse.Namespace) -> Iterator[Work]:
    """With --isa: what was selected, else every dtype at the first of forced.SHAPES and bf16 forward at the others."""
    for weight in args.shapes or forced.SHAPES:
        whole = args.shapes or weight == forced.SHAPES[0]
        dtypes = (args.dtype,) if args.dtype else DTYPES if whole else ("bf16",)
        ops = [op for op in forced.ROWS if op in (args.ops or (forced.ROWS if whole else ("linear",)))]
        for dtype in dtypes:
            plan = Plan((), args.threads, (args.cache or "out",), forced.SECONDS, dtype, forced.SECONDS)
            yield weight, dtype, [(op, replace(plan, rows=args.rows or forced.ROWS[op])) for op in ops]
