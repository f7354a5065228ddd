"""Models whose layers accelerate has moved elsewhere, to fetch them by hooks around each forward."""

from torch import nn

from ..nn.quant_module import QuantModule


def check_not_dispatched(model: nn.Module, who: str) -> None:
    """ValueError for a dense model under accelerate's hooks: its weights are elsewhere, and would stay there dense."""
    modules = dict(model.named_modules())
    if any(isinstance(module, QuantModule) for module in modules.values()):
        return
    for name, module in modules.items():
        if type(module) is nn.Linear and hasattr(module, "_hf_hook") and "forward" in vars(module):
            raise ValueError(
                f"{who}: model must not be dispatched or offloaded by accelerate yet (load it without device_map,"
                f" quantize it, then dispatch it), got a hook on {name}"
            )
