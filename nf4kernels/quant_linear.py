"""QuantLinear: nn.Linear with a 4-bit weight and, if wanted, a LoRA adapter."""

import torch
from torch import Tensor, nn

from .codebook import CODEBOOKS, SCALE_CODEBOOKS
from .functional import autocast_is_on, dequantize, linear_from_args, lora_linear_from_args, quantize
from .lora import LoraConfig, init_adapter
from .quantized_weight import WEIGHT_DTYPES, QuantizedWeight, tensor_specs

SCALES = ("scale_absmax", "scale_offset", "code", "scale_code")
BUFFERS = ("absmax", *SCALES)


class QuantLinear(nn.Linear):
    """y = x @ Ŵ.T + bias [+ scaling * dropout(x) @ lora_A.T @ lora_B.T], Ŵ in 4 bits.

    `weight` is a frozen uint8 parameter, the scales are buffers; `.to(dtype)` and mixed-precision casts leave both
    alone and move bias and adapter only. Nothing is ever repacked.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; dtype is that of the dense weight which is
            drawn and then quantized, of bias and of a new adapter.
        codebook, block_size, double_quant, scale_codebook: as in `nf4kernels.quantize`.
        compute_dtype: what x is cast to for the product, the output being cast back; None computes in x's dtype.
            Under autocast, autocast's dtype wins.
        lora: an adapter to attach, or None.

    Source: QLoRA (arXiv 2305.14314), equation 5.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        codebook: str | Tensor = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        scale_codebook: str = "e4m3",
        compute_dtype: torch.dtype | None = None,
        lora: LoraConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        nn.Module.__init__(self)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        qweight = quantize(dense.weight, codebook, block_size, double_quant, scale_codebook)
        self._install(qweight, dense.bias, compute_dtype, lora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        lora: LoraConfig | None = None,
        compute_dtype: torch.dtype | None = None,
        **quant_options,
    ) -> "QuantLinear":
        """The layer that stands for `linear`; bias is shared with it, training mode kept.

        Raises as `nf4kernels.quantize` does, for linear's weight and `quant_options`.
        """
        layer = cls.from_quantized(quantize(linear.weight, **quant_options), linear.bias, compute_dtype, lora)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls,
        qweight: QuantizedWeight,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
        lora: LoraConfig | None = None,
    ) -> "QuantLinear":
        """The layer around an existing quantized weight, whose tensors it shares."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._install(qweight, bias, compute_dtype, lora)
        return layer

    def _install(self, qweight, bias, compute_dtype, lora) -> None:
        if compute_dtype is not None and compute_dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"nf4kernels.QuantLinear: compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}"
            )
        self.compute_dtype = compute_dtype
        self.set_qweight(qweight)
        self.register_parameter("bias", bias)
        self.lora: LoraConfig | None = None
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        if lora is not None:
            self.add_lora(lora, dtype=qweight.dtype if bias is None else bias.dtype)

    def set_qweight(self, qweight: QuantizedWeight) -> None:
        """Take over the tensors and the options of `qweight`; bias and adapter stay as they are."""
        self.out_features, self.in_features = qweight.shape
        self.block_size, self.codebook, self.scale_codebook = (
            qweight.block_size, qweight.codebook, qweight.scale_codebook,
        )  # fmt: skip
        self.weight = nn.Parameter(qweight.packed, requires_grad=False)
        for name in BUFFERS:
            self.register_buffer(name, getattr(qweight, name))
        source = torch.tensor(WEIGHT_DTYPES.index(qweight.dtype), dtype=torch.uint8, device=qweight.device)
        self.register_buffer("source_dtype", source)

    @property
    def qweight(self) -> QuantizedWeight:
        """The weight as a `QuantizedWeight` that shares this layer's tensors."""
        if self.weight.is_meta:
            raise ValueError("nf4kernels.QuantLinear.qweight: the layer is on the meta device, load its state first")
        return QuantizedWeight(
            self.weight.data, *(getattr(self, name) for name in BUFFERS), (self.out_features, self.in_features),
            WEIGHT_DTYPES[self.source_dtype.item()], self.block_size, self.codebook, self.scale_codebook,
        )  # fmt: skip

    @property
    def double_quant(self) -> bool:
        return self.scale_codebook is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None or autocast_is_on(x.device):
            return self._product(x)
        in_dtype = x.dtype
        return self._product(x.to(self.compute_dtype) if in_dtype in WEIGHT_DTYPES else x).to(in_dtype)

    def _product(self, x: Tensor) -> Tensor:
        bias, lora = self._parameter("bias"), self.lora
        if lora is None:
            return linear_from_args(x, self._weight_args(), bias, "nf4kernels.QuantLinear")
        return lora_linear_from_args(
            x, self._weight_args(), self.lora_A.weight, self.lora_B.weight, lora.scaling, bias,
            lora.dropout if self.training else 0.0,
        )  # fmt: skip

    def _parameter(self, name: str) -> Tensor | None:
        """By nn.Module's dictionary (its attribute look-up takes 0.6 us), unless sharding made it a plain attribute."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _weight_args(self) -> tuple:
        buffers = self._buffers
        absmax = buffers["absmax"]
        scales = (buffers["scale_absmax"], buffers["scale_offset"], buffers["code"], buffers["scale_code"])
        for scale in scales:
            if scale is not None and scale.dtype != torch.float32:
                raise TypeError(
                    f"nf4kernels.QuantLinear: {next(n for n in SCALES if buffers[n] is scale)} must stay float32,"
                    f" got {scale.dtype} (something other than Module.to cast this layer's buffers)"
                )
        expected = torch.float32 if self.scale_codebook is None else torch.uint8
        if absmax.dtype != expected:
            raise TypeError(f"nf4kernels.QuantLinear: absmax must stay {expected}, got {absmax.dtype}")
        return self._parameter("weight"), absmax, *scales, self.out_features, self.in_features, self.block_size

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Ŵ `[out_features, in_features]`, without the adapter."""
        return dequantize(self.qweight, dtype)

    def add_lora(self, config: LoraConfig, dtype: torch.dtype | None = None) -> None:
        """Attach a fresh adapter; ValueError where one is attached already.

        Args:
            dtype: of lora_A and lora_B; None takes the dtype of bias, or the one the weight was quantized from.
        """
        if self.lora is not None:
            raise ValueError("nf4kernels.QuantLinear.add_lora: the layer must have no adapter yet, got one already")
        if dtype is None:
            dtype = self.qweight.dtype if self.bias is None else self.bias.dtype
        options = {"bias": False, "device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Linear(self.in_features, config.r, **options)
        self.lora_B = nn.Linear(config.r, self.out_features, **options)
        if not self.weight.is_meta:
            init_adapter(self.lora_A, self.lora_B, config)
        self.lora = config

    def lora_delta(self) -> Tensor:
        """scaling * lora_B @ lora_A, fp32 `[out_features, in_features]`; ValueError without an adapter."""
        if self.lora is None:
            raise ValueError("nf4kernels.QuantLinear.lora_delta: the layer must have an adapter, got none")
        with torch.no_grad():
            return self.lora.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def to_linear(
        self, dtype: torch.dtype = torch.bfloat16, merge_lora: bool = True, base_weight: Tensor | None = None
    ) -> nn.Linear:
        """A dense nn.Linear with Ŵ, plus the adapter's product if `merge_lora`, summed in fp32 and rounded once.

        `base_weight`, `[out_features, in_features]`, takes Ŵ's place. This layer is left as it is. Copies everything.
        """
        if base_weight is None:
            weight = self.dequantize(torch.float32)
        else:
            weight = base_weight.to(self.weight.device, torch.float32, copy=True)
        if merge_lora and self.lora is not None:
            weight += self.lora_delta()
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.to(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return dense.train(self.training)

    def reset_parameters(self) -> None:
        """Draw a new weight as nn.Linear does and quantize it; a new bias and adapter likewise."""
        source = torch.bfloat16 if self.bias is None else self.bias.dtype
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.weight.device, dtype=source
        )
        code = self.code if self.codebook == "custom" else self.codebook
        scale_codebook = self.scale_codebook if self.scale_codebook in SCALE_CODEBOOKS else "e4m3"
        self.set_qweight(quantize(dense.weight, code, self.block_size, self.double_quant, scale_codebook))
        if self.bias is not None:
            self.bias.data.copy_(dense.bias)
        if self.lora is not None:
            init_adapter(self.lora_A, self.lora_B, self.lora)

    def _apply(self, fn, recurse: bool = True):
        """As nn.Module, but a dtype cast never reaches the weight: the original goes to the new device instead."""
        before = {name: getattr(self, name) for name in (*BUFFERS, "source_dtype")}
        packed = self.weight.data
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        if self.weight.dtype != packed.dtype:  # Module.type casts integers too
            self.weight.data = packed.to(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, error_msgs) -> None:
        """Refuse, before anything is copied, state of another dtype, shape, block size or codebook."""
        specs = tensor_specs(self.out_features, self.in_features, self.block_size, self.double_quant)
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
        if errors:
            error_msgs.extend(f"nf4kernels.QuantLinear: {error}" for error in errors)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, error_msgs)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codebook={self.codebook}, block_size={self.block_size}, scale_codebook={self.scale_codebook}"
        )
        return text if self.lora is None else f"{text}, lora_r={self.lora.r}"
