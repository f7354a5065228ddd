"""What the forward pass saves for the backward pass, kept in the host's memory in between."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from ..model.heads import output_layers

# Bytes below which a tensor stays where it is: to ask for a copy takes 10 us, in which PCIe 4.0 moves so many
# (predicted, of 25 GB/s).
LEAST = 256 << 10
HOST = ("cpu",)


@dataclass
class Offloaded:
    """What was moved to the host so far, counted once for each time that it was saved."""

    tensors: int = 0
    bytes: int = 0


@contextmanager
def offload_activations(model: nn.Module, least: int = LEAST) -> Iterator[Offloaded]:
    """What the model's forward saves inside a `with` block waits in pinned host memory for the backward.

    Meant for gradient checkpointing, reentrant or not, where what is saved is the input of each layer: the device then
    holds those of one layer, and the block need not hold the backward. Without checkpointing everything that autograd
    saves is moved, what several operators save as often as they do. Gradients have the same bits.

    The tensors are moved by torch.autograd.graph.save_on_cpu, in order with the current stream. Parameters, buffers,
    views of them, tensors on the CPU, and logits, which the backward begins with, stay where they are.

    Args:
        model: which computes inside the block; what others save there is offloaded, too.
        least: bytes from which on a tensor is moved.

    Yields:
        `Offloaded`, which counts.
    """
    torchs = save_on_cpu(pin_memory=True)
    with saving_elsewhere(model, torchs.pack_hook, torchs.unpack_hook, least, HOST) as moved:
        yield moved


@contextmanager
def saving_elsewhere(
    model: nn.Module, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], least: int,
    stays: Collection[str] = (),
) -> Iterator[Offloaded]:  # fmt: skip
    """What is saved inside for the backward, but for the model's own and the devices that stay, goes through `pack`.

    `pack` is given tensors in the order of their memory, and `unpack` gives them back so.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    heads = [part for module in model.modules() for part, _ in output_layers(module)]
    linear = [layer for head in heads for layer in head.modules() if isinstance(layer, nn.Linear)]
    logits = {layer.out_features for layer in linear} - {layer.in_features for layer in linear}
    moved = Offloaded()

    def is_moved(tensor: Tensor) -> bool:
        if tensor.device.type in stays or tensor.nbytes < least or tensor.dim() == 0 or tensor.shape[-1] in logits:
            return False
        return not (_is_own(tensor, own) or _is_repeated(tensor))

    def save(tensor: Tensor) -> Any:
        if not is_moved(tensor):
            return tensor.detach()  # the tensor itself would be a circle of references where it is the output
        moved.tensors += 1
        moved.bytes += tensor.nbytes
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        return order, pack(tensor.permute(order))

    def restore(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        order, packed = saved
        return unpack(packed).permute([order.index(dim) for dim in range(len(order))])

    with saved_tensors_hooks(save, restore):
        yield moved


def _is_own(tensor: Tensor, storages: set[int]) -> bool:
    """Also by its class, since FSDP2 gathers a parameter into another storage."""
    base = tensor._base if tensor._is_view() else tensor
    return isinstance(base, nn.Parameter) or tensor.untyped_storage()._cdata in storages


def _is_repeated(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded mask, so that its copy would be larger than it is."""
    return tensor.nbytes > tensor.untyped_storage().nbytes()
