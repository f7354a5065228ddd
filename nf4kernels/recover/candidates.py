"""What may become of a layer in a plan: other codebooks and block sizes, an adapter, a low rank, nothing at all."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import quantize, quantize_experts
from ..model.heads import SKIP
from ..model.plan import check_skip, names_of_modules, plan_layers
from ..model.targets import Target
from ..model.walk import get_submodule, named_modules
from ..nn.experts_layout import dense_weights
from ..nn.lora import LoraConfig
from ..nn.quant_linear import QuantLinear
from .batches import Batch, run
from .low_rank import low_rank_linear


class Dropped(nn.Module):
    """y = 0 in the place of a layer that a plan drops: no weight, no bias, no product; `[..., out_features]`.

    A block of a residual network whose layers are all dropped is the identity.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True, eq=False)
class Candidate:
    """What a layer may become.

    Attributes:
        options: of `QuantLinear.from_linear`: codebook, block_size, double_quant, scale_codebook, lora; None keeps the
            weight as it is.
        rank: not None: two layers of that rank, the best such approximation of the weight (SVD), in the place of one,
            each as `options` say.
        dropped: nothing is left of the layer: its output is zero.

    Raises:
        ValueError: the rank is below 1, or a dropped layer has options.
        TypeError, ValueError: options are none of `QuantLinear.from_linear`.
    """

    options: Mapping[str, Any] | None = None
    rank: int | None = None
    dropped: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"nf4kernels.recover.Candidate: rank must be at least 1, got {self.rank}")
        if self.dropped and (self.options is not None or self.rank is not None):
            raise ValueError("nf4kernels.recover.Candidate: dropped must come without options and rank, got both")
        if self.options is not None:
            QuantLinear.from_linear(nn.Linear(1, 1, device="meta"), **self.options)

    @property
    def name(self) -> str:
        """A few words, for tables."""
        if self.dropped:
            return "dropped"
        words = [] if self.rank is None else [f"rank {self.rank}"]
        if self.options is None:
            words.append("dense")
        else:
            options = dict(self.options)
            lora: LoraConfig | None = options.pop("lora", None)
            codebook = options.pop("codebook", "nf4")
            words.append(codebook if isinstance(codebook, str) else "custom")
            words += [str(options.pop(key)) for key in ("block_size",) if options.get(key) is not None]
            words += [f"{key}={value}" for key, value in sorted(options.items())]
            if lora is not None:
                words.append(f"+ LoRA {lora.r} {lora.init}")
        return " ".join(words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.as_dict(), sort_keys=True))

    @property
    def is_dense(self) -> bool:
        return self.is_plain and self.options is None

    @property
    def is_plain(self) -> bool:
        """Whether `quantize_model(plan=)` alone makes it: one layer stays one layer."""
        return self.rank is None and not self.dropped

    def layer(self, dense: nn.Module) -> nn.Module:
        """What stands in the place of a dense nn.Linear, or of experts; `dense` is left as it is.

        Raises:
            TypeError: experts are to be dropped or to have a low rank.
            ValueError: the weight is not finite.
        """
        if self.is_plain:
            return dense if self.options is None else self._rounded(dense)
        if not isinstance(dense, nn.Linear):
            kind = type(dense).__name__
            raise TypeError(f"nf4kernels.recover.Candidate: {self.name} must be of an nn.Linear, got {kind}")
        if self.dropped:
            return Dropped(dense.in_features, dense.out_features).train(dense.training)
        made = low_rank_linear(dense, min(self.rank or 1, *dense.weight.shape))
        return made if self.options is None else nn.Sequential(*map(self._rounded, made)).train(dense.training)

    def _rounded(self, dense: nn.Module) -> nn.Module:
        options = dict(self.options or {})
        return Target([""], options.pop("lora", None), options).rounded(dense)

    def nbytes(self, dense: nn.Module, dtype: torch.dtype | None = None) -> int:
        """Of the weights, with scales, codebooks and adapters, without biases; computed on the meta device.

        `dtype` is that of what stays dense and of adapters; None is the weight's.
        """
        if self.dropped:
            return 0
        options = dict(self.options or {})
        lora: LoraConfig | None = options.pop("lora", None)
        options.pop("compute_dtype", None)
        total = 0
        for *experts, N, K in self._shapes(dense):
            empty = torch.empty(*experts, N, K, device="meta", dtype=dtype or next(dense.parameters()).dtype)
            how = quantize_experts if experts else quantize
            total += empty.nbytes if self.options is None else how(empty, **options).nbytes
            total += 0 if lora is None else math.prod(experts) * lora.r * (N + K) * empty.itemsize
        return total

    def _shapes(self, dense: nn.Module) -> list[tuple[int, ...]]:
        if not isinstance(dense, nn.Linear):
            return [tuple(weight.shape) for weight in dense_weights(dense).values()]
        N, K = dense.weight.shape
        rank = None if self.rank is None else min(self.rank, N, K)
        return [(N, K)] if rank is None else [(rank, K), (N, rank)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        options = None if self.options is None else dict(self.options)
        if options is not None:
            if isinstance(options.get("lora"), LoraConfig):
                options["lora"] = asdict(options["lora"])
            if isinstance(options.get("codebook"), Tensor):
                options["codebook"] = options["codebook"].tolist()
            if options.get("compute_dtype") is not None:
                options["compute_dtype"] = str(options["compute_dtype"]).removeprefix("torch.")
        return {"options": options, "rank": self.rank, "dropped": self.dropped}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Candidate":
        """What `as_dict` gave."""
        options = fields["options"]
        if options is not None:
            options = dict(options)
            if options.get("lora") is not None:
                options["lora"] = LoraConfig(**options["lora"])
            if isinstance(options.get("codebook"), list):
                options["codebook"] = torch.tensor(options["codebook"])
            if options.get("compute_dtype") is not None:
                options["compute_dtype"] = getattr(torch, options["compute_dtype"])
        return cls(options, fields["rank"], fields["dropped"])


DENSE, DROPPED = Candidate(), Candidate(dropped=True)


def default_candidates() -> list[Candidate]:
    """NF4 in blocks of 64 and of 16 to 4096, AF4 in blocks of 64, 8 bits where `quantize` has them, and dense."""
    found = [Candidate({"codebook": "nf4", "block_size": size}) for size in (64, 4096, 256, 128, 32, 16)]
    found.append(Candidate({"codebook": "af4", "block_size": 64}))
    with suppress(ValueError):  # a package without that format
        found.append(Candidate({"codebook": "int8"}))
    return [*found, DENSE]


def layer_names(model: nn.Module, skip: Sequence[str] = (), block_size: int | None = None) -> dict[str, nn.Module]:
    """name -> the layer of each that `quantize_model` would replace, by the first of its names."""
    check_skip(model, skip, "nf4kernels.recover")
    targets, _ = plan_layers(model, (*SKIP, *skip), block_size)
    return {names[0]: get_submodule(model, names[0]) for names in targets}


@torch.no_grad()
def layers_of_one_input(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Those of the layers that read the same tensor together, in the order in which they run; each name once.

    Such layers (query, key and value; gate and up) are often fused by whatever runs the model later, which then asks
    for one format of all of them.
    """
    seen: dict[str, int] = {}
    kept: list[Tensor] = []  # so that no id is used twice
    places: dict[int, int] = {}

    def hook(name: str):
        def note(module: nn.Module, args: tuple) -> None:
            if args and name not in seen:
                kept.append(args[0])
                seen[name] = places.setdefault(id(args[0]), len(places))

        return note

    handles = [get_submodule(model, name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, list[str]] = {}
    for name, place in seen.items():
        groups.setdefault(place, []).append(name)
    return [*map(tuple, groups.values()), *((name,) for name in names if name not in seen)]


def blocks_of(model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers of each entry of an nn.ModuleList, and of each of its children that has several: what can be dropped.

    All of a block, and then its attention and its MLP, where the model has modules for those.
    """
    found: dict[tuple[str, ...], None] = {}
    modules = dict(named_modules(model))
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList):
            continue
        for index in module._modules:
            block = f"{path}.{index}" if path else index
            children = [f"{block}.{child}" for child in modules[block]._modules]
            for prefix in (block, *children):
                inner = tuple(name for name in names if name.startswith(f"{prefix}."))
                if len(inner) > 1:
                    found[inner] = None
    return list(found)


def aliases_of(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """(first name, all names) of every module."""
    return ((names[0], names) for names in names_of_modules(model).values())
