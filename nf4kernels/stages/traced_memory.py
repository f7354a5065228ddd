"""What a model's step holds in memory, by running it on the meta device and counting the storages alive.

No value is computed, so that a model of any size is traced on any machine, and nothing is a formula: every tensor that
autograd saves, every temporary that an operator returns and every recomputation of checkpointing is met where the real
step has it. What an operator allocates within itself is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..optim.offload import LEAST, Offloaded, saving_elsewhere

ACTIVATIONS, LOGITS, GRADIENTS, CACHE = "activations", "logits", "gradients", "cache"


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the moment when most are, those from before the step left out.

    Attributes:
        activations: everything that is none of the following.
        logits: tensors over the vocabulary: the logits, their copies and gradients.
        gradients: of parameters, as far as they exist at that moment.
        cache: keys and values that the step hands over to the next one.
        on_host: what was saved for the backward pass and is none of these, since it waits on the host.
    """

    activations: int
    logits: int
    gradients: int
    cache: int
    on_host: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.gradients + self.cache


def peak_of_training(
    model: Any, batch: int, length: int, accumulation: int = 1, loss: Callable[[Any, Tensor], Tensor] | None = None,
    offload: bool = False,
) -> Peak:  # fmt: skip
    """The peak of one forward and backward of a causal language model on the meta device, in its present mode.

    With `accumulation` above 1 it is that of the second micro-batch, which finds every gradient in place. `loss` of
    model and token ids [batch, length] is the model's own where it is None. `offload`: as under
    `nf4kernels.optim.offload_activations`.
    """
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")

    def step() -> int:
        with saving_elsewhere(model, _moved, _brought_back, LEAST) if offload else nullcontext(Offloaded()) as moved:
            found = (loss or _own_loss)(model, ids)
        found.backward()
        return moved.bytes

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if accumulation > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        events = _Events(ids, model, vocab_size=model.config.get_text_config().vocab_size, rows=batch * (length - 1))
        with attention_in_tiles(), events:
            on_host = step()
            events.name(GRADIENTS, (parameter.grad for parameter in trained if parameter.grad is not None))
        held = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    finally:
        model.zero_grad(set_to_none=True)
    peak = replace(events.peak(), on_host=on_host)
    return replace(peak, gradients=peak.gradients + held) if accumulation > 1 else peak


def _moved(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _brought_back(told: tuple[torch.Size, torch.dtype]) -> Tensor:
    return torch.empty(told[0], dtype=told[1], device="meta")


def _own_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def peak_of_serving(model: Any, batch: int, length: int) -> tuple[Peak, int]:
    """(the peak of a prefill of `length` tokens, logits of the last alone; bytes of the cache that it leaves)."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    events = _Events(ids, model, vocab_size=model.config.get_text_config().vocab_size, rows=batch)
    with attention_in_tiles(), events:
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cached = list(_tensors_in(output.past_key_values))
        events.name(CACHE, cached)
    storages = {id(storage): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in cached)}
    return events.peak(), sum(storages.values())


class _Events(TorchDispatchMode):
    """Every storage that an operator makes inside the block, and when it comes and goes."""

    def __init__(self, ids: Tensor, model: nn.Module, vocab_size: int, rows: int) -> None:
        super().__init__()
        self.vocab_size, self.rows = vocab_size, rows
        self.number: Any = WeakIdKeyDictionary()  # storage -> its place in `nbytes`, None for those from before
        self.nbytes: list[int] = []
        self.kinds: list[str] = []
        self.order: list[tuple[int, int]] = []  # (place, +1 or -1)
        before = [ids, *model.parameters(), *model.buffers()]
        before += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for tensor in before:
            self.number[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return no_value(args[0])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.number:
            return
        place = len(self.nbytes)
        self.number[storage] = place
        self.nbytes.append(storage.nbytes())
        over_vocabulary = tensor.dim() >= 2 and tensor.shape[-1] == self.vocab_size
        is_logits = over_vocabulary and tensor.numel() >= self.rows * self.vocab_size
        self.kinds.append(LOGITS if is_logits else ACTIVATIONS)
        self.order.append((place, 1))
        weakref.finalize(storage, self.order.append, (place, -1)).atexit = False

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            place = self.number.get(tensor.untyped_storage())
            if place is not None:
                self.kinds[place] = kind

    def peak(self) -> Peak:
        alive = dict.fromkeys((ACTIVATIONS, LOGITS, GRADIENTS, CACHE), 0)
        highest = Peak(**alive)
        for place, change in tuple(self.order):
            alive[self.kinds[place]] += change * self.nbytes[place]
            if change > 0 and sum(alive.values()) > highest.total:
                highest = Peak(**alive)
        return highest


class _Attention(torch.autograd.Function):
    """What fused attention saves: queries, keys, values, the output, and one fp32 number a row of the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def attention_in_tiles() -> Iterator[None]:
    """Fused attention where torch would take, for the meta device, the one that writes its scores to memory.

    By name, since checkpointing calls it again from within the backward pass, where torch's own modes are off.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Attention.apply(query, key, value)

    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def no_value(tensor: Tensor) -> bool | int:
    """The answer to a model that asks for a value: they ask whether nothing is padded or packed, and nothing is."""
    return True if tensor.dtype == torch.bool else 1


def without_values(model: nn.Module) -> Any:
    """A copy on the meta device, which takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return deepcopy(model, memo)


def _tensors_in(cache: Any) -> Iterable[Tensor]:
    """The tensors of a cache of transformers, which has them as attributes of its layers."""
    for layer in getattr(cache, "layers", ()):
        for held in tree_leaves(vars(layer)):
            if isinstance(held, Tensor):
                yield held
