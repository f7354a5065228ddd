"""How transformers' modules lay out fused experts, read off their attributes, and which of them QuantExperts takes."""

import inspect
from typing import Any

from torch import Tensor, nn

from ..quantized_weight import expert_columns

GATED, UNGATED = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
WEIGHTS = tuple(dict.fromkeys((*GATED, *UNGATED)))
# What forward's arguments are called; models pass them by position.
FORWARDS = (
    ["hidden_states", "top_k_index", "top_k_weights"],
    ["hidden_states", "router_indices", "routing_weights"],
)
SAID = ("is_transposed", "has_bias")  # by every version of transformers; what else it says has a default
NORM = "post_expert_norm"


def weight_names(module: nn.Module) -> tuple[str, str]:
    """Of the two weights of fused experts, dense or in 4 bits."""
    return GATED if GATED[0] in module._parameters or GATED[0] in module._modules else UNGATED


def bias_name(weight: str) -> str:
    return f"{weight}_bias"


def as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of the dense `module` as `[E, N, K]`, of the `[E, K, N]` that it may have; a view. Its own inverse."""
    return weight.mT if getattr(module, "is_transposed", False) else weight


def dense_weights(module: nn.Module) -> dict[str, Tensor]:
    """name -> `[E, N, K]` of the dense module's two weights; views."""
    parameters: Any = module._parameters
    return {name: as_rows(module, parameters[name]) for name in weight_names(module)}


def own_gate(module: nn.Module) -> bool:
    """Whether it has a gate function of its own, not transformers' default of act_fn(gate) * up."""
    gate = getattr(module, "_apply_gate", None)
    return callable(gate) and getattr(gate, "__name__", "") != "_default_apply_gate"


def layout_problem(module: nn.Module, block_size: int | None = None) -> str | None:
    """Why QuantExperts cannot stand for `module`, None where it can; by its attributes, without knowing its class.

    It can where the module is one of transformers' fused experts, which computes for each token and each of its top k
    experts `w * norm(gate(x @ first[e].T + bias) @ down_proj[e].T + bias)`: its weights may be transposed, the gate a
    function of its own or none, biases and the norm may be missing. A block_size of None is the codebook's own.
    """
    kind = type(module).__name__
    names = weight_names(module)
    if any(p is None or p.dim() != 3 for p in map(module._parameters.get, names)):
        return f"a 3-D parameter of {kind}"
    if not all(hasattr(module, name) for name in SAID):
        return f"{kind}, which does not say how its experts are laid out ({', '.join(SAID)})"
    return _computes_otherwise(module, names) or _shape_problem(module, block_size)


def _computes_otherwise(module: Any, names: tuple[str, str]) -> str | None:
    kind = type(module).__name__
    if getattr(module, "_is_expert_parallel", False):
        return f"{kind}, experts with a share on each process"
    has_gate = getattr(module, "has_gate", True)
    if has_gate != (names == GATED):
        return f"{kind}, experts {'with a gate' if has_gate else 'without a gate'} and a {names[0]}"
    if not (has_gate and own_gate(module)):
        if has_gate and not getattr(module, "is_concatenated", True):
            return f"{kind}, experts with gate and up interleaved, and no gate function that takes them so"
        if not callable(getattr(module, "act_fn", None)):
            return f"{kind}, which has no act_fn"
    biases = {bias_name(name) for name in names} if module.has_bias else set()
    norm = {NORM} if getattr(module, "has_post_expert_norm", False) else set()
    missing = [*sorted(biases - module._parameters.keys()), *(norm - module._modules.keys())]
    if missing:
        return f"{kind}, which has no {', '.join(missing)}"
    held = {*module._parameters, *module._buffers, *module._modules} - {*names, *biases, *norm, "act_fn"}
    if held:
        return f"{kind}, which also holds {', '.join(sorted(held))}"
    if list(inspect.signature(module.forward).parameters) not in FORWARDS:
        return f"{kind}, whose forward does not take {', '.join(FORWARDS[0])}"
    return None


def _shape_problem(module: nn.Module, block_size: int | None) -> str | None:
    kind, names = type(module).__name__, weight_names(module)
    weights = dense_weights(module)
    first, down = weights.values()
    (E, N, H), halves = first.shape, 2 if names == GATED else 1
    parameters: Any = module._parameters
    if N % halves or tuple(down.shape) != (E, H, N // halves):
        came = [list(parameters[name].shape) for name in names]
        return f"{kind}, whose down_proj {came[1]} does not fit its {names[0]} {came[0]}"
    for name, weight in weights.items():
        bias = parameters.get(bias_name(name))
        if bias is not None and tuple(bias.shape) != (E, weight.shape[1]):
            return f"{kind}, whose {bias_name(name)} {list(bias.shape)} does not fit its {name}"
    step = expert_columns(block_size or 64)  # no codebook's own is larger
    uneven = [name for name, weight in weights.items() if weight.shape[2] % step]
    return f"{kind}, where {' and '.join(uneven)} have rows that are no multiple of {step}" if uneven else None
