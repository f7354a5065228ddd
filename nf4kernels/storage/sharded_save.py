"""save_checkpoint of a sharded model: a directory of files, each written by one rank, one tensor gathered at a time."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..model.sharded import Ranks, gathered_qweight
from ..nn.adapted_module import AdaptedModule
from ..nn.dtensors import local_of, whole
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import QuantModule
from .atomic import TargetError, replacing_directory
from .bitsandbytes_format import weight_to_tensors
from .checkpoint_adapters import adapter_metadata
from .model_state import adapted_experts, dense_state, join, quant_layers, shared, unwritable
from .shards import file_name, in_files, is_file_name, write_index
from .tensor_files import write_tensors

SMALLEST, LARGEST = 1 << 24, 1 << 30  # bytes of a file, which is what a rank holds beside its own part
FILES_A_RANK = 8  # or more, so that a file is a small part of the model


@dataclass(frozen=True)
class _Unit:
    """What is gathered together: a tensor, or the tensors of a 4-bit weight. Every rank calls, one takes the result."""

    nbytes: int
    gather: Callable[[], Callable[[], dict[str, Tensor]]]  # what makes the tensors by name of what was gathered


def save_sharded(model: nn.Module, path: Path, who: str) -> None:
    """Write the model of all ranks into the directory `path`; see `save_checkpoint`."""
    ranks = Ranks(model, who)
    ranks.check_one_model(path, (f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()))
    with ranks.together():
        units = _units(model, who)
        if ranks.is_first:
            _check_target(path, who)
    total = sum(unit.nbytes for unit in units)
    size = min(LARGEST, max(SMALLEST, total // (FILES_A_RANK * ranks.size)))
    files = in_files(units, [unit.nbytes for unit in units], size)
    adapted: dict[str, AdaptedModule] = {names[0]: layer for layer, names in _layers(model).items()}
    adapted.update(adapted_experts(model))
    with ExitStack() as stack:
        with ranks.together():
            try:
                staging = stack.enter_context(replacing_directory(path)) if ranks.is_first else None
            except TargetError as error:
                raise ValueError(f"{who}: path {error}") from None
        staging = ranks.of_first(staging)
        with ranks.together():
            if not staging.is_dir():
                raise FileNotFoundError(f"{who}: path must be on a file system that all ranks share, got {path}")
        weight_map = _write_files(files, staging, ranks, adapter_metadata(adapted))
        with ranks.together():
            if ranks.is_first and len(files) > 1:
                write_index(staging, weight_map, total)
        with ranks.together():
            stack.close()  # the directory takes its place


def _layers(model: nn.Module) -> dict[QuantLinear, list[str]]:
    names: dict[QuantLinear, list[str]] = {}
    for name, layer in quant_layers(model).items():
        names.setdefault(layer, []).append(name)
    return names


def _units(model: nn.Module, who: str) -> list[_Unit]:
    """In the same order on every rank."""
    layers = quant_layers(model)
    expected = dense_state(model, layers)
    for name, tensor in expected.items():
        came = unwritable(local_of(tensor)) if isinstance(tensor, Tensor) else type(tensor).__name__
        if came is not None:
            raise ValueError(f"{who}: {name} in model's state must be a loaded tensor, got {came}")
    units = [_dense_unit(group[0], expected[group[0]]) for group in shared(expected)]
    for layer, names in _layers(model).items():
        if local_of(layer.weight).is_meta:
            raise ValueError(f"{who}: {join(names[0], 'weight')} must be loaded, got a meta tensor")
        units.append(_layer_unit(join(names[0], "weight"), layer))
    for module in model.modules():
        if isinstance(module, QuantModule) and not isinstance(module, QuantLinear):
            module.checked_weight()
    return units


def _dense_unit(name: str, tensor: Tensor) -> _Unit:
    def gather() -> Callable[[], dict[str, Tensor]]:
        full = whole(tensor)
        return lambda: {name: full}

    return _Unit(tensor.nbytes, gather)


def _layer_unit(key: str, layer: QuantLinear) -> _Unit:
    def gather() -> Callable[[], dict[str, Tensor]]:
        qweight = gathered_qweight(layer)
        return lambda: weight_to_tensors(qweight, key)

    return _Unit(layer.weight.nbytes + layer.absmax.nbytes, gather)


def _check_target(path: Path, who: str) -> None:
    if path.suffix == ".safetensors" or path.is_file():
        raise ValueError(f"{who}: path must be a directory for a sharded model, which is several files, got {path}")
    others = [each.name for each in path.iterdir() if not is_file_name(each.name)] if path.is_dir() else []
    if others:
        raise ValueError(f"{who}: path must be a directory that holds a checkpoint alone, got {min(others)} in {path}")


def _write_files(files: list[list[_Unit]], staging: Path, ranks: Ranks, metadata: dict[str, str]) -> dict[str, str]:
    """Deal the files to the ranks; name of a tensor -> its file. An error waits until all have gathered with all."""
    failed: Exception | None = None
    weight_map: dict[str, str] = {}
    for number, units in enumerate(files, 1):
        tensors: dict[str, Tensor] = {}
        is_ours = (number - 1) % ranks.size == ranks.rank and failed is None
        for unit in units:
            try:
                made: Any = unit.gather()
                if is_ours:
                    tensors.update({name: tensor.cpu() for name, tensor in made().items()})
            except RuntimeError as error:
                failed = failed or error
            made = None
        if is_ours and failed is None:
            file = file_name(number, len(files))
            try:
                write_tensors(tensors, staging / file, metadata if number == 1 else None)
            except Exception as error:
                failed = error
            weight_map.update(dict.fromkeys(tensors, file))
    ranks.agree(failed)
    return {name: file for part in ranks.gathered(weight_map) for name, file in part.items()}
