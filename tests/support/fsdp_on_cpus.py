"""FSDP2 on processes of a CPU through accelerate, which knows it on accelerators alone.

accelerate is told that its processes share GPUs, and does all else itself, on the CPU that it has found. What asks for
an accelerator in torch, a default mesh and pinned memory, gets a CPU's.
"""

import json

import accelerate.state
import torch
import torch.distributed.fsdp
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh

from nf4kernels.stages.finetune import processes

SHARDED = "--fsdp_config=" + json.dumps({**processes.FSDP, "state_dict_type": "SHARDED_STATE_DICT"})
_begin = accelerate.state.PartialState.__init__
_shard = torch.distributed.fsdp.fully_shard


def _init(self, *args, **options):
    _begin(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def _fully_shard(module, **options):
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return _shard(module, mesh=mesh, **options)


def pretend() -> None:
    accelerate.state.PartialState.__init__ = _init
    torch.distributed.fsdp.fully_shard = _fully_shard
    torch.Tensor.pin_memory = lambda self, *args: self
    processes.has_gpu = lambda: True
