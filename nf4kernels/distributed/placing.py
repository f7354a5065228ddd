"""How a module's tensors become DTensors on a mesh: cut or whole, each rank with memory of its own part alone."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


def place(module: nn.Module, names: Mapping[str, Placement], mesh: DeviceMesh, source: int | None) -> None:
    """Put the parameters and buffers of these names on the mesh; those that the module lacks are left out.

    `source` is the rank whose values count, as torch's `src_data_rank`; None: each rank's own.
    """
    for name, placement in names.items():
        parameter, buffer = module._parameters.get(name), module._buffers.get(name)
        if parameter is not None:
            placed = nn.Parameter(_placed(parameter.data, placement, mesh, source), parameter.requires_grad)
            module._parameters[name] = placed
        elif buffer is not None:
            module._buffers[name] = _placed(buffer, placement, mesh, source)


def _placed(tensor: Tensor, placement: Placement, mesh: DeviceMesh, source: int | None) -> DTensor:
    placed = distribute_tensor(tensor, mesh, [placement], src_data_rank=source)
    local = placed.to_local()
    if placement.is_replicate() or (local.is_contiguous() and local.untyped_storage().nbytes() == local.nbytes):
        return placed
    own = local.contiguous() if not local.is_contiguous() else local.clone()  # a view would keep the whole in memory
    return DTensor.from_local(own, mesh, [placement], run_check=False, shape=placed.shape, stride=placed.stride())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of what is on a mesh."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def shared(tensor: Tensor) -> Tensor:
    """The values of what is whole on each rank of a mesh; its gradient is the sum of the ranks'."""
    assert isinstance(tensor, DTensor)
    return replicated(tensor).to_local(grad_placements=[Partial()])


def replicated(tensor: DTensor) -> DTensor:
    """The same, whatever parts of a gradient come back being added up."""
    return DTensor.from_local(tensor.to_local(), tensor.device_mesh, [Replicate()], run_check=False)
