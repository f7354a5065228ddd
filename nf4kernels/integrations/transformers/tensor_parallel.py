"""`from_pretrained(..., distributed_config=DistributedConfig(tp_size=2))`: 4-bit layers are cut when they are loaded.

transformers cuts what it reads, before it is quantized: blocks, superblocks and their mean would be other ones. So its
rules for the layers that become 4-bit ones are set aside; each is read and quantized whole, on every rank the same, and
all are cut at the end.
"""

import re
from collections.abc import Iterable
from typing import Any

import transformers
from torch.distributed.tensor.parallel import parallelize_module

from ...distributed import tensor_parallel_plan

WHO = "nf4kernels.Nf4Config"
LEFT_WHOLE = "replicate"  # transformers' style that does nothing


def set_aside(model: Any, rules: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Take transformers' rules for the modules of these names out of `rules`, in place; those rules.

    Raises:
        ValueError: the configuration asks for what the loader cannot do with 4-bit layers.
    """
    asked = model.config.distributed_config
    for what, size in (("ep_size", asked.ep_size), ("fsdp_size", asked.dp_size), ("pp_size", asked.pp_size)):
        if size > 1:
            raise ValueError(
                f"{WHO}: {what} must be 1 where from_pretrained distributes a model in 4 bits, got {size} (load it"
                " whole, then parallelize_module with nf4kernels.distributed.ExpertParallel, or fully_shard)"
            )
    if isinstance(asked.tp_plan, dict) and asked.tp_plan:
        raise ValueError(
            f"{WHO}: tp_plan must be 'auto' where from_pretrained distributes a model in 4 bits, got"
            f" {', '.join(asked.tp_plan)} (load it whole, then parallelize_module with a plan of your own)"
        )
    ours = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    taken = {}
    for rule, style in rules.items():
        if rule in ours or rule.rpartition(".")[0] in ours:  # the second is a weight of experts
            taken[rule], rules[rule] = style, LEFT_WHOLE
    return taken


def check_asked(model: Any, taken: dict[str, str] | None) -> None:
    """ValueError where transformers distributes the model and did not ask for a plan first, as an older one."""
    if taken is None and getattr(model, "_device_mesh", None) is not None:
        raise ValueError(
            "transformers must be one that asks a quantizer for its plan to distribute a model in 4 bits, 5.24 does,"
            f" got {transformers.__version__} (load it whole, then parallelize_module)"
        )


def cut(model: Any, taken: dict[str, str]) -> None:
    """Cut the loaded model by these rules; each rank has the same bits, so that none are sent."""
    mesh = model._mesh_manager.get_mesh("tp")
    plan = tensor_parallel_plan(model, mesh, taken)
    parallelize_module(model, mesh, plan, src_data_rank=None)  # type: ignore[arg-type]  # a dict of styles is one
    model._tp_plan.update(taken)
