"""nf4kernels recover: what quantization took from a model, back; an action a file."""

from types import ModuleType

from . import distill, plan, prune, qat, round

ACTIONS: tuple[ModuleType, ...] = (
    round,
    plan,
    distill,
    qat,
    prune,
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "recover",
        help="get back what quantization took: plans, distillation, training that rounds, pruning",
        description="Get back what quantization took from a model, or fit it into fewer bytes with less lost.",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    for action in ACTIONS:
        action.add_parser(actions)
