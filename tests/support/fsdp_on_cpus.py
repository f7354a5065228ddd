"""accelerate knows FSDP on GPUs alone: here it is told that there is one, and torch that the mesh is of CPUs.

A process that has trained so once takes every later run for one under FSDP.
"""

import json
import os

import accelerate.state
import torch.distributed.fsdp
from torch.distributed.device_mesh import init_device_mesh

from nf4kernels.stages.finetune import processes

SHARDED = "--fsdp_config=" + json.dumps({**processes.FSDP, "state_dict_type": "SHARDED_STATE_DICT"})


def allow() -> None:
    state = accelerate.state.AcceleratorState
    begin, shard, plugins = state.__init__, torch.distributed.fsdp.fully_shard, []

    def init(self, *args, **options):
        begin(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            plugins.append(options["fsdp_plugin"])
        if plugins:
            self.distributed_type, self.fsdp_plugin = accelerate.state.DistributedType.FSDP, plugins[-1]

    def fully_shard(module, **options):
        mesh = options.get("mesh") or init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        return shard(module, **{**options, "mesh": mesh})

    state.__init__, torch.distributed.fsdp.fully_shard = init, fully_shard
    processes.has_gpu = lambda: True
