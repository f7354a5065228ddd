"""Run by torchrun on some ranks: a real step of a sharded model under the tracker that the simulated one is under.

A case is a line of JSON: a configuration, options of estimate and tokens. Rank 0 prints a line of JSON for each.
"""

import ctypes
import gc
import json
import sys
from dataclasses import asdict

import peft
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh

import nf4kernels.integrations.peft  # noqa: F401 (makes PEFT know our layers)
from nf4kernels.model.quantize import quantize_model
from nf4kernels.stages.simulated_ranks import Step, measured, shard


def made(config: dict, step: Step, rank: int, checkpointing: bool):
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    model = transformers.AutoModelForCausalLM.from_config(kind.from_dict(config), dtype=torch.bfloat16)
    quantize_model(model, progress=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), step)
    return model.train()


def status(key: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def run(libc, config: dict, step: dict, rank: int, checkpointing: bool) -> dict:
    told = Step(**step, decoded=None)
    model = made(config, told, rank, checkpointing)
    warm_up = torch.zeros(1, 8, dtype=torch.long)
    model(input_ids=warm_up, labels=warm_up, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    before = status("VmRSS")
    found = measured(model, told, torch.randint(0, 50, (told.batch, told.length)))
    return {**asdict(found), "resident": status("VmHWM") - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        told = run(libc, *json.loads(case))
        if dist.get_rank() == 0:
            print(f"measured: {json.dumps(told)}", flush=True)
    dist.destroy_process_group()
