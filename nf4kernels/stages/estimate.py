"""The memory to load, to train and to serve a model in 4 bits, from its config.json alone."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..integrations import peft as _peft  # noqa: F401 (makes PEFT know our layers)
from ..model.plan import QUANTIZED, is_conv1d, linear_shape, names_of_modules, parts, replace_module
from ..model.quantize import quantize_model
from ..nn.quant_experts import QuantExperts
from .errors import StageError
from .sharded_memory import bytes_here, gathered
from .traced_memory import Peak, peak_of_serving, peak_of_training

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARDS = ("fsdp2", "zero3")


def own_dtype(parameter: Tensor) -> float:
    """Bytes of AdamW's two moments, which have the dtype of their parameter."""
    return 2 * parameter.nbytes


def _torchao(bits: int) -> Callable[[Tensor], float]:
    """The same of torchao's: codes, an fp32 scale for 256 of them, and for each moment its levels in fp32."""

    def moments(parameter: Tensor) -> float:
        numbers = parameter.numel()
        is_quantized = numbers >= 4096 and numbers % 256 == 0
        return 2 * (numbers * bits // 8 + 4 * (numbers // 256) + 4 * 2**bits) if is_quantized else own_dtype(parameter)

    return moments


def _bitsandbytes(parameter: Tensor) -> float:
    """Of its 8-bit moments, with an fp32 scale for 256 each."""
    return 2 * (1 + 4 / 256) * parameter.numel()


# transformers' names -> bytes that a trained parameter takes for the optimizer; paged_adamw_32bit is ours.
OPTIMIZERS: dict[str, Callable[[Tensor], float]] = {
    "adamw_torch": own_dtype,
    "adamw_torch_fused": own_dtype,
    "adamw_torch_8bit": _torchao(8),
    "adamw_torch_4bit": _torchao(4),
    "adamw_8bit": _bitsandbytes,
    "paged_adamw_32bit": own_dtype,
    "paged_adamw_8bit": _bitsandbytes,
    "sgd": lambda parameter: 0,
}


@dataclass(frozen=True)
class Options:
    """What is trained, and how.

    Attributes:
        batch, length: sequences in a micro-batch and tokens in each.
        rank: of the adapters on every linear layer but the heads.
        experts: whether the experts of a mixture get adapters, too.
        codebook, block_size, double_quant, scale_codebook, skip: as in `nf4kernels.quantize_model`.
        dtype: of activations and of the weights that stay dense.
        adapter_dtype: of adapters and of their gradients.
        optimizer: one of OPTIMIZERS; the states of a paged one are taken to be in the host's memory.
        checkpointing: whether each layer's activations are computed again in the backward pass.
        offload_activations: whether what is saved for the backward pass waits on the host.
        accumulation: micro-batches a step.
        gpus, shard: ranks, and how they share the parameters ("fsdp2" or "zero3").
        reshard_after_forward: of FSDP2: whether a layer's gathered parameters are freed until its backward pass.
        mixed_precision: of FSDP2: whether floating parameters are gathered, and computed with, in bfloat16.
        device: "cuda" counts the weight that is decoded for the product of many rows, "cpu" has none.
    """

    batch: int = 1
    length: int = 512
    rank: int = 16
    experts: bool = False
    codebook: str = "nf4"
    block_size: int | None = None
    double_quant: bool = True
    scale_codebook: str = "e4m3"
    skip: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = True
    offload_activations: bool = False
    accumulation: int = 1
    gpus: int = 1
    shard: str = "fsdp2"
    reshard_after_forward: bool = True
    mixed_precision: bool = False
    device: str = "cuda"

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.mixed_precision else None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "rank", "accumulation", "gpus"):
            least = 2 if name == "length" else 1
            if getattr(self, name) < least:
                raise StageError(f"--{name} must be {least} or more, got {getattr(self, name)}")
        for name, known in (
            ("dtype", DTYPES), ("adapter_dtype", DTYPES), ("optimizer", OPTIMIZERS), ("shard", SHARDS),
            ("device", ("cuda", "cpu")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise StageError(f"--{flag} must be one of {', '.join(known)}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, the largest part of each stage alive at the same moment.

    Attributes:
        weights: the 4-bit codes.
        scales: of the blocks, and what else is stored with the codes.
        dense: what stays in `dtype`: embeddings, head, norms, biases.
        adapters, optimizer: of training; `optimizer_on_host` beside them in the host's memory where it is paged.
        gradients: of adapters, as many as exist at the moment of training's peak.
        activations, logits: at that moment; logits with their copies and gradients. `activations_on_host` beside them
            where they are offloaded, all that is moved in a step.
        workspace: the largest 4-bit matrix decoded, which the product of many rows may need.
        gathered: the parameters of all ranks that are in use at once.
        opening: of FSDP2, what is gathered when the first layer begins, and no activations are there yet.
        cache: keys and values of `length` tokens a sequence.
        prefill: what else is alive while they are computed.
        largest: the largest matrix before it is quantized, while loading.
        parameters: of the model, adapters left out.
    """

    options: Options
    parameters: int
    weights: int
    scales: int
    dense: int
    largest: int
    adapters: int
    gradients: int
    optimizer: int
    optimizer_on_host: int
    activations: int
    activations_on_host: int
    logits: int
    workspace: int
    gathered: int
    opening: int
    cache: int
    prefill: int

    @property
    def model(self) -> int:
        return self.weights + self.scales + self.dense

    @property
    def load(self) -> int:
        return self.model + self.largest

    @property
    def train(self) -> int:
        trained = self.adapters + self.gradients + self.optimizer
        working = self.activations + self.logits + self.workspace + self.gathered
        return self.model + trained + max(working, self.opening)

    @property
    def serve(self) -> int:
        return self.model + self.cache + max(self.prefill + self.workspace + self.gathered, self.opening)

    def as_dict(self) -> dict[str, Any]:
        """Options, parts and totals, for JSON."""
        told = {field.name: getattr(self.options, field.name) for field in fields(Options)}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "options"}
        return {**told, **own, "load": self.load, "train": self.train, "serve": self.serve}


def estimate(config: Path | dict[str, Any], options: Options | None = None) -> Estimate:
    """The memory of a causal language model by its config.json, the file, its directory or its content.

    Not counted: what CUDA's context and the allocator's rounding take, and what an operator allocates within itself.

    Raises:
        StageError: the configuration cannot be read, is of no causal language model, or its model cannot be traced.
    """
    options = options or Options()
    return next(estimates(config, [options.batch], [options.length], [options.rank], options))


def estimates(
    config: Path | dict[str, Any],
    batches: Sequence[int],
    lengths: Sequence[int],
    ranks: Sequence[int],
    options: Options | None = None,
) -> Iterator[Estimate]:
    """One `estimate` for every rank, batch and length, in that order of nesting, the model being built once a rank."""
    options = options or Options()
    cases = [
        [replace(options, rank=rank, batch=batch, length=length) for batch in batches for length in lengths]
        for rank in ranks
    ]
    read = read_config(config)
    for of_rank in cases:
        built = Built(read, of_rank[0])
        for case in of_rank:
            yield built.estimate(case)


def read_config(source: Path | dict[str, Any]) -> Any:
    """The configuration as transformers has it, what it says of a quantization left out."""
    where = "config"
    if isinstance(source, dict):
        told = source
    else:
        file = source / "config.json" if source.is_dir() else source
        where = str(file)
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StageError(f"CONFIG must be a config.json or its directory: {error}") from None
        except ValueError as error:
            raise StageError(f"{where} must be JSON: {error}") from None
    kind = told.get("model_type") if isinstance(told, dict) else None
    if kind not in CONFIG_MAPPING:
        raise StageError(f"{where} must have a model_type that transformers knows, got {kind!r}")
    told = {key: value for key, value in told.items() if key != "quantization_config"}
    try:
        config = CONFIG_MAPPING[kind].from_dict(told)
    except Exception as error:  # what a configuration's class raises has no common type
        raise StageError(f"{where} must describe a {kind}: {error}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise StageError(f"{where} must be of a causal language model, got {kind}")
    return config


def _linear_on_meta(conv1d: Any) -> nn.Linear:
    out_features, in_features = linear_shape(conv1d)
    has_bias = conv1d.bias is not None
    return nn.Linear(in_features, out_features, has_bias, device="meta", dtype=conv1d.weight.dtype)


class Built:
    """A model in 4 bits with adapters of one rank, on the meta device, and its parts."""

    def __init__(self, config: Any, options: Options) -> None:
        try:
            with torch.device("meta"):
                dense: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
        except Exception as error:  # what a model's class raises about its configuration has no common type
            raise StageError(f"the configuration must describe a {config.model_type}: {error}") from None
        if getattr(dense, "_supports_sdpa", False):
            dense.set_attn_implementation("sdpa")
        self.parameters = sum(parameter.numel() for parameter in dense.parameters())
        for module, names in names_of_modules(dense).items():
            if is_conv1d(module):  # of GPT-2: from_pretrained makes a QuantLinear of it, as of an nn.Linear
                replace_module(dense, names, module, _linear_on_meta(module))
        try:
            report = quantize_model(
                dense, options.skip, progress=False, codebook=options.codebook, block_size=options.block_size,
                double_quant=options.double_quant, scale_codebook=options.scale_codebook,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise StageError(str(error)) from None
        if not report.layers:
            reasons = sorted({layer.reason for layer in report.skipped})
            raise StageError(f"no layer of this {config.model_type} is quantized: {', '.join(reasons)}")
        self.model = dense
        quantized = [module for module in dense.modules() if isinstance(module, QUANTIZED)]
        matrices = [part for module in quantized for part in parts(module)]
        self.weights: list[Tensor] = [part.weight for part in matrices]
        named = [
            (name, tensor) for part in matrices
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        ]  # fmt: skip
        self.scales = [tensor for name, tensor in named if name not in ("weight", "bias")]
        of_matrices = {id(tensor) for tensor in (*self.weights, *self.scales)}
        whole = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
        self.dense = [tensor for key, tensor in whole.items() if key not in of_matrices]
        width = DTYPES[options.dtype].itemsize
        self.largest = width * max(math.prod(part.weight_shape) for part in matrices)
        self.decoded = width * max(one_matrix(part.weight_shape) for part in matrices)

        experts = {
            name.rpartition(".")[2] for name, module in dense.named_modules() if isinstance(module, QuantExperts)
        }
        targets = [
            f"{parent}.{leaf}"
            for parent in experts
            for module in quantized if isinstance(module, QuantExperts)
            for leaf in module.weights
        ] if options.experts else []  # fmt: skip
        if options.experts and not targets:
            raise StageError("--experts needs a model with experts in 4 bits, and this one has none")
        lora = LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules="all-linear", target_parameters=sorted(set(targets))
        )
        try:
            with torch.device("meta"):
                self.peft: Any = get_peft_model(dense, lora)
        except (TypeError, ValueError) as error:
            raise StageError(f"PEFT refuses adapters on this {config.model_type}: {error}") from None
        self.trained = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.to(DTYPES[options.adapter_dtype])
        self.adapters = sum(parameter.nbytes for parameter in self.trained)

    def estimate(self, options: Options) -> Estimate:
        training = self._peak_of_training(options)
        prefill, cache = self._traced(lambda: self._serving(options))
        ranks, shard = options.gpus, options.shard
        adapters = bytes_here(self.trained, ranks, shard)
        whole = sum(map(OPTIMIZERS[options.optimizer], self.trained))
        optimizer = round(whole * adapters / self.adapters)
        paged = options.optimizer.startswith("paged_")
        of_ranks = gathered(self.peft, ranks, shard, options.reshard_after_forward, options.gathered_dtype)
        return Estimate(
            options=options,
            parameters=self.parameters,
            weights=self._here(self.weights, options),
            scales=self._here(self.scales, options),
            dense=self._here(self.dense, options),
            largest=self.largest,
            adapters=adapters,
            gradients=round(training.gradients * adapters / self.adapters),
            optimizer=0 if paged else optimizer,
            optimizer_on_host=optimizer if paged else 0,
            activations=training.activations,
            activations_on_host=training.on_host,
            logits=training.logits,
            workspace=self.decoded if options.device == "cuda" else 0,
            gathered=of_ranks.working,
            opening=of_ranks.opening,
            cache=cache,
            prefill=max(prefill.total - cache, 0),
        )

    def _here(self, tensors: list[Tensor], options: Options) -> int:
        """Bytes on one rank: parameters are shared, buffers are not."""
        parameters = [each for each in tensors if isinstance(each, nn.Parameter)]
        buffers = sum(each.nbytes for each in tensors if not isinstance(each, nn.Parameter))
        return bytes_here(parameters, options.gpus, options.shard) + buffers

    def prepare_training(self, options: Options) -> None:
        if options.checkpointing:
            self.peft.gradient_checkpointing_enable({"use_reentrant": False})
            self.peft.enable_input_require_grads()
        else:
            self.peft.gradient_checkpointing_disable()
            self.peft.disable_input_require_grads() if hasattr(self.model, "_require_grads_hook") else None
        self.peft.train()

    def _peak_of_training(self, options: Options) -> Peak:
        self.prepare_training(options)
        sizes = options.batch, options.length, options.accumulation
        return self._traced(lambda: peak_of_training(self.peft, *sizes, offload=options.offload_activations))

    def _serving(self, options: Options) -> tuple[Peak, int]:
        self.peft.gradient_checkpointing_disable()
        self.peft.eval()
        return peak_of_serving(self.peft, options.batch, options.length)

    def _traced(self, trace: Any) -> Any:
        try:
            return trace()
        except Exception as error:  # a model's own code on tensors without values
            line = str(error).strip().split("\n")[0]
            kind = self.model.config.model_type
            raise StageError(f"a {kind} cannot be estimated, its code needs values: {line}") from None


def one_matrix(shape: Sequence[int]) -> int:
    """The numbers of one matrix of a weight `[.., N, K]`."""
    return shape[-2] * shape[-1]
