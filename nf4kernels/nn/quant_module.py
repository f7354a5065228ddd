"""QuantModule: how a module holds a 4-bit weight, casts it, saves it and loads it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..codebook import CODEBOOKS, SCALE_CODEBOOKS
from ..quantized_weight import WEIGHT_DTYPES, QuantizedExperts, QuantizedWeight, WeightArgs

SCALES = ("scale_absmax", "scale_offset", "code", "scale_code")
BUFFERS = ("absmax", *SCALES)
TWO_DTYPES = (torch.float32, torch.bfloat16)  # any two that only a cast makes the same


def checked_compute_dtype(compute_dtype: torch.dtype | None, who: str) -> torch.dtype | None:
    if compute_dtype is not None and compute_dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{who}: compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}")
    return compute_dtype


class QuantModule(nn.Module):
    """A frozen uint8 parameter `weight` and the scales as buffers, which only a change of device reaches."""

    WHO: ClassVar[str]  # the subclass's name in messages
    QUANTIZED: ClassVar[Any] = QuantizedWeight  # or QuantizedExperts

    weight: Tensor
    absmax: Tensor
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    code: Tensor
    scale_code: Tensor | None
    source_dtype: Tensor
    cast_to: torch.dtype | None = (
        None  # the last cast of the module to a floating dtype, which a dense weight would follow
    )

    def set_qweight(self, qweight: QuantizedWeight | QuantizedExperts) -> None:
        """Take over the tensors and the options of `qweight`; whatever else the module has stays as it is."""
        self.out_features, self.in_features = qweight.shape[-2:]
        self.block_size, self.codebook, self.scale_codebook = (
            qweight.block_size, qweight.codebook, qweight.scale_codebook,
        )  # fmt: skip
        self.weight = nn.Parameter(qweight.packed, requires_grad=False)
        for name in BUFFERS:
            self.register_buffer(name, getattr(qweight, name))
        source = torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8, device=qweight.device)
        self.register_buffer("source_dtype", source)
        self.cast_to = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of Ŵ."""
        return self.out_features, self.in_features

    @property
    def qweight(self) -> QuantizedWeight | QuantizedExperts:
        """The weight as a value that shares this module's tensors."""
        if self.weight.is_meta:
            raise ValueError(f"{self.WHO}.qweight: the layer is on the meta device, load its state first")
        return self.QUANTIZED(
            self.weight.data, *(getattr(self, name) for name in BUFFERS), self.weight_shape,
            WEIGHT_DTYPES[int(self.source_dtype.item())], self.block_size, self.codebook, self.scale_codebook,
        )  # fmt: skip

    @property
    def dense_dtype(self) -> torch.dtype:
        """What a dense weight here would be: the dtype that it was quantized from, or what the module was cast to."""
        return self.cast_to or self.qweight.dtype

    @property
    def double_quant(self) -> bool:
        return self.scale_codebook is not None

    def _parameter(self, name: str) -> Any:
        """By nn.Module's dictionary (its attribute look-up takes 0.6 us), unless sharding made it a plain attribute."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _weight_args(self) -> WeightArgs:
        buffers: Any = self._buffers
        absmax = buffers["absmax"]
        scales = (buffers["scale_absmax"], buffers["scale_offset"], buffers["code"], buffers["scale_code"])
        for scale in scales:
            if scale is not None and scale.dtype != torch.float32:
                raise TypeError(
                    f"{self.WHO}: {next(n for n in SCALES if buffers[n] is scale)} must stay float32,"
                    f" got {scale.dtype} (something other than Module.to cast this layer's buffers)"
                )
        expected = torch.float32 if self.scale_codebook is None else torch.uint8
        if absmax.dtype != expected:
            raise TypeError(f"{self.WHO}: absmax must stay {expected}, got {absmax.dtype}")
        return self._parameter("weight"), absmax, *scales, self.out_features, self.in_features, self.block_size

    def _apply(self, fn, recurse: bool = True):
        """As nn.Module, but a dtype cast never reaches the weight: the original goes to the new device instead."""
        before = {name: getattr(self, name) for name in (*BUFFERS, "source_dtype")}
        packed = self.weight.data
        dtypes = {fn(torch.empty(1, dtype=dtype, device=packed.device)).dtype for dtype in TWO_DTYPES}
        if len(dtypes) == 1 and dtypes <= set(WEIGHT_DTYPES):  # a cast; a change of device keeps both
            self.cast_to = dtypes.pop()
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        if self.weight.dtype != packed.dtype:  # Module.type casts integers too
            self.weight.data = packed.to(self.weight.device)
        return self

    def state_errors(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """What in a state would not fit, by its key: another dtype, shape, block size or codebook."""
        specs = self.QUANTIZED.specs(*self.weight_shape, self.block_size, self.double_quant)
        specs["weight"] = specs.pop("packed")
        specs["source_dtype"] = (torch.uint8, ())
        errors = []
        for name, (dtype, shape) in specs.items():
            key = prefix + name
            if key not in state_dict:
                continue
            value = state_dict[key]
            if dtype is None:
                errors.append(f"{key}: this layer has no double quantization, its scales are float32")
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
            if not torch.equal(levels.cpu(), known[codebook]):
                errors.append(f"{prefix}{name} must be the {codebook} codebook, got {levels[:4].tolist()}...")
        return errors

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, error_msgs) -> None:
        """Refuse, before anything is copied, what does not fit."""
        errors = self.state_errors(state_dict, prefix)
        if errors:
            error_msgs.extend(f"{self.WHO}: {error}" for error in errors)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, error_msgs)
