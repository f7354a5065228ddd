"""Run by torchrun on two ranks: what each takes for itself while a model is loaded to be sharded, a line a rank."""

import sys
import threading
import time
from pathlib import Path
from tempfile import gettempdir

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


def main() -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    where = Path(sys.argv[1] if len(sys.argv) > 1 else gettempdir()) / "loading_memory"
    disable_fsdp_ram_efficient_loading()
    tiny.llama(torch.bfloat16, **SIZES).save_pretrained(where)  # rank 0 does
    dist.barrier()
    dense = {"quantization_config": Nf4Config(), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(where, **dense).save_pretrained(where / "stored")
    dist.barrier()
    for name, path, options in (("dense", where, dense), ("stored", where / "stored", {"dtype": torch.bfloat16})):
        for is_efficient in (True, False):
            (enable_fsdp_ram_efficient_loading if is_efficient else disable_fsdp_ram_efficient_loading)()
            peak = peak_of(lambda path=path, options=options: AutoModelForCausalLM.from_pretrained(path, **options))
            for rank in range(dist.get_world_size()):
                dist.barrier()
                if rank == dist.get_rank():
                    print(f"{name}, efficient {is_efficient}, rank {rank}: {peak / 2**20:.0f} MiB", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
