"""FSDP2 by accelerate's own code: what it prepares trains bit for bit as one process does."""

import pytest

for needed in ("accelerate", "peft", "transformers"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: nothing is prepared by accelerate")

from support import accelerate_steps  # noqa: E402
from support.paths import ROOT  # noqa: E402
from support.torchrun import same_cases  # noqa: E402

FILE = ROOT / "docs" / "accelerate_fsdp2.yaml"
PREPARED = (
    "llama whole on each", "llama", "odd rows", "tied", "experts", "kept after forward", "checkpointing", "offloaded",
    "compile", "float scales", "nvfp4", "several adapters", "peft", "every byte",
    accelerate_steps.REPLICAS,
)  # fmt: skip
LAUNCHED = ("launched, every byte", "launched, quantized as read")


@pytest.mark.slow
def test_what_accelerate_prepares_trains_as_one_process_does(tmp_path):
    """Losses, gradients, three steps and the gathered state, of values that rank 0 alone had.

    Reports' kinds: packed bytes kept as bf16, whose NaNs are rewritten (bitsandbytes 1945); loss 0 and NaN gradients
    (accelerate 3983); buffers that stay on meta.
    """
    same_cases(accelerate_steps, (*PREPARED, *accelerate_steps.LOADED), tmp_path)


@pytest.mark.slow
def test_the_file_for_accelerate_launch(tmp_path):
    """The one in the documentation, as it is."""
    launcher = ("accelerate.commands.launch", "--config_file", str(FILE))
    same_cases(accelerate_steps, LAUNCHED, tmp_path, launcher=launcher)
