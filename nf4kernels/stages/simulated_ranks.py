"""One training step of a model that FSDP2 shards over any number of ranks, run without values as one of them.

torch's own parts do it: `fully_shard`, its optimizer, fake tensors in the place of memory, the `fake` process group in
that of the other ranks, and its memory tracker. Rank 0 is the one that runs; no other has more rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.dtensors import local_of
from .errors import StageError
from .sharded_memory import decoder_layers
from .traced_memory import attention_in_tiles, no_value, without_values

# The optimizers of torch itself, by the names of transformers; the states of another are held, but never stepped with.
STEPPED: dict[str, Any] = {
    "adamw_torch": (torch.optim.AdamW, {"foreach": True}),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"foreach": True}),
}
ALL_GATHER, REDUCE_SCATTER = torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default
PRODUCTS = ("linear", "linear_dgrad", "grouped_linear", "grouped_linear_dgrad")


@dataclass(frozen=True)
class Simulated:
    """What a step takes on one of `ranks`.

    Attributes:
        peak: bytes alive at the moment when most are, optimizer states included.
        parts: of these, by torch's names for what they are.
        gathered: bytes of the outputs of all all-gathers of a step, this rank's own part in them.
        gathers: how many these are.
        reduced: bytes of the inputs of all reduce-scatters.
        reductions: how many these are.
    """

    ranks: int
    peak: int
    parts: dict[str, int]
    gathered: int
    gathers: int
    reduced: int
    reductions: int

    @property
    def sent(self) -> int:
        """Bytes that a rank sends, and receives, in a step: of a ring's each rank passes on all parts but one."""
        return (self.gathered + self.reduced) * (self.ranks - 1) // self.ranks


@dataclass(frozen=True)
class Step:
    """How the step is taken.

    Attributes:
        batch, length: sequences on each rank, and tokens in each.
        optimizer: by the name of transformers; one of STEPPED makes a step, too.
        state_bytes: of the optimizer, a trained number, on the device.
        decoded: the dtype of the 4-bit weight that a product decodes; None where it decodes none.
        accumulates: whether gradients of an earlier micro-batch are there already.
        reshard_after_forward: whether a layer's gathered parameters are freed until its backward pass.
        mixed_precision: whether parameters are gathered, and computed with, in bfloat16.
    """

    batch: int
    length: int
    optimizer: str
    state_bytes: float
    decoded: torch.dtype | None
    accumulates: bool = False
    reshard_after_forward: bool = True
    mixed_precision: bool = False


def simulate(model: Any, ranks: int, step: Step) -> Simulated:
    """The step of a model on the meta device, which stays as it is, in its present mode.

    Raises:
        StageError: the process is in a group already.
    """
    if ranks == 1:
        return _simulated(model, None, step)
    if dist.is_initialized():
        raise StageError("--ranks simulates other ranks, and this process has real ones: run it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return _simulated(model, init_device_mesh("cpu", (ranks,)), step)
    finally:
        dist.destroy_process_group()


def shard(model: Any, mesh: DeviceMesh, step: Step) -> None:
    """Each decoder layer on its own and then the rest, as torch's documentation has it."""
    options: dict[str, Any] = {"mesh": mesh}
    if step.mixed_precision:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=step.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=None if step.reshard_after_forward else False, **options)


def _simulated(meta: Any, mesh: DeviceMesh | None, step: Step) -> Simulated:
    model = without_values(meta)
    if mesh is not None:  # before there is anything fake, which it would cut into a piece for each rank
        shard(model, mesh, step)
    with FakeTensorMode(allow_non_fake_inputs=True), attention_in_tiles():
        _put_on(model, "cpu")
        return measured(model, step, torch.zeros(step.batch, step.length, dtype=torch.long))


def _put_on(model: nn.Module, device: str) -> None:
    """As Module.to_empty, but what is shared stays shared."""
    known: dict[int, Any] = {}

    def empty(tensor: Tensor) -> Any:
        if id(tensor) not in known:
            new = torch.empty_like(tensor, device=device)
            known[id(tensor)] = new if not isinstance(tensor, nn.Parameter) else nn.Parameter(new, tensor.requires_grad)
        return known[id(tensor)]

    for module in model.modules():
        held: Any
        for held in (module._parameters, module._buffers):
            held.update({name: empty(tensor) for name, tensor in held.items() if tensor is not None})


def measured(model: Any, step: Step, ids: Tensor) -> Simulated:
    """The step on token ids [batch, length], counted; with real tensors and ranks it is a real one."""
    sharded = isinstance(model, FSDPModule)
    if sharded:
        model._get_fsdp_state()._lazy_init()  # takes note of parameters that are new
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if step.accumulates:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    # The optimizer has this rank's rows, as it has by its own means: DTensor would find out about its operators with
    # tensors of all rows, which the tracker takes for real here.
    rows = [nn.Parameter(local_of(parameter)) for parameter in trained]
    optimizer = _optimizer(rows, step)
    tracker = _Tracker()
    tracker.track_external(model, optimizer, ids)
    seen = _Seen(step.decoded)
    with tracker, seen:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter, here in zip(trained, rows):
            here.grad = None if parameter.grad is None else local_of(parameter.grad)
        if step.optimizer in STEPPED:
            optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")[ids.device]
    parts = {getattr(kind, "value", kind): nbytes for kind, nbytes in peak.items() if nbytes}
    total = parts.pop("Total")
    counted = (seen.nbytes[ALL_GATHER], seen.calls[ALL_GATHER], seen.nbytes[REDUCE_SCATTER], seen.calls[REDUCE_SCATTER])
    return Simulated(dist.get_world_size() if sharded else 1, total, parts, *counted)


def _optimizer(rows: list[nn.Parameter], step: Step) -> torch.optim.Optimizer:
    """With the states that it has from its second step on."""
    kind, options = STEPPED.get(step.optimizer, (torch.optim.SGD, {}))
    optimizer = kind(rows, lr=1e-4, **options)
    for each in rows:
        if kind is torch.optim.AdamW:
            moments = {name: torch.zeros_like(each) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[each] = {"step": torch.zeros(()), **moments}
        elif step.state_bytes:
            optimizer.state[each] = {"held": torch.empty(round(step.state_bytes * each.numel()), dtype=torch.uint8)}
    return optimizer


class _NoModules(ModTracker):
    """Its hooks on every module keep tensors alive that a step without checkpointing frees."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *args: Any) -> None:
        pass


class _Tracker(MemTracker):
    """Of the whole step, without a peak for each module: torch goes through all of them at each operator for that."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)


class _Seen(TorchDispatchMode):
    """Counts what ranks exchange, and has a product's decoded weight alive beside it, which the operator hides."""

    def __init__(self, decoded: torch.dtype | None) -> None:
        super().__init__()
        self.decoded = decoded
        self.nbytes = {ALL_GATHER: 0, REDUCE_SCATTER: 0}
        self.calls = {ALL_GATHER: 0, REDUCE_SCATTER: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # asked for at each operator
            return args[0].fake_device
        if any(each is DTensor for each in types):  # it takes itself apart first
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return no_value(args[0])
        if func in self.calls:
            self.calls[func] += 1
            self.nbytes[func] += CollectiveOp.get_comm_tensor_size(func, None, args, kwargs)
        decoded = None
        if self.decoded is not None and func.namespace == "nf4kernels" and func._opname in PRODUCTS:
            names = [argument.name for argument in func._schema.arguments]
            decoded = torch.empty(args[names.index("N")], args[names.index("K")], dtype=self.decoded)
        result = func(*args, **(kwargs or {}))
        del decoded
        return result
