"""QuantModule: how a module holds a 4-bit weight, casts it, saves it and loads it, and notices a write into it."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..codebook import CODEBOOKS, DOUBLE_QUANT_CODEBOOKS, SCALE_CODEBOOKS, name_of
from ..modes import outside_inference_mode
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight, WeightArgs, scales_of
from . import checksum as checksums
from .dtensors import is_dtensor, local_of, placed_as, replicated
from .released import GATHER, check_gathered, is_released

SCALES = ("scale_absmax", "scale_offset", "code", "scale_code")
SCALE_TENSORS = ("absmax", *SCALES)
OTHER_BUFFERS = ("source_dtype", "checksum")
UNSEEN = -1  # no tensor has this version
TWO_DTYPES = (torch.float32, torch.bfloat16)  # any two that only a cast makes the same


def checked_compute_dtype(compute_dtype: torch.dtype | None, who: str) -> torch.dtype | None:
    if compute_dtype is not None and compute_dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}")
    return compute_dtype


class QuantModule(nn.Module):
    """A frozen uint8 parameter `weight` and its scales, which only a change of device reaches.

    8-bit scales of blocks, `absmax`, are a frozen parameter as well: what shards parameters by rows (FSDP2, ZeRO-3)
    then shards them, too. All other scales are buffers, whole everywhere: those of superblocks are few, and numbers
    would be cast with the dense parameters where those are gathered in another dtype.

    Bytes are codes, so that a write that takes them for numbers (an average, nn.init) leaves full-size garbage. It
    raises the tensors' version, which each use compares with the one seen last; where they differ, the buffer
    `checksum` decides: an average of equal bytes, a broadcast of all state and a copy are no change. A write through
    `.data` raises no version, and under torch.compile nothing is compared.
    """

    WHO: ClassVar[str]  # the subclass's name in messages
    QUANTIZED: ClassVar[Any] = QuantizedWeight  # or QuantizedExperts

    weight: Tensor
    absmax: Tensor
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    code: Tensor
    scale_code: Tensor | None
    source_dtype: Tensor
    checksum: Tensor
    absmax_dtype: torch.dtype
    _seen: int  # versions of weight and absmax, summed, at which they were right
    cast_to: torch.dtype | None = None  # the last cast of the module to a floating dtype; a dense weight would follow

    @outside_inference_mode
    def set_qweight(self, qweight: QuantizedWeight | QuantizedExperts) -> None:
        """Take over the tensors and the options of `qweight`; whatever else the module has stays as it is."""
        self.out_features, self.in_features = qweight.shape[-2:]
        self.block_size, self.codebook, self.scale_codebook = (
            qweight.block_size, qweight.codebook, qweight.scale_codebook,
        )  # fmt: skip
        self.register_parameter("weight", nn.Parameter(normal(qweight.packed), requires_grad=False))
        self._hold_absmax(normal(qweight.absmax))
        for name in SCALES:
            tensor = getattr(qweight, name)
            self.register_buffer(name, None if tensor is None else normal(tensor))
        self.absmax_dtype = qweight.absmax.dtype
        source = torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8, device=qweight.device)
        self.register_buffer("source_dtype", source)
        self.register_buffer("checksum", None)
        self.cast_to = None
        self.record_bytes()

    def _hold_absmax(self, absmax: Tensor) -> None:
        """Codes as a frozen parameter, next to the weight; numbers as a buffer."""
        self._buffers.pop("absmax", None)
        behind = {name: self._parameters.pop(name) for name in list(self._parameters) if name != "weight"}
        if absmax.dtype == torch.uint8:
            self.register_parameter("absmax", nn.Parameter(absmax, requires_grad=False))
        behind.pop("absmax", None)
        self._parameters.update(behind)
        if absmax.dtype != torch.uint8:
            self.register_buffer("absmax", absmax)

    @outside_inference_mode
    def record_bytes(self) -> None:
        """Take the bytes for right as they are: after a write that meant to give the layer others."""
        if _has_bytes(self.weight) and _has_bytes(self.absmax):
            self.checksum = checksums.checksum(self.weight, self.absmax)
        else:
            self.checksum = torch.zeros(checksums.LENGTH, dtype=torch.uint8, device=self.code.device)
        self._see_bytes()

    def _see_bytes(self) -> None:
        """Take the bytes for those of `checksum` as they are."""
        self._seen = UNSEEN
        if not (self.weight.is_inference() or self.absmax.is_inference()):
            self._seen = self.weight._version + self.absmax._version

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module, but another weight than the present one brings other bytes with it.

        A shard does not, nor what is gathered from shards: FSDP2 has the one and the other here in turn.
        """
        held = {**self._parameters, **self._buffers} if name in ("weight", "absmax") else {}
        if name == "absmax" and name in self._parameters and type(value) is Tensor:
            value = nn.Parameter(value, requires_grad=False)
        if name in held and isinstance(value, nn.Parameter) and is_dtensor(value):
            self._parameters[name] = value  # nn.Module would call register_parameter
        else:
            super().__setattr__(name, value)
        if name in held:
            if is_dtensor(held[name]) or is_dtensor(value):
                self._see_bytes()
            else:
                self.record_bytes()
        elif name == "weight":  # back from a stand-in, which may have written into it
            self._seen = UNSEEN

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "absmax_dtype" not in state:  # of an earlier version
            self.absmax_dtype = torch.float32 if self.scale_codebook is None else torch.uint8
        absmax = self._buffers.get("absmax")
        if absmax is not None:  # of an earlier version, or numbers
            self._hold_absmax(absmax)
        self._seen = UNSEEN  # copied tensors count their versions anew
        if "checksum" not in self._buffers:
            self.register_buffer("checksum", None)
            self.record_bytes()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module; torch's own styles of tensor parallel, which would cut bytes as numbers, end here."""
        if name in ("weight", "absmax") and is_dtensor(param):
            raise ValueError(
                f"{self.WHO}: a layer in 4 bits must be cut by the styles of nf4kernels.distributed (ColwiseParallel,"
                f" RowwiseParallel, ExpertParallel), which take dense layers as well, got a DTensor as its {name}"
            )
        super().register_parameter(name, param)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of Ŵ."""
        return self.out_features, self.in_features

    @property
    def qweight(self) -> QuantizedWeight | QuantizedExperts:
        """The weight as a value that shares this module's tensors."""
        if self.weight.is_meta:
            raise ValueError(f"{self.WHO}.qweight: the layer is on the meta device, load its state first")
        if is_dtensor(self.weight):
            raise ValueError(
                f"{self.WHO}.qweight: the layer must be whole (unshard() gathers what fully_shard cut; merge_model and"
                " save_checkpoint take a sharded model), got a DTensor as its weight, of which a rank holds a part"
            )
        check_gathered(((name, getattr(self, name)) for name in ("weight", "absmax")), self.WHO)
        return self.QUANTIZED(
            self.checked_weight().data, self.absmax.data, *(getattr(self, name) for name in SCALES), self.weight_shape,
            WEIGHT_DTYPES[int(self.source_dtype.item())], self.block_size, self.codebook, self.scale_codebook,
        )  # fmt: skip

    @property
    def dense_dtype(self) -> torch.dtype:
        """What a dense weight here would be: the dtype that it was quantized from, or what the module was cast to."""
        return self.cast_to or self.original_dtype

    @property
    def original_dtype(self) -> torch.dtype:
        """What the weight was quantized from; ValueError on the meta device, where nobody knows."""
        source = local_of(self.source_dtype)
        if source.is_meta:
            raise ValueError(
                f"{self.WHO}: the layer is on the meta device and does not know what its weight is quantized from: give"
                " a dtype, or load its state first"
            )
        return WEIGHT_DTYPES[int(source)]

    def byte_parameters(self) -> list[Tensor]:
        """The packed weight, and 8-bit scales of its blocks."""
        return [self.weight, self.absmax] if "absmax" in self._parameters else [self.weight]

    @property
    def nbytes(self) -> int:
        """Of the weight and all that belongs to it."""
        tensors = (self.weight, *(getattr(self, name) for name in (*SCALE_TENSORS, *OTHER_BUFFERS)))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def quant_options(self) -> dict[str, Any]:
        """For `quantize`: what makes another weight like this module's."""
        return {
            "codebook": self.code if self.codebook == "custom" else self.codebook, "block_size": self.block_size,
            "double_quant": self.double_quant,
            "scale_codebook": self.scale_codebook if self.scale_codebook in DOUBLE_QUANT_CODEBOOKS else "e4m3",
        }  # fmt: skip

    @property
    def scales(self) -> str:
        """What the blocks' scales are, as `QuantizedWeight.scales`."""
        return scales_of(self.absmax, self.scale_absmax, self.scale_code)

    @property
    def double_quant(self) -> bool:
        return self.scales == "double"

    def _parameter(self, name: str) -> Any:
        """By nn.Module's dictionary (its attribute look-up takes 0.6 us), unless sharding made it a plain attribute."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _weight_args(self) -> WeightArgs:
        buffers: Any = self._buffers
        absmax = self._absmax()
        scales = (buffers["scale_absmax"], buffers["scale_offset"], buffers["code"], buffers["scale_code"])
        for scale in scales:
            if scale is not None and scale.dtype != torch.float32:
                raise TypeError(
                    f"{self.WHO}: {next(n for n in SCALES if buffers[n] is scale)} must stay float32,"
                    f" got {scale.dtype} (something other than Module.to cast this layer's buffers)"
                )
        if absmax.dtype != self.absmax_dtype:
            raise TypeError(f"{self.WHO}: absmax must stay {self.absmax_dtype}, got {absmax.dtype}")
        return self.checked_weight(), absmax, *scales, self.out_features, self.in_features, self.block_size

    def _absmax(self) -> Tensor:
        """By the dictionaries, as `_parameter`."""
        parameters: Any = self._parameters
        if "absmax" in parameters:
            return parameters["absmax"]
        buffers: Any = self._buffers
        absmax: Tensor = buffers["absmax"] if "absmax" in buffers else self.absmax  # noqa: SIM401 (looked up if need be)
        return absmax

    def checked_weight(self) -> Tensor:
        """The packed weight; RuntimeError where its bytes, or absmax', were written in place."""
        parameters: Any = self._parameters
        if "weight" not in parameters:
            return self._stand_in()
        weight: Tensor = parameters["weight"]
        if torch.compiler.is_compiling():
            return weight
        absmax = self._absmax()
        try:
            version = weight._version + absmax._version
        except RuntimeError:  # inference tensors have none
            return weight
        if version != self._seen:
            self.compare_bytes(weight, absmax)
            self._seen = version
        return weight

    def _stand_in(self) -> Tensor:
        """A weight that is no parameter: a plain attribute, as sharding leaves it, but nothing that is computed."""
        if "parametrizations" in self._modules or any(name.startswith("weight_") for name in self._parameters):
            raise RuntimeError(
                f"{self.WHO}: weight must be the packed bytes themselves, got what pruning or another parametrization"
                " makes of them: they are codes, not numbers"
            )
        return self.weight

    def compare_bytes(self, weight: Tensor, absmax: Tensor) -> None:
        if not _has_bytes(weight) or not _has_bytes(absmax) or not _has_bytes(self.checksum):
            return
        recorded = self.checksum.to(weight.device)
        if not torch.equal(checksums.checksum(weight, absmax), recorded) and recorded.any():
            raise RuntimeError(
                f"{self.WHO}: the packed bytes of the {list(self.weight_shape)} weight must stay as quantize made them,"
                " got bytes that were changed in place (by an average of models, nn.init, zero_, pruning...): they are"
                " codes, not numbers. Load the layer's state again, and average or initialise adapters alone"
                " (docs/adapters.md)"
            )

    @outside_inference_mode
    def _apply(self, fn, recurse: bool = True):
        """As nn.Module, but a dtype cast never reaches the weight: the original goes to the new device instead."""
        names = (*SCALES, *OTHER_BUFFERS, *(("absmax",) if "absmax" in self._buffers else ()))
        buffers = {name: self._buffers[name] for name in names}
        parameters = {name: getattr(self, name).data for name in ("weight", "absmax") if name in self._parameters}
        some = self.weight.data
        dtypes = {fn(torch.empty(1, dtype=dtype, device=some.device)).dtype for dtype in TWO_DTYPES}
        if len(dtypes) == 1 and dtypes <= set(WEIGHT_DTYPES):  # a cast; a change of device keeps both
            self.cast_to = dtypes.pop()
        super()._apply(fn, recurse)
        for name, old in buffers.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        for name, old in parameters.items():  # Module.type casts integers, too
            parameter: Any = self._parameters[name]
            if parameter.dtype != old.dtype:
                parameter.data = old.to(parameter.device)
        self._seen = UNSEEN
        return self

    def state_errors(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """What in a state would not fit, by its key: another dtype, shape, block size or codebook."""
        specs = self.QUANTIZED.specs(*self.weight_shape, self.block_size, self.scales, self.code.numel())
        specs["weight"] = specs.pop("packed")
        specs["source_dtype"] = (torch.uint8, ())
        specs["checksum"] = (torch.uint8, (checksums.LENGTH,))
        errors = []
        for name, (dtype, shape) in specs.items():
            key = prefix + name
            if key not in state_dict:
                continue
            value = state_dict[key]
            if is_released(getattr(self, name)):  # empty in DeepSpeed's checkpoint, too, which restores it by its parts
                if value.numel():
                    errors.append(f"{key}: this layer's is released by DeepSpeed's ZeRO-3, gather it first ({GATHER})")
            elif dtype is None:
                errors.append(f"{key}: this layer has no double quantization, its scales are {self.scales}")
            elif value.dtype != dtype or tuple(value.shape) != shape:
                errors.append(f"{key} must be {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}")
        source = state_dict.get(prefix + "source_dtype")
        if not errors and source is not None and not source.is_meta and source.item() >= len(WEIGHT_DTYPES):
            errors.append(f"{prefix}source_dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got {source.item()}")
        for name, codebook, known in (
            ("code", self.codebook, CODEBOOKS),
            ("scale_code", self.scale_codebook, SCALE_CODEBOOKS),
        ):
            levels = state_dict.get(prefix + name)
            if errors or levels is None or levels.is_meta or codebook not in known:
                continue
            rows = levels.reshape(-1, levels.shape[-1])  # of scale_code each expert may have its own
            if any(name_of(row, {codebook: known[codebook]}) != codebook for row in rows):
                errors.append(f"{prefix}{name} must be the {codebook} codebook, got {rows[0, :4].tolist()}...")
        if not errors and not self._fits_checksum(state_dict, prefix):
            errors.append(
                f"{prefix}weight must hold the bytes that {prefix}checksum is of, got others (an average of states?"
                " packed bytes are codes, not numbers; average adapters alone)"
            )
        return errors

    def _fits_checksum(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """False where a state has all three and they contradict each other."""
        keys = [prefix + name for name in ("weight", "absmax", "checksum")]
        has_all = all(key in state_dict and _has_bytes(state_dict[key]) for key in keys)
        if not has_all or is_released(self.weight) or is_released(self.absmax):
            return True
        weight, absmax, recorded = (state_dict[key] for key in keys)
        return not recorded.any() or torch.equal(checksums.checksum(weight, absmax).to(recorded.device), recorded)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """As nn.Module; of a layer that was sharded on meta, buffers are DTensors, too.

        accelerate shards there, broadcasts what such a state lists, and takes each entry for a DTensor.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_dtensor(self.weight) and self.weight.is_meta:
            for key in (prefix + name for name in self._buffers):
                if key in destination:
                    destination[key] = replicated(destination[key], self.weight)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, error_msgs) -> None:
        """Refuse, before anything is copied, what does not fit."""
        for name, own in self._buffers.items():
            key = prefix + name
            if key in state_dict:
                state_dict[key] = placed_as(state_dict[key], own)
        errors = self.state_errors(state_dict, prefix)
        if errors:
            error_msgs.extend(f"{self.WHO}: {error}" for error in errors)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, error_msgs)
        key = f"{prefix}checksum"
        if key in missing:  # a state of an earlier version, or of a part
            missing.remove(key)
        if key in state_dict:
            self._seen = UNSEEN
        elif f"{prefix}weight" in state_dict or f"{prefix}absmax" in state_dict:
            self.record_bytes()


def _has_bytes(tensor: Tensor) -> bool:
    """Not on meta, sharded, released, fake or transformed."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not is_released(tensor)
    return is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def normal(tensor: Tensor) -> Tensor:
    """Autograd takes no tensor that inference mode made."""
    return tensor.clone() if tensor.is_inference() else tensor


def elements_beyond_bytes(model: nn.Module) -> int:
    """How many weights the parameters in bytes of `model` hold beyond their own count."""
    packed = [module for module in model.modules() if isinstance(module, QuantModule)]
    return sum(math.prod(each.weight_shape) - sum(p.numel() for p in each.byte_parameters()) for each in packed)
