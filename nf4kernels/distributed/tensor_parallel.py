"""Tensor parallel: styles for torch's `parallelize_module` that cut a QuantLinear by columns or by rows, with LoRA.

"Column-wise" and "row-wise" are torch's words, of the weight as `x @ W`: column-wise cuts the rows of Ŵ `[N, K]`, its
output features, and row-wise Ŵ's columns. Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import parallel as torchs

from ..functional import linear_from_args, lora_linear_from_args
from ..modes import outside_inference_mode
from ..nn.lora import LoraConfig, plain_weight
from ..nn.quant_linear import COLUMN_ORDER, LoraTerm, QuantLinear
from ..quantized_weight import QuantizedExperts, QuantizedWeight, WeightArgs
from .cutting import COLUMNS, ROWS, Scales, cut_problem, part_of, part_scales
from .placing import local, place, replicated, shared


class PartLinear(QuantLinear):
    """A QuantLinear that each rank of a mesh computes a part of. A style makes one of a whole layer, in place.

    Its state is the whole layer's: `weight`, `absmax`, bias and adapters are DTensors, which gather to the same bits;
    superblocks' scales and codebooks are whole on each rank. Where superblocks do not begin with a rank's rows, and in
    every cut of columns, the rank also holds its blocks' scales as fp32 numbers, in no state.
    """

    PLACES_ADAPTERS = True
    DIM: ClassVar[int]  # of Ŵ [N, K]
    FACTORS: ClassVar[tuple[Placement, Placement]]  # lora_A's, lora_B's
    BIAS: ClassVar[Placement]
    GRADIENT: ClassVar[list[Placement] | None] = None  # of the input, as the local backward leaves it; None: as it came
    OUTPUT: ClassVar[list[Placement]]
    _numbers: Tensor | None = None  # decoded scales
    _numbers_of: tuple[int, ...] | None = None  # versions of the buffers that they were decoded with

    def place(self, mesh: DeviceMesh, source: int | None) -> None:
        """Cut what a whole layer has."""
        names = ("weight", "absmax")
        place(self, {**dict.fromkeys(names, Shard(self.DIM)), "bias": self.BIAS}, mesh, source)
        for name in self.adapter_names:
            self._place_adapter(name, mesh, source)
        if not self.weight.is_meta:
            self._weight_args()

    def _place_adapter(self, name: str, mesh: DeviceMesh, source: int | None) -> None:
        adapter = self.get_adapter(name)
        assert adapter is not None
        for factor, placement in zip(adapter[1:], self.FACTORS):
            place(factor, {"weight": placement, "start": placement}, mesh, source)

    @outside_inference_mode
    def attach_lora(self, config: LoraConfig, dtype: torch.dtype | None = None, name: str = "default") -> None:
        """As of a whole layer: the first rank's start is every rank's."""
        mesh = self._mesh
        if mesh.ndim > 1:
            raise ValueError(f"{self.WHO}.add_lora: in tensor parallel adapters must come before fully_shard")
        super().attach_lora(config, dtype, name)
        self._place_adapter(name, mesh, 0)

    def set_qweight(self, qweight: QuantizedWeight | QuantizedExperts) -> None:
        raise ValueError(
            f"{self.WHO}.set_qweight: a layer in tensor parallel loads a state (nf4kernels.load_checkpoint)"
        )

    def forward(self, x: Tensor, term: LoraTerm | None = None) -> Tensor:
        """A DTensor of a DTensor, as the style's hooks bring and take them."""
        assert isinstance(x, DTensor)
        y = super().forward(x.to_local(grad_placements=self.GRADIENT), term)
        return DTensor.from_local(y, x.device_mesh, self.OUTPUT, run_check=False)

    def _product(self, x: Tensor, term: LoraTerm | None) -> Tensor:
        if term is not None:
            raise ValueError(f"{self.WHO}: a layer in tensor parallel has adapters of its own (add_lora), not PEFT's")
        bias, lora = self._local_bias(), self.lora
        order = self._buffers.get(COLUMN_ORDER)
        taken = x if order is None else self._taken(x)
        if lora is None or self.adapters_off:
            return linear_from_args(taken, self._weight_args(), bias, self.WHO)
        lora_A: Any = self._modules["lora_A"]
        lora_B: Any = self._modules["lora_B"]
        A, B = plain_weight(lora_A), plain_weight(lora_B)
        if A is None or B is None:
            raise ValueError(f"{self.WHO}: in tensor parallel lora_A and lora_B must have no hooks of their own")
        A, B = (shared(each) if place.is_replicate() else local(each) for each, place in zip((A, B), self.FACTORS))
        A = A if order is None else self._taken(A)
        dropout_p = lora.dropout if self.training else 0.0
        return lora_linear_from_args(taken, self._weight_args(), A, B, lora.scaling, bias, dropout_p)

    def _local_bias(self) -> Tensor | None:
        """What the local product adds."""
        raise NotImplementedError

    @property
    def _mesh(self) -> DeviceMesh:
        weight = self._parameter("weight")
        assert isinstance(weight, DTensor)
        return weight.device_mesh

    @property
    def part(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of Ŵ that this rank computes with, half-open."""
        mesh = self._mesh
        return part_of(self.out_features, self.in_features, self.DIM, mesh.get_local_rank(), mesh.size())

    def _weight_args(self) -> WeightArgs:
        """Of this rank's part."""
        rows, columns = self.part
        with torch.no_grad():
            weight, absmax = local(self._parameter("weight")), local(self._absmax())
        buffers: Any = self._buffers
        scales: Scales = (absmax, buffers["scale_absmax"], buffers["scale_offset"], buffers["scale_code"])
        versions = (
            None if torch.compiler.is_compiling() else _versions(buffers["scale_absmax"], buffers["scale_offset"])
        )
        if self._numbers is not None and versions in (None, self._numbers_of):
            scales = (self._numbers, None, None, None)
        else:  # or the buffers were written in place, as load_checkpoint and torch's dcp.load do
            scales, are_decoded = part_scales(scales, self.in_features, self.block_size, rows, columns)
            self._numbers, self._numbers_of = (scales[0], versions) if are_decoded else (None, None)
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        return weight, *scales[:3], buffers["code"], scales[3], *shape, self.block_size

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._numbers is not None:
            self._numbers = None if self.weight.is_meta else self._numbers.to(self.weight.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._numbers = None


def _versions(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """None for tensors of inference mode, which have none."""
    try:
        return tuple(tensor._version for tensor in tensors if tensor is not None)
    except RuntimeError:
        return None


class RowsOfLinear(PartLinear):
    """Column-wise: y's columns [N / ranks] of the whole x. A is whole, B cut by rows."""

    DIM = ROWS
    FACTORS = (Replicate(), Shard(0))
    BIAS = Shard(0)
    GRADIENT: ClassVar[list[Placement] | None] = [Partial()]
    OUTPUT: ClassVar[list[Placement]] = [Shard(-1)]

    def _local_bias(self) -> Tensor | None:
        bias = self._parameter("bias")
        return None if bias is None else local(bias)


class ColumnsOfLinear(PartLinear):
    """Row-wise: a part of the sum over K, of the columns [K / ranks] of x. A is cut by columns, B whole."""

    DIM = COLUMNS
    FACTORS = (Shard(1), Replicate())
    BIAS = Replicate()
    OUTPUT: ClassVar[list[Placement]] = [Partial()]

    def _local_bias(self) -> None:
        """It is added once, to the ranks' sum."""

    def add_bias(self, y: DTensor) -> DTensor:
        bias = self._parameter("bias")
        if bias is None:
            return y
        summed: Any = y + replicated(bias).to(y.dtype)
        return summed  # type: ignore[no-any-return]


def _make_part(
    style: torchs.ParallelStyle, layer: QuantLinear, kind: type[PartLinear], mesh: DeviceMesh, input_fn, output_fn
) -> nn.Module:
    """Turn a whole layer into that kind of part, in place; ValueError, and nothing changed, where it cannot be."""
    who = f"nf4kernels.distributed.{type(style).__name__}"
    problem = layer_problem(layer, kind.DIM, mesh.size())
    if mesh.ndim != 1:
        problem = f"the mesh must have one dimension (mesh['tp'] of a larger one), got {mesh.ndim}"
    if problem is not None:
        raise ValueError(f"{who}: {problem}")
    layer.__class__ = kind
    assert isinstance(layer, kind)
    layer.place(mesh, style.src_data_rank)
    layer.register_forward_pre_hook(lambda module, inputs: input_fn(module, inputs, mesh))
    layer.register_forward_hook(lambda module, inputs, outputs: output_fn(module, outputs, mesh))
    return layer


def layer_problem(layer: QuantLinear, dim: int, ranks: int) -> str | None:
    """Why a layer cannot be cut in that dimension of Ŵ; None where it can."""
    if isinstance(layer.weight, DTensor):
        return "the layer must be whole, got one that is cut or sharded already (fully_shard comes last)"
    if type(layer) is not QuantLinear:
        return f"the layer must be a QuantLinear itself, got a {type(layer).__name__}"
    if dim == COLUMNS and layer._buffers.get(COLUMN_ORDER) is not None:
        return "a layer with its columns in act-order must be cut by ColwiseParallel or stay whole"
    return cut_problem(layer.out_features, layer.in_features, layer.block_size, ranks, dim)


class ColwiseParallel(torchs.ColwiseParallel):
    """torch's style of that name, for QuantLinear as well: y's columns of each rank are `x @ Ŵ[its rows].T`.

    Its forward has the whole layer's bits. lora_A is whole on each rank and its gradient the ranks' sum, lora_B is cut
    as Ŵ is. Arguments are torch's: `input_layouts`, `output_layouts`, `use_local_output`. Each rank draws its own
    dropout mask: the same where the ranks' random generators are in the same state.

    Raises:
        ValueError: the layer's out_features are no multiple of the ranks, or rows of it share a block.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        layouts = (self.input_layouts, self.desired_input_layouts)

        def input_fn(module, inputs, mesh):
            return self._prepare_input_fn(*layouts, module, inputs, mesh)

        def output_fn(module, outputs, mesh):
            return self._prepare_output_fn(self.output_layouts, self.use_local_output, module, outputs, mesh)

        return _make_part(self, module, RowsOfLinear, device_mesh, input_fn, output_fn)


class RowwiseParallel(torchs.RowwiseParallel):
    """torch's style of that name, for QuantLinear as well: y sums `x[its columns] @ Ŵ[:, its columns].T` over ranks.

    lora_A is cut as Ŵ is, lora_B whole on each rank and its gradient the ranks' sum; bias is added once, to the sum,
    which is taken in y's dtype. Arguments are torch's. Double-quantized scales are held as fp32 numbers as
    well: at blocks of 64 a weight takes 4.63 bits, not 4.13. Each rank draws the dropout mask of its columns.

    Raises:
        ValueError: the layer's in_features are not the same number of whole blocks on each rank.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        layouts = (self.input_layouts, (Shard(-1),))

        def input_fn(module, inputs, mesh):
            return self._prepare_input_fn(*layouts, module, inputs, mesh)

        def output_fn(module, outputs, mesh):
            if outputs.placements != self.output_layouts:
                outputs = outputs.redistribute(placements=self.output_layouts, async_op=True)
            outputs = module.add_bias(outputs)
            return outputs.to_local() if self.use_local_output else outputs

        return _make_part(self, module, ColumnsOfLinear, device_mesh, input_fn, output_fn)
