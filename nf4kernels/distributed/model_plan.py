"""tensor_parallel_plan: transformers' own plan of a model, in our styles, checked as a whole before anything is cut."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn.quant_experts import QuantExperts
from ..nn.quant_linear import QuantLinear
from .cutting import COLUMNS, ROWS
from .expert_parallel import ExpertParallel, experts_problem
from .tensor_parallel import ColwiseParallel, RowwiseParallel, layer_problem

WHO = "nf4kernels.distributed.tensor_parallel_plan"
BY_ROWS = ("colwise", "colwise_rep", "colwise_gather_output")
BY_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_rowwise")
EXPERTS = "moe_tp_experts"
WHOLE = ("replicate", "replicated_with_grad_allreduce")  # parameters that each rank keeps


def tensor_parallel_plan(
    model: nn.Module, device_mesh: DeviceMesh, plan: Mapping[str, str] | None = None
) -> dict[str, ParallelStyle]:
    """name of a module -> its style, for `parallelize_module(model, device_mesh, ...)`; changes nothing.

    Args:
        model: of transformers, quantized; adapters of `add_lora`'s may be on it.
        device_mesh: of one dimension.
        plan: module names, `*` for a layer's number -> transformers' names of styles. None is what the model has as
            `tp_plan`, which comes from its configuration.

    Returns:
        A style for each linear layer, embedding and QuantExperts that the plan names; all else stays whole on each
        rank, and so does what shares its weight with another module. Experts get `ExpertParallel` with the same tokens
        on every rank.

    Raises:
        ValueError: the model has no plan, the plan has a style that is none of these, or a layer cannot be cut into so
            many parts; a part of attention must be whole heads.
    """
    rules = dict(getattr(model, "tp_plan", None) or {} if plan is None else plan)
    if not rules:
        raise ValueError(f"{WHO}: the model must have a tp_plan, got {type(model).__name__}, which has none")
    if device_mesh.ndim != 1:
        raise ValueError(
            f"{WHO}: device_mesh must have one dimension (mesh['tp'] of a larger one), got {device_mesh.ndim}"
        )
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    ranks, styles = device_mesh.size(), {}
    inside = ""  # of experts, whose parts have rules that are not for modules
    for name, module in model.named_modules():
        rule = rules.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if rule is None or (inside and name.startswith(inside)) or _is_tied(module, uses):
            continue
        inside = f"{name}." if isinstance(module, QuantExperts) else inside
        style = _style(name, module, rule)
        if style is None:
            continue
        problem = _problem(model, name, module, style, ranks)
        if problem is not None:
            raise ValueError(f"{WHO}: {name}: {problem}")
        styles[name] = style
    if not styles:
        raise ValueError(f"{WHO}: the model's layers must have names of the plan, got none of {', '.join(rules)}")
    return styles


def _is_tied(module: nn.Module, uses: Counter[int]) -> bool:
    return any(p is not None and uses[id(p)] > 1 for p in module._parameters.values())


def _style(name: str, module: nn.Module, rule: str) -> ParallelStyle | None:
    if rule in BY_ROWS:
        return ColwiseParallel() if rule == BY_ROWS[0] else ColwiseParallel(output_layouts=Replicate())
    if rule in BY_COLUMNS:
        return RowwiseParallel() if rule == BY_COLUMNS[0] else RowwiseParallel(input_layouts=Replicate())
    if rule == EXPERTS and isinstance(module, QuantExperts):
        return ExpertParallel(input_layouts=Replicate())
    if rule in WHOLE and not any(p.requires_grad for p in module.parameters()):
        return None
    frozen = [f"{each} of what is frozen" for each in WHOLE]
    known = ", ".join((*BY_ROWS, *BY_COLUMNS, f"{EXPERTS} of QuantExperts", *frozen))
    raise ValueError(f"{WHO}: styles must be among {known}, got {rule} for {name}, a {type(module).__name__}")


def _problem(model: nn.Module, name: str, module: nn.Module, style: ParallelStyle, ranks: int) -> str | None:
    if isinstance(module, QuantExperts):
        return experts_problem(module, ranks)
    if isinstance(module, QuantLinear):
        problem = layer_problem(module, ROWS if isinstance(style, ColwiseParallel) else COLUMNS, ranks)
        if problem is not None:
            return problem
    elif type(module) not in (nn.Linear, nn.Embedding):
        return (
            f"a {type(module).__name__} must be an nn.Linear, nn.Embedding, QuantLinear or QuantExperts (PEFT's layers"
            " are none: attach adapters of ours, nf4kernels.LoraConfig)"
        )
    elif isinstance(module, nn.Linear) and not _gathers(style) and (cut := _cut_features(module, style)) % ranks:
        return f"its {cut} features must be the same number on each of {ranks} ranks"
    head_dim: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    if not isinstance(head_dim, int) or not isinstance(module, nn.Linear):
        return None
    features = _cut_features(module, style)
    if features % (head_dim * ranks):
        heads = features // head_dim
        counts = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        return f"{heads} heads must be the same number on each of {ranks} ranks; {', '.join(counts)} would do"
    return None


def _cut_features(module: nn.Linear, style: ParallelStyle) -> int:
    return module.out_features if isinstance(style, ColwiseParallel) else module.in_features


def _gathers(style: ParallelStyle) -> bool:
    """Whether the whole output is made of the parts, which of a dense layer need not be of one size then."""
    return isinstance(style, ColwiseParallel) and style.output_layouts == (Replicate(),)
