"""Weights on disk: bitsandbytes' key names and metadata, in plain safetensors files."""

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..codebook import CODEBOOKS, SCALE_CODEBOOKS
from ..model.plan import replace_module, unwrapped
from ..nn.lora import LoraConfig
from ..nn.quant_linear import QuantLinear
from ..nn.quant_module import BUFFERS, QuantModule
from ..quantized_weight import SUPERBLOCK, WEIGHT_DTYPES, QuantizedWeight, absmax_shape, check_block_size, packed_shape
from .atomic import replacing

BITSANDBYTES_CODEBOOKS = ("nf4", "fp4")
STATE = ".quant_state."
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
LORA_METADATA = "nf4kernels.lora"


def weight_to_tensors(qweight: QuantizedWeight, key: str = "weight", bitsandbytes: bool = False) -> dict[str, Tensor]:
    """The tensors that stand for a weight on disk, by bitsandbytes' names: `key`, `key.absmax`, `key.quant_map`, ...

    nf4 and fp4 are bitsandbytes' own format, whichever the scale codebook; other codebooks have the same tensors, with
    the metadata under `key.quant_state.nf4kernels__<name>`. Reads back exactly. Shares memory with `qweight`.

    Args:
        qweight: the weight.
        key: its name in the file.
        bitsandbytes: insist on a weight that bitsandbytes can read.

    Raises:
        ValueError: `bitsandbytes` is set and the codebook is neither nf4 nor fp4.
    """
    known = qweight.codebook in BITSANDBYTES_CODEBOOKS
    if bitsandbytes and not known:
        raise ValueError(
            f"nf4kernels.weight_to_tensors: codebook must be 'nf4' or 'fp4' in bitsandbytes' format,"
            f" got {qweight.codebook!r}"
        )
    metadata = {
        "quant_type": qweight.codebook,
        "blocksize": qweight.block_size,
        "dtype": str(qweight.dtype).removeprefix("torch."),
        "shape": list(qweight.shape),
    }
    tensors = {
        key: qweight.packed.reshape(-1, 1),
        f"{key}.absmax": qweight.absmax.reshape(-1),
        f"{key}.quant_map": qweight.code,
    }
    if qweight.double_quant:
        tensors[f"{key}.nested_absmax"] = qweight.scale_absmax
        tensors[f"{key}.nested_quant_map"] = qweight.scale_code
        metadata["nested_blocksize"] = SUPERBLOCK
        metadata["nested_dtype"] = "float32"
        metadata["nested_offset"] = qweight.scale_offset.item()
    owner = "bitsandbytes" if known else "nf4kernels"
    text = json.dumps(metadata).encode()
    tensors[f"{key}{STATE}{owner}__{qweight.codebook}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def weight_from_tensors(tensors: dict[str, Tensor], key: str = "weight") -> QuantizedWeight:
    """The weight that `weight_to_tensors` or bitsandbytes stored as `key`; the same bits, on key's device.

    Any `quant_storage` dtype is read as the bytes it holds. Keys of other tensors are ignored. Shares memory.

    Raises:
        TypeError, ValueError: a tensor is missing or has another dtype or shape than the metadata says, or the metadata
            is damaged or of a kind that is not supported. Every message names the key.
    """
    who = "nf4kernels.weight_from_tensors"
    states = [name for name in tensors if name.startswith(key + STATE)]
    if len(states) != 1:
        raise ValueError(f"{who}: tensors must have one {key}{STATE}* entry, got {states or 'none'}")
    for name in [key, f"{key}.absmax", f"{key}.quant_map"]:
        if name not in tensors:
            raise ValueError(f"{who}: tensors must have {name}, got none")
    metadata = _read_metadata(tensors[states[0]], states[0], who)
    (N, K), block_size = metadata["shape"], metadata["blocksize"]
    codebook = states[0].rpartition("__")[2]
    code = _read_code(tensors[f"{key}.quant_map"], codebook, f"{key}.quant_map", who)

    packed = tensors[key].contiguous().reshape(-1).view(torch.uint8)
    packed = _shaped(packed, packed_shape(N, K), key, who)
    absmax = _shaped(tensors[f"{key}.absmax"], absmax_shape(N, K, block_size), f"{key}.absmax", who)
    scale_absmax = scale_offset = scale_code = scale_codebook = None
    if "nested_offset" in metadata:
        for name in [f"{key}.nested_absmax", f"{key}.nested_quant_map"]:
            if name not in tensors:
                raise ValueError(f"{who}: tensors must have {name}, got none")
        scale_absmax = tensors[f"{key}.nested_absmax"].reshape(-1)
        scale_offset = torch.tensor(metadata["nested_offset"], dtype=torch.float32, device=packed.device)
        scale_code = tensors[f"{key}.nested_quant_map"].reshape(-1)
        host = scale_code.cpu()
        equal = (name for name, levels in SCALE_CODEBOOKS.items() if torch.equal(levels, host))
        scale_codebook = next(equal, "custom")
    try:
        return QuantizedWeight(
            packed, absmax, scale_absmax, scale_offset, code, scale_code, (N, K), metadata["dtype"], block_size,
            codebook, scale_codebook,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {key}: {error}") from None


def _read_metadata(tensor: Tensor, name: str, who: str) -> dict:
    """The JSON beside a weight, with dtype as a torch.dtype; ValueError for what does not fit the format."""
    try:
        metadata = json.loads(bytes(tensor.cpu().numpy()).decode())
        shape, block_size = metadata["shape"], metadata["blocksize"]
        dtype = getattr(torch, metadata["dtype"], None)
        quant_type = metadata["quant_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{who}: {name} must hold a quant_state in JSON, got {type(error).__name__}: {error}"
        ) from None
    sizes = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sizes:
        raise ValueError(f"{who}: shape in {name} must be [N, K], got {shape}")
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{who}: dtype in {name} must be float32, bfloat16 or float16, got {metadata['dtype']!r}")
    owner, _, codebook = name.rpartition(STATE)[2].partition("__")
    names = BITSANDBYTES_CODEBOOKS if owner == "bitsandbytes" else (*CODEBOOKS, "custom")
    if owner not in ("bitsandbytes", "nf4kernels") or codebook not in names or quant_type != codebook:
        raise ValueError(f"{who}: quant_type in {name} must be a known codebook and match the key, got {quant_type!r}")
    if not isinstance(block_size, int):
        raise ValueError(f"{who}: blocksize in {name} must be an integer, got {block_size!r}")
    check_block_size(block_size, f"{who}: {name}")
    if "nested_offset" in metadata:
        offset, group = metadata["nested_offset"], metadata.get("nested_blocksize")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"{who}: nested_offset in {name} must be finite, got {offset!r}")
        if group != SUPERBLOCK or metadata.get("nested_dtype") != "float32":
            raise ValueError(
                f"{who}: nested_blocksize and nested_dtype in {name} must be {SUPERBLOCK} and float32,"
                f" got {group!r} and {metadata.get('nested_dtype')!r}"
            )
    return {**metadata, "dtype": dtype}


def _read_code(stored: Tensor, codebook: str, name: str, who: str) -> Tensor:
    """fp32 `[16]`: the named codebook, or the stored levels of a custom one.

    bitsandbytes decodes by the name and never reads the map, so a map that disagrees would decode to other weights
    there than here: it is refused.
    """
    if stored.numel() != 16 or not stored.is_floating_point():
        raise ValueError(f"{who}: {name} must hold 16 levels, got {stored.dtype} {list(stored.shape)}")
    levels = stored.reshape(-1).float()
    if codebook == "custom":
        return levels
    if not torch.allclose(levels.cpu(), CODEBOOKS[codebook], rtol=0, atol=1e-6):
        raise ValueError(f"{who}: {name} must be the {codebook} codebook, got {levels.tolist()}")
    return CODEBOOKS[codebook].to(stored.device, copy=True)


def _shaped(tensor: Tensor, shape: tuple[int, ...], name: str, who: str) -> Tensor:
    if tensor.numel() != math.prod(shape):
        raise ValueError(f"{who}: {name} must have {math.prod(shape)} elements, got {tensor.numel()}")
    return tensor.contiguous().reshape(shape)


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write all tensors of `model` to one safetensors file: QuantLinear weights by bitsandbytes' names, the rest as is.

    That includes QuantExperts, for which bitsandbytes has no format; such a file loads where a model has them already.
    Of tensors that share memory the first is written. Adapters are written with their configuration. The file is
    complete or absent: it is written under another name, flushed to disk and renamed.

    Args:
        model: any module.
        path: of the file; an existing one is replaced.

    Raises:
        TypeError, ValueError: model is not a module, is on the meta device, or has state that is not a tensor.
        OSError: path cannot be written.
    """
    who = "nf4kernels.save_checkpoint"
    model = unwrapped(model, "model", who)
    tensors, adapters = {}, {}
    layers = _quant_layers(model)
    expected = _dense_state(model, layers)
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            came = "a meta tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{who}: {name} in model's state must be a loaded tensor, got {came}")
    for group in _shared(expected):
        tensors[group[0]] = expected[group[0]]
    written = set()
    for name, layer in layers.items():
        if layer in written:
            continue
        written.add(layer)
        try:
            tensors.update(weight_to_tensors(layer.qweight, _join(name, "weight")))
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {error}") from None
        if layer.lora is not None:
            adapters[name] = asdict(layer.lora)
    write_tensors(tensors, Path(path), {LORA_METADATA: json.dumps(adapters)} if adapters else {})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, complete or absent; tensors are moved to the CPU, and copied where they share memory."""
    seen, owned = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with replacing(path) as partial:
        save_file(owned, partial, {"format": "pt", **(metadata or {})})


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Fill `model` with a checkpoint written by `save_checkpoint`, `nf4kernels quantize`, or bitsandbytes.

    Where the file has a 4-bit weight, an nn.Linear of that shape becomes a QuantLinear and a QuantLinear takes over the
    file's codebook, block size and scales. QuantExperts are filled, but must be in the model already. Adapters stored
    with their configuration are attached. Other tensors are copied into the model's, or put in their place where the
    model is on the meta device; buffers that no state dict holds (rotary embeddings' frequencies) stay on meta, and a
    warning names them.

    Args:
        model: a module with the checkpoint's names, dense or quantized.
        path: a safetensors file, or a directory with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        TypeError: model is not a module.
        ValueError: a file is damaged; names are missing or unknown; a tensor does not fit. The message names the file
            or the key, and the model is unchanged.
        OSError: path cannot be read.
    """
    who = "nf4kernels.load_checkpoint"
    model = unwrapped(model, "model", who)
    tensors, configs = {}, {}
    for file in checkpoint_files(Path(path), who):
        found, metadata = _read_file(file, who)
        tensors.update(found)
        configs.update(_lora_configs(metadata, file, who))
    qweights = {}
    for weight_key in [name.rpartition(STATE)[0] for name in tensors if STATE in name]:
        parts = {name: tensors.pop(name).clone() for name in _weight_keys(weight_key, tensors)}  # not views of the file
        try:
            qweights[weight_key.removesuffix("weight").removesuffix(".")] = weight_from_tensors(parts, weight_key)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{who}: {path}: {error}") from None

    layers = _planned_layers(model, qweights, who)
    attach = {name: config for name, config in configs.items()
              if not isinstance(layers.get(name), QuantLinear) or layers[name].lora is None}  # fmt: skip
    expected = _dense_state(model, layers)
    _check_dense(expected, tensors, layers, attach, who)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantModule) and name not in layers:
            for error in module.state_errors(tensors, f"{name}."):
                raise ValueError(f"{who}: {path}: {error}")
    _install(model, layers, qweights, attach, tensors)


def checkpoint_files(path: Path, who: str) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or those of a Hugging Face directory."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{who}: {index} must hold a weight_map in JSON, got {error!r}") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{who}: {index} must name files that exist, got {missing[0]}")
        return [path / name for name in names]
    if not (path / "model.safetensors").exists():
        raise ValueError(f"{who}: path must have model.safetensors or its index, got {path}")
    return [path / "model.safetensors"]


def _read_file(file: Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{who}: path must be a safetensors file or a directory, got {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who}: {file} must be a whole safetensors file, got {error}") from None


def _lora_configs(metadata: dict[str, str], file: Path, who: str) -> dict[str, LoraConfig]:
    try:
        return {name: LoraConfig(**fields) for name, fields in json.loads(metadata.get(LORA_METADATA, "{}")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{who}: {LORA_METADATA} in {file} must hold adapter configurations, got {error}") from None


def _weight_keys(key: str, tensors: dict[str, Tensor]) -> list[str]:
    names = [key, *(f"{key}.{part}" for part in PARTS)]
    return [name for name in tensors if name in names or name.startswith(key + STATE)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """name -> layer, under all its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, QuantLinear)}


