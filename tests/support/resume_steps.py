"""Run by torchrun: `nf4kernels finetune` goes on in the folder's `four`, and under FSDP2 in its `fsdp_four`."""

import sys
from pathlib import Path

from support import fsdp_on_cpus

from nf4kernels.cli import main

if __name__ == "__main__":
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    assert main([*flags, f"--output_dir={folder / 'four'}"]) == 0
    fsdp_on_cpus.pretend()
    assert main([*flags, "--fsdp", fsdp_on_cpus.SHARDED, f"--output_dir={folder / 'fsdp_four'}"]) == 0
