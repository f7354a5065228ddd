"""A model's output head, applied to a part of the rows at a time: logits of all rows never exist together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..modes import autocast_is_on
from .batches import Batch, counted_rows, logits_in, run, targets

CHUNK = 64  # rows: 12.5 MB of fp32 logits for 49152 classes, for which a cache has room and malloc no new pages

Head = nn.Module | Literal["auto"] | None
RowsLoss = Callable[[Tensor, Tensor], Tensor]  # logits [n, classes], int64 [n] which rows -> a sum, or [n] terms of it


class Rows:
    """The rows of a batch that count, before the head: `[rows, width]`, and `head` makes logits of any of them.

    Without a head they are the logits themselves.
    """

    def __init__(self, values: Tensor, head: nn.Module | None, expected: Tensor | None) -> None:
        self.values, self.head, self.expected = values, head, expected

    def __len__(self) -> int:
        return len(self.values)

    def logits(self, rows: Tensor) -> Tensor:
        part = self.values[rows]
        return part if self.head is None else self.head(part)


class HeadReader:
    """Runs a model without its head where that can be told apart.

    Args:
        model: any module.
        head: the module that makes logits; "auto" takes `get_output_embeddings()` where the model has it, else the last
            nn.Linear; None runs the model as it is, with whole logits.
    """

    def __init__(self, model: nn.Module, head: Head = "auto") -> None:
        self.model = model
        self.is_certain = isinstance(head, nn.Module)
        self.head = find_head(model) if isinstance(head, str) else head

    def rows(self, batch: Batch, **options: Any) -> Rows:
        """The batch's rows as `counted_rows` has them.

        The head passes its input on while the model runs. A model that changes what its head says (a softcap, a scale)
        shows by its output, and is run with whole logits from then on where the head was found by "auto".

        Raises:
            ValueError: so it is with a head that was given.
        """
        values, head = self._run(batch, options)
        return Rows(counted_rows(values, batch), head, targets(values, batch))

    def last_logits(self, batch: Batch, **options: Any) -> Tensor:
        """`[B, classes]` of a causal model, at the last position."""
        values, head = self._run(batch, options)
        return values[:, -1] if head is None else head(values[:, -1])

    def _run(self, batch: Batch, options: dict[str, Any]) -> tuple[Tensor, nn.Module | None]:
        """The head's input and the head; the logits and None without one."""
        if self.head is not None:
            with passing_through(self.head) as seen:
                try:
                    output = logits_in(run(self.model, batch, **options))
                except RuntimeError:  # of shapes, where it is no head; what is wrong otherwise raises below, too
                    if self.is_certain:
                        raise
                    output = None
            if output is not None and len(seen) == 1 and _is_same(output, seen[0].x):
                return seen[0].x, seen[0].head
            if self.is_certain:
                raise ValueError(
                    "nf4kernels.recover: head must be the module whose output is the model's logits, used once, got a"
                    f" {type(self.head).__name__} whose output the model changes or does not use"
                )
            self.head = None
            seen.clear()
            del output
        return logits_in(run(self.model, batch, **options)), None


def find_head(model: nn.Module) -> nn.Module | None:
    ask = getattr(model, "get_output_embeddings", None)
    found = ask() if callable(ask) else None
    if isinstance(found, nn.Module):
        return found
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    outer = (name for name in reversed(linears) if not any(name.startswith(f"{other}.") for other in linears))
    return next((linears[name] for name in outer), None)  # an adapter's factors are inside their layer


@dataclass
class Seen:
    """A head's input, and the head as it would have run on it."""

    x: Tensor
    head: nn.Module


@contextmanager
def passing_through(head: nn.Module) -> Iterator[list[Seen]]:
    """Inside the `with` the head returns its input, and the list has it."""
    seen: list[Seen] = []

    def forward(x: Tensor) -> Tensor:
        is_on = autocast_is_on(x.device)
        seen.append(Seen(x, UnderAutocast(head, x.device.type) if is_on else head))
        return x

    before = vars(head).get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


class UnderAutocast(nn.Module):
    """`head` under the autocast that is on where this is made: a trainer's is on in the model's forward alone."""

    def __init__(self, head: nn.Module, device_type: str) -> None:
        super().__init__()
        self.head, self.device_type, self.dtype = head, device_type, torch.get_autocast_dtype(device_type)

    def forward(self, x: Tensor) -> Tensor:
        # casts that are kept would be those of a chunk's graph, which is gone when the next one asks for them
        with torch.autocast(self.device_type, self.dtype, cache_enabled=False):
            logits: Tensor = self.head(x)
        return logits


def _is_same(output: Tensor, hidden: Tensor) -> bool:
    """Whether nothing was done to `hidden` on its way out, but for a cast."""
    if output is hidden or (output.data_ptr() == hidden.data_ptr() and output.shape == hidden.shape):
        return True
    return output.shape == hidden.shape and torch.equal(output.float(), hidden.to(output.device).float())


def summed_by_chunks(
    rows: Rows, loss: RowsLoss, which: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The sum of `loss` over rows, differentiable in the hidden rows and the head; logits of `chunk` rows at a time.

    Args:
        loss: of logits `[n, classes]` and the rows' numbers int64 `[n]`: fp32 `[terms, n]`, a term of the sum each.
        which: int64, the rows to sum over; None is all.

    Returns:
        The sum over terms and rows, fp32, and each term's own sum `[terms]`, detached. Gradients are computed with the
        values, chunk by chunk, and kept as one gradient of the hidden rows (and one of the head, where it trains).
    """
    which = torch.arange(len(rows), device=rows.values.device) if which is None else which
    values = rows.values[which]
    parameters = [] if rows.head is None else [each for each in rows.head.parameters() if each.requires_grad]
    needs_grad = torch.is_grad_enabled() and (values.requires_grad or bool(parameters))
    total, terms = _Summed.apply(values, rows.head, loss, which, chunk, needs_grad, *parameters)
    return total, terms


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, head: nn.Module | None, loss: RowsLoss, which: Tensor, chunk: int, needs_grad: bool,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        gradient = torch.zeros_like(values) if needs_grad else None
        # sums of many chunks: in fp32 whatever the head is in
        of_head = [torch.zeros_like(each, dtype=torch.float32) for each in parameters] if needs_grad else []
        terms = None
        for start in range(0, len(values), chunk):
            part = values[start : start + chunk].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                found = loss(part if head is None else head(part), which[start : start + chunk]).sum(1)
                if needs_grad:
                    made = torch.autograd.grad(found.sum(), [part, *parameters], allow_unused=True)
                    if made[0] is not None:
                        gradient[start : start + chunk] = made[0]  # type: ignore[index]  # needs_grad
                    for whole, each in zip(of_head, made[1:]):
                        if each is not None:
                            whole += each
            terms = found.detach() if terms is None else terms + found.detach()
        terms = values.new_zeros(1, dtype=torch.float32) if terms is None else terms
        ctx.gradients = [gradient, *(whole.to(each.dtype) for whole, each in zip(of_head, parameters))]
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_values, *of_head = ctx.gradients
        return grad * of_values, None, None, None, None, None, *(grad * each for each in of_head)
