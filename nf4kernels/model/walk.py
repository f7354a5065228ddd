"""A model's modules and state by the names that they have without torch.compile's wrappers."""

import sys
from collections.abc import Iterator

from torch import Tensor, nn

WRAPPED = "_orig_mod"  # the attribute in which torch.compile(module) keeps the module


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made it; that part of torch takes a second to import, and without it nothing was."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)


def inside(module: nn.Module) -> nn.Module:
    """The module in torch.compile's wrapper, which takes no second one; a module that has none is itself."""
    return module._modules[WRAPPED] if is_compiled(module) else module  # type: ignore[return-value]  # never None


def named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As `nn.Module.named_modules(remove_duplicate=False)`, as if no module at any depth had been compiled."""
    model = inside(model)
    yield name, model
    for leaf, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{name}.{leaf}" if name else leaf)


def get_submodule(model: nn.Module, name: str) -> nn.Module:
    """As `nn.Module.get_submodule`, by a name of `named_modules`; AttributeError where there is none."""
    module = inside(model)
    for leaf in name.split(".") if name else ():
        child = getattr(module, leaf)
        if not isinstance(child, nn.Module):
            raise AttributeError(f"{leaf} of {name} is no module")
        module = inside(child)
    return module


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, not detached, by keys that begin with names of `named_modules`.

    Of buffers the tensors themselves: a layer that was sharded on meta has DTensors of them in its own state.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    return {_plain_key(model, key): buffers.get(key, value) for key, value in state.items()}


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in that place; what was compiled there stays compiled."""
    parent_name, _, leaf = name.rpartition(".")
    parent = get_submodule(model, parent_name)
    wrapper = getattr(parent, leaf)
    if not is_compiled(wrapper):
        setattr(parent, leaf, new)
        return
    wrapper._modules[WRAPPED] = new
    wrapper.__setstate__(wrapper.__getstate__())  # its forward is bound to the old module until it is set up again


def _plain_key(model: nn.Module, key: str) -> str:
    if WRAPPED not in key:
        return key
    plain: list[str] = []
    module: nn.Module | None = model
    for part in key.split("."):
        if module is None or part != WRAPPED or not is_compiled(module):
            plain.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(plain)
