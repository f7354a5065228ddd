"""Expert parallel: a style for torch's `parallelize_module` that deals the experts of QuantExperts to the ranks.

Source: GShard (arXiv 2006.16668), section 3.2; Switch Transformers (arXiv 2101.03961), section 3.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import parallel as torchs

from ..modes import outside_inference_mode
from ..nn.experts_layout import bias_name
from ..nn.grouped_quant_linear import ExpertsTerm, GroupedQuantLinear
from ..nn.lora import LoraConfig
from ..nn.quant_experts import QuantExperts
from ..quantized_weight import WeightArgs, shared_codebooks
from ..routing import combine_experts, sort_by_expert
from .placing import local, place


class _Waited(torch.autograd.Function):
    """A collective's result once it is there, and its gradient: kernels read memory, not promises of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return collectives.wait_tensor(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return collectives.wait_tensor(dx)


def exchanged(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that the ranks of `group` send here, rank 0's first; differentiable in the rows that are sent."""
    result = collectives.all_to_all_single_autograd(_Waited.apply(rows), received, sent, group)
    waited: Tensor = _Waited.apply(result)
    return waited


class PartOfGrouped(GroupedQuantLinear):
    """One weight of experts, of which this rank computes with its own. `ExpertParallel` makes it, in place.

    `weight`, `absmax` and the adapters are DTensors that are cut by experts; the superblocks' scales are whole.
    """

    PLACES_ADAPTERS = True

    def place(self, mesh: DeviceMesh, source: int | None) -> None:
        place(self, dict.fromkeys(("weight", "absmax"), Shard(0)), mesh, source)
        for name in self.adapter_names:
            self._place_adapter(name, mesh, source)

    def _place_adapter(self, name: str, mesh: DeviceMesh, source: int | None) -> None:
        adapter = self.get_adapter(name)
        assert adapter is not None
        for factor in adapter[1:]:
            place(factor, dict.fromkeys(("weight", "start"), Shard(0)), mesh, source)

    @outside_inference_mode
    def attach_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """As of all experts: the first rank's start is every rank's."""
        weight = self._parameter("weight")
        if weight.device_mesh.ndim > 1:
            raise ValueError(f"{self.WHO}.add_lora: experts on ranks must get their adapters before fully_shard")
        super().attach_lora(config, dtype, name)
        self._place_adapter(name, weight.device_mesh, 0)

    def _weight_args(self) -> WeightArgs:
        """Of this rank's experts."""
        weight = self._parameter("weight")
        with torch.no_grad():
            packed, absmax = local(weight), local(self._absmax())
        begin = weight.device_mesh.get_local_rank() * len(packed)
        shared, buffers = shared_codebooks(self.scales), self._buffers
        own = [
            buffers[name] if name in shared or buffers[name] is None else buffers[name][begin : begin + len(packed)]  # type: ignore[index]
            for name in ("scale_absmax", "scale_offset", "code", "scale_code")
        ]
        args: Any = (packed, absmax, *own, self.out_features, self.in_features, self.block_size)
        return args  # type: ignore[no-any-return]

    def _term(
        self, dtype: torch.dtype, terms: Sequence[ExpertsTerm]
    ) -> tuple[Tensor | None, Tensor | None, float, float]:
        if terms:
            raise ValueError(f"{self.WHO}: experts on ranks have adapters of their own (add_lora), not PEFT's")
        A, B, scaling, dropout_p = super()._term(dtype, ())
        return None if A is None else local(A), None if B is None else local(B), scaling, dropout_p


class PartOfExperts(QuantExperts):
    """QuantExperts of which each rank of a mesh computes its own; `ExpertParallel` makes it, in place."""

    layout: Placement  # of the tokens

    def place(self, mesh: DeviceMesh, source: int | None) -> None:
        for name in self.weights:
            part: Any = self._modules[name]
            part.__class__ = PartOfGrouped
            part.place(mesh, source)
        place(self, {bias_name(name): Shard(0) for name in self.weights}, mesh, source)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, terms: Any = None) -> Tensor:
        """As of all experts, of this rank's tokens, or of the tokens that all ranks have; DTensors are taken, too."""
        if terms:
            raise ValueError(f"{self.WHO}: experts on ranks have adapters of their own (add_lora), not PEFT's")
        first: Any = self._modules[self.weights[0]]
        mesh: DeviceMesh = first._parameter("weight").device_mesh
        x, index, weights = (self._local(each, mesh) for each in (hidden_states, top_k_index, top_k_weights))
        self._check(x, index, weights)
        if not isinstance(self.layout, Replicate):
            return self._exchanged(x, index, weights, mesh)
        own, rank = self.num_experts // mesh.size(), mesh.get_local_rank()
        here = torch.where(index.div(own, rounding_mode="floor") == rank, index - rank * own, own)
        here = torch.where((index < 0) | (index > self.num_experts), -1, here)  # which sort_by_expert refuses
        rows, expert_offsets, positions = sort_by_expert(x.to(self._dtype(x)), here, own)
        y = combine_experts(self._of_rows(rows, expert_offsets), positions, weights, x.dtype)
        return (
            DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
        )

    def _local(self, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        """This rank's tokens; the gradient of what all ranks have is the ranks' sum."""
        if not isinstance(tensor, DTensor) and not isinstance(self.layout, Replicate):
            return tensor
        placed = tensor
        if not isinstance(placed, DTensor):
            placed = DTensor.from_local(tensor, mesh, [self.layout], run_check=False)
        placed = placed.redistribute(placements=[self.layout])
        return placed.to_local(grad_placements=[Partial()] if isinstance(self.layout, Replicate) else None)

    def _exchanged(self, x: Tensor, index: Tensor, weights: Tensor, mesh: DeviceMesh) -> Tensor:
        """Rows go to their experts' ranks, sorted by expert, and come back. Their counts wait for the device once."""
        group, ranks = mesh.get_group(), mesh.size()
        own = self.num_experts // ranks
        rows, expert_offsets, positions = sort_by_expert(x.to(self._dtype(x)), index, self.num_experts)
        sends = expert_offsets.diff(prepend=expert_offsets.new_zeros(1)).view(ranks, own)
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends, group=group)
        sent, received = (each.tolist() for each in torch.stack([sends.sum(1), receives.sum(1)]))
        arrived = exchanged(rows[: sum(sent)], received, sent, group)
        experts = torch.arange(own, device=x.device).repeat(ranks)
        experts = experts.repeat_interleave(receives.flatten(), output_size=sum(received))
        here, offsets_here, positions_here = sort_by_expert(arrived, experts[:, None], own)
        y = combine_experts(self._of_rows(here, offsets_here), positions_here)
        back = exchanged(y, sent, received, group)
        without = back.new_zeros(len(rows) - len(back), back.shape[1])  # rows of no expert
        return combine_experts(torch.cat([back, without]), positions, weights, x.dtype)

    def _product(self, name: str, x: Tensor, expert_offsets: Tensor, terms: Any) -> Tensor:
        bias = self._parameters.get(bias_name(name))
        y: Tensor = self._modules[name](x, expert_offsets, None if bias is None else local(bias), ())  # type: ignore[misc]
        return y