def _dense_state(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The model's state without the weights of `layers`."""
    state = model.state_dict(keep_vars=True)
    for name in layers:
        for key in ("weight", "source_dtype", *BUFFERS):
            state.pop(_join(name, key), None)
    return state


def _shared(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Groups of names whose tensors are the same memory."""
    groups = {}
    for name, tensor in state.items():
        address = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(address, []).append(name)
    yield from groups.values()


def _planned_layers(model: nn.Module, qweights: dict[str, QuantizedWeight], who: str) -> dict[str, nn.Module]:
    """name -> the layer that will hold that 4-bit weight, under all names; checked against the checkpoint."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {}
    for name, qweight in qweights.items():
        layer = modules.get(name)
        fits = isinstance(layer, QuantLinear) or (type(layer) is nn.Linear and name != "")
        if not fits:
            came = "no such layer" if layer is None else type(layer).__name__
            raise ValueError(f"{who}: model must have a Linear or QuantLinear as {name or 'its root'}, got {came}")
        if (layer.out_features, layer.in_features) != qweight.shape:
            came = [layer.out_features, layer.in_features]
            raise ValueError(f"{who}: {_join(name, 'weight')} must have shape {came}, got {list(qweight.shape)}")
        chosen[layer] = name
    planned = {name: layer for name, layer in modules.items() if layer in chosen}
    for name, layer in modules.items():
        if isinstance(layer, QuantLinear) and layer not in chosen:
            raise ValueError(f"{who}: the checkpoint must have a 4-bit weight {_join(name, 'weight')}, got none")
    return planned


def _check_dense(expected, tensors, layers, attach: dict[str, LoraConfig], who: str) -> None:
    """ValueError unless `tensors` are those of `expected` (one of each shared group) and of the adapters to attach."""
    shapes = {}
    for name, config in attach.items():
        if name not in layers:
            raise ValueError(f"{who}: model must have a 4-bit layer {name} for its adapter, got none")
        shapes[_join(name, "lora_A.weight")] = (config.r, layers[name].in_features)
        shapes[_join(name, "lora_B.weight")] = (layers[name].out_features, config.r)
    missing = [name for name in shapes if name not in tensors]
    for group in _shared(expected):
        shapes.update({name: tuple(expected[name].shape) for name in group})
        if not any(name in tensors for name in group):
            missing.append(group[0])
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ValueError(f"{who}: the checkpoint must have the model's names, missing {missing}, unknown {unknown}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{who}: {name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")


def _install(model: nn.Module, layers, qweights, attach, tensors) -> None:
    names = {}
    for name, layer in layers.items():
        names.setdefault(layer, []).append(name)
    for layer, aliases in names.items():
        name = next(alias for alias in aliases if alias in qweights)
        device = "cpu" if layer.weight.is_meta else layer.weight.device
        if isinstance(layer, QuantLinear):
            layer.set_qweight(qweights[name].to(device))
        else:
            new = QuantLinear.from_quantized(qweights[name].to(device), layer.bias).train(layer.training)
            replace_module(model, aliases, layer, new)
    for name, config in attach.items():
        stored = tensors[_join(name, "lora_A.weight")].dtype
        model.get_submodule(name).add_lora(config, dtype=stored)

    state, placed = model.state_dict(keep_vars=True), {}
    for name, tensor in tensors.items():
        target = state[name]
        if target.is_meta:
            trainable = isinstance(target, nn.Parameter) and target.requires_grad
            tensor = tensor.clone()  # not a view of the file
            placed[id(target)] = nn.Parameter(tensor, trainable) if isinstance(target, nn.Parameter) else tensor
        else:
            target.data.copy_(tensor)
    for module in model.modules() if placed else ():
        for store in (module._parameters, module._buffers):
            store.update({leaf: placed[id(t)] for leaf, t in store.items() if id(t) in placed})
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        message = f"nf4kernels.load_checkpoint: still on the meta device, since no checkpoint holds them: {left}"
        warnings.warn(message, stacklevel=3)
