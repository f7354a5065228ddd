"""What each rank takes for itself while a model is loaded to be sharded: `FOLDER make`, then by torchrun on two ranks
`FOLDER dense` or `FOLDER stored`, and `whole` where each loads for itself; a line a rank."""

import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading
from support import tiny
from transformers import AutoModelForCausalLM

from nf4kernels.integrations.transformers import Nf4Config

SIZES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
DENSE = {"quantization_config": Nf4Config(), "dtype": torch.bfloat16}


def own_bytes() -> int:
    """Of anonymous memory that is resident: not the pages of mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def peak_of(load) -> int:
    start, done = own_bytes(), threading.Event()
    seen = [start]

    def watch() -> None:
        while not done.is_set():
            seen.append(own_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    done.set()
    watcher.join()
    del model
    return max(seen) - start


def make(where: Path) -> None:
    tiny.llama(torch.bfloat16, **SIZES).save_pretrained(where)
    AutoModelForCausalLM.from_pretrained(where, **DENSE).save_pretrained(where / "stored")


def measure(where: Path, name: str, is_efficient: bool) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    (enable_fsdp_ram_efficient_loading if is_efficient else disable_fsdp_ram_efficient_loading)()
    path, options = (where, DENSE) if name == "dense" else (where / "stored", {"dtype": torch.bfloat16})
    peak = peak_of(lambda: AutoModelForCausalLM.from_pretrained(path, **options))
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            print(f"{name}, efficient {is_efficient}, rank {rank}: {peak / 2**20:.0f} MiB", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, name, *words = sys.argv[1:]
    make(Path(folder)) if name == "make" else measure(Path(folder), name, "whole" not in words)
