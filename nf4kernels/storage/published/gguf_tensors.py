"""The tensors of a GGUF file by the names of a Hugging Face checkpoint, rows in the order that its models have them."""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .ggml_blocks import ASYMMETRIC, IN_4_BITS, NUMBERS, SIZES, numbers_from_rows
from .gguf_file import GgufFile
from .layouts import INSTEAD, NO_ZERO_POINT

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
OF_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
# Architecture -> what its layers name otherwise; whose layers have these names and no others.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "qwen3moe": {}, "gemma2": OF_GEMMA, "gemma3": OF_GEMMA
}  # fmt: skip
PAIRED = ("llama",)  # whose q and k rows llama.cpp writes with the halves of a head interleaved
NORMS_FROM_ONE = ("gemma2", "gemma3")  # whose norms it writes with the 1 added that the model adds
LEFT_OUT = ("rope_freqs",)  # computed from the configuration


class GgufTensors:
    """The file's tensors, by name: `x.weight` or `x.bias` in numbers, or `x.q4_0` and `x.iq4_nl` in rows of bytes.

    Embeddings are in numbers, whatever the file has them in, and 6- and 8-bit tensors too: exact, in fp32.

    Raises:
        ValueError: the architecture is not one of ARCHITECTURES, or a tensor has a name or a type that is not read.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._architecture = str(file.metadata.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"general.architecture must be one of {known}, got {self._architecture!r}: {INSTEAD}")
        self._sources: dict[str, tuple[str, int | None]] = {}  # name -> the file's name, and which expert's
        for name in file.tensors:
            self._add(name)

    def _add(self, name: str) -> None:
        base, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", base)
        stem = block[2] if block else base
        if stem in LEFT_OUT:
            return
        theirs = ({**IN_LAYER, **ARCHITECTURES[self._architecture]} if block else TOP).get(stem)
        if theirs is None or leaf not in ("weight", "bias"):
            raise ValueError(f"tensors must be those of a {self._architecture} model, got {name}: {INSTEAD}")
        kind = self._file.tensors[name].kind
        if kind in ASYMMETRIC:
            raise ValueError(f"{name} is in {kind}, blocks with a minimum (asymmetric), {NO_ZERO_POINT}: {INSTEAD}")
        if kind not in SIZES:
            raise ValueError(f"{name} must be in one of {', '.join(SIZES)}, got {kind}: {INSTEAD}")
        ours = f"model.layers.{block[1]}.{theirs}" if block else theirs
        ending = IN_4_BITS[kind] if kind in IN_4_BITS and stem != "token_embd" else leaf
        if "{}" not in ours:
            self._sources[f"{ours}.{ending}"] = name, None
            return
        for expert in range(self._file.tensors[name].shape[0]):
            self._sources[f"{ours.format(expert)}.{ending}"] = name, expert

    @property
    def names(self) -> Collection[str]:
        return self._sources.keys()

    def on_meta(self, name: str) -> Tensor:
        source, expert = self._sources[name]
        tensor = self._file.tensors[source]
        shape = tensor.shape if expert is None else tensor.shape[1:]
        if name.endswith((".weight", ".bias")):
            return torch.empty(shape, dtype=NUMBERS.get(tensor.kind, torch.float32), device="meta")
        return torch.empty((*shape[:-1], tensor.row_bytes), dtype=torch.uint8, device="meta")

    def read(self, name: str) -> Tensor:
        source, expert = self._sources[name]
        rows = self._file.rows(source)
        rows = self._unpaired(source, rows if expert is None else rows[expert])
        if not name.endswith((".weight", ".bias")):
            return rows
        kind = self._file.tensors[source].kind
        numbers = numbers_from_rows(rows, kind)
        if self._architecture in NORMS_FROM_ONE and source.endswith("norm.weight"):
            numbers = (numbers.float() - 1).to(numbers.dtype)
        return numbers.clone() if kind in NUMBERS else numbers

    def _unpaired(self, source: str, rows: Tensor) -> Tensor:
        """q's and k's rows as transformers' rotary embedding wants them: each head's first half, then its second."""
        projection = re.search(r"\.attn_([qk])\.", source)
        if self._architecture not in PAIRED or projection is None:
            return rows
        heads = self._heads(projection[1])
        by_row = rows if rows.dim() == 2 else rows.view(self._file.tensors[source].shape[-1], -1)  # of a bias
        pairs = by_row.view(heads, -1, 2, by_row.shape[-1])
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _heads(self, projection: str) -> int:
        metadata: dict[str, Any] = self._file.metadata
        heads = metadata.get(f"{self._architecture}.attention.head_count")
        if projection == "k":
            heads = metadata.get(f"{self._architecture}.attention.head_count_kv", heads)
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"{self._architecture}.attention.head_count must be a number, got {heads!r}")
        return heads
