"""Decoding of a whole model, batch 1, greedy: eager with the default cache, and compiled with a static one.

    python -m benchmarks decode

Ours beside ours with the head in 4 bits as well, beside bitsandbytes, beside the dense bf16 model, without adapters;
the row of `python -m benchmarks model` has adapters on every side. A time is that of NEW tokens after a prompt of
PROMPT, which is not timed. torch.compile takes most of a minute a side when nothing is in its cache, so that no run
does this unless it is asked to.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import nf4kernels as nf4

from ..harness import BNB, DENSE, OURS, Plan, Row, row_of, take_turns, watch_others
from .bench_model import LOSS_BOUND, load, replace_by_bitsandbytes

HEAD = "nf4kernels, head in 4 bits"
SIDES = (OURS, HEAD, BNB, DENSE)
EAGER, COMPILED = "decode, eager", "decode, compiled, static cache"
PROMPT, NEW = 32, 32
CACHE_LENGTH = 128


def as_side(side: str, model: nn.Module) -> nn.Module:
    """`model`, changed in place: evaluating, in 4 bits where the side is."""
    model.requires_grad_(False).eval()
    if side in (OURS, HEAD):
        nf4.quantize_model(model, progress=False)
    if side == HEAD:  # the embedding, which it was tied to, stays dense
        model.lm_head = nf4.QuantLinear.from_linear(model.lm_head)
    if side == BNB:
        replace_by_bitsandbytes(model)
    return model


class Decoder:
    """A model that reads a prompt and then one token after the other.

    Args:
        model: a causal language model.
        step: what is called for a token, `model` or the compiled model.
        is_static: with one cache of CACHE_LENGTH tokens, instead of one that grows.
    """

    def __init__(self, model: Any, step: Callable, is_static: bool) -> None:
        from transformers import StaticCache

        self.model, self.step = model, step
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH) if is_static else None
        renamed = "cache" in inspect.signature(model.forward).parameters  # by transformers 5.24
        self.name = "cache" if renamed else "past_key_values"

    def read(self, prompt: Tensor) -> tuple[Tensor, Any]:
        """(logits [1, vocabulary] after the prompt, cache)"""
        if self.cache is not None:
            self.cache.reset()
        return self._next(self.model, prompt, self.cache)

    def _next(self, call: Callable, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = call(input_ids=ids, use_cache=True, **{self.name: cache})
        return out.logits[:, -1], getattr(out, self.name)

    @torch.no_grad()
    def milliseconds(self, prompt: Tensor) -> float:
        """That the NEW likeliest tokens take, one after the other."""
        logits, cache = self.read(prompt)
        begin = time.perf_counter()
        for _ in range(NEW):
            logits, cache = self._next(self.step, logits.argmax(-1, keepdim=True), cache)
        return (time.perf_counter() - begin) * 1e3

    @torch.no_grad()
    def loss(self, ids: Tensor) -> float:
        """Nats a token of what follows the prompt in `ids` [1, PROMPT + NEW], read token by token."""
        logits, cache = self.read(ids[:, :PROMPT])
        losses = []
        for position in range(PROMPT, ids.shape[1]):
            token = ids[0, position].view(1, 1)  # with the strides of argmax's, else the graph is compiled twice
            losses.append(nn.functional.cross_entropy(logits.float(), token[0]))
            logits, cache = self._next(self.step, token, cache)
        return torch.stack(losses).mean().item()


def decoders(models: dict[str, nn.Module], compiled: bool) -> dict[str, Decoder]:
    return {
        side: Decoder(model, torch.compile(model, fullgraph=True) if compiled else model, compiled)
        for side, model in models.items()
    }


def check_losses(op: str, losses: dict[str, float]) -> None:
    print(f"{op}: losses of a text read token by token " + ", ".join(f"{s} {loss:.3f}" for s, loss in losses.items()))
    for side, loss in losses.items():
        change = abs(loss - losses[DENSE])
        assert change <= LOSS_BOUND, f"{op}, {side}: {loss:.3f}, dense {losses[DENSE]:.3f}, allowed {LOSS_BOUND} apart"


def rows(plan: Plan) -> Iterator[Row]:
    """Eager and compiled, with the first of the plan's thread counts."""
    threads = plan.threads[0]
    torch.set_num_threads(threads)
    models = {}
    for side in SIDES:
        model, ids, name = load()
        models[side] = as_side(side, model)
    text = ids.reshape(1, -1)[:, : PROMPT + NEW]
    for op in (EAGER, COMPILED):
        sides = decoders(models, op == COMPILED)
        check_losses(op, {side: decoder.loss(text) for side, decoder in sides.items()})  # compiles, and packs
        others = watch_others()
        samplers = {side: partial(decoder.milliseconds, text[:, :PROMPT]) for side, decoder in sides.items()}
        row = row_of(take_turns(samplers, plan.seconds), op, name, 1, threads, "", None)
        row.tokens, row.others = NEW, others()
        yield row