class ExpertParallel(torchs.ParallelStyle):
    """A style for QuantExperts: each rank computes E / ranks of the experts, of the tokens that go to them.

    With `input_layouts=Shard(0)`, the default, the ranks have tokens of their own, as in data parallel: an all-to-all
    brings each to its experts and back. With `Replicate()` they have the same tokens, as in tensor parallel: each rank
    computes its experts' share of the sum, and an all-reduce adds them up. Outputs are laid out as inputs are. Weights,
    biases and adapters are cut by experts, so that each expert's gradient is whole on its rank.

    Raises:
        ValueError: the module is no QuantExperts, its experts are no multiple of the ranks.
    """

    LAYOUTS: ClassVar[tuple[Placement, ...]] = (Shard(0), Replicate())

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        self.input_layouts = input_layouts or Shard(0)
        if self.input_layouts not in self.LAYOUTS:
            raise ValueError(
                "nf4kernels.distributed.ExpertParallel: input_layouts must be Shard(0), tokens of each rank's own, or"
                f" Replicate(), the same on every rank, got {input_layouts}"
            )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        problem = experts_problem(module, device_mesh.size())
        if problem is None and device_mesh.ndim != 1:
            problem = f"the mesh must have one dimension (mesh['ep'] of a larger one), got {device_mesh.ndim}"
        if problem is not None:
            raise ValueError(f"nf4kernels.distributed.ExpertParallel: {problem}")
        module.__class__ = PartOfExperts
        assert isinstance(module, PartOfExperts)
        module.layout = self.input_layouts
        module.place(device_mesh, self.src_data_rank)
        return module


def experts_problem(module: nn.Module, ranks: int) -> str | None:
    """Why a module's experts cannot be dealt to that many ranks; None where they can."""
    if type(module) is not QuantExperts:
        came = "experts that are on ranks already" if isinstance(module, QuantExperts) else type(module).__name__
        return f"the module must be a QuantExperts (quantize_model makes them), got {came}"
    part: Any = module._modules[module.weights[0]]
    if isinstance(part.weight, DTensor):
        return "the experts must be whole, got sharded ones (first expert parallel, then fully_shard)"
    E = module.num_experts
    if E % ranks:
        counts = [str(n) for n in range(1, E + 1) if E % n == 0]
        return f"{E} experts must be the same number on each of {ranks} ranks; {', '.join(counts)} would do"
    return None
