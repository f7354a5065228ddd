"""4-bit models in transformers: `from_pretrained` quantizes as it loads, and `save_pretrained` writes what it made.

Importing this registers `Nf4Config` and its quantizer, so that directories in 4 bits load by themselves. Where PEFT is
installed it knows our layers then, too.
"""

from importlib.util import find_spec

from ..requirement import require

require("transformers")  # before the next lines import what an older one lacks

from . import hooks
from .config import Nf4Config
from .quantizer import Nf4Quantizer

__all__ = ["Nf4Config", "Nf4Quantizer"]

hooks.install()
if find_spec("peft") is not None:
    from .. import peft  # noqa: F401
