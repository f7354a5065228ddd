"""A pytest plugin that runs PEFT's own tests of LoRA with QuantLinear in the place of nn.Linear.

`python -m benchmarks.peer_tests peft DIR` runs it, with what those tests require installed.

Of the parametrized tests those are kept whose configuration is a LoraConfig, on either side. With `--layers ours` the
nn.Linear in every model class of a test's module is quantized when the model is made.
"""

import torch
from torch import nn

import nf4kernels as nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pytest_addoption(parser):
    parser.addoption("--layers", choices=("ours", "theirs"), default="theirs")


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if _is_of_lora(item)]
    if config.getoption("--layers") == "ours":
        import nf4kernels.integrations.peft  # noqa: F401  (what is tried)

        modules = {item.module for item in items}
        for module in modules:
            for kind in list(vars(module).values()):
                if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                    _quantize_when_made(kind)
        names = {module.__name__ for module in modules}

        def init_subclass(cls, **kwargs):  # classes that a test or a fixture defines
            super(nn.Module, cls).__init_subclass__(**kwargs)
            if cls.__module__ in names:
                _quantize_when_made(cls)

        nn.Module.__init_subclass__ = classmethod(init_subclass)


def _is_of_lora(item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    kinds = {value.__name__ if isinstance(value, type) else type(value).__name__ for value in values}
    return {kind for kind in kinds if kind.endswith("Config")} <= {"LoraConfig"}


def _quantize_when_made(kind) -> None:
    if "__init__" in vars(kind):
        kind.__init__ = _quantizing(kind.__init__)


def _quantizing(init):
    def init_quantized(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for name, child in self.named_children():
            if type(child) is nn.Linear and child.weight.dtype in DTYPES:
                setattr(self, name, nf4.QuantLinear.from_linear(child))

    return init_quantized
