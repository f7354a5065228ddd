"""Every op: its schema, a one-line contract and its fake. Nothing else.

Backends implement these per device (`backends/`). The ops are not differentiable; `functional` is. Arguments are
checked where the op is implemented; a fake checks only what its shapes need.
"""

import torch
from torch import Tensor

from .quantized_weight import SUPERBLOCK, absmax_shape, check_block_size, packed_shape

LIBRARY = torch.library.Library("nf4kernels", "DEF")

# A [N, K] weight as `QuantizedWeight.op_args` lists it. The three scale_ tensors are all there or all None.
WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? scale_absmax, Tensor? scale_offset, Tensor code, Tensor? scale_code, "
    "SymInt N, SymInt K, int block_size"
)
RANGE = "SymInt row_begin, SymInt row_end, SymInt col_begin, SymInt col_end"

SCHEMAS = (
    # weight [N, K] fp32, bf16 or fp16 -> packed uint8, absmax fp32. A block with NaN or inf gets a NaN absmax. Of int8,
    # a code of 256 levels, packed is [N, K], one code a byte, and absmax is the scale: the largest magnitude over 127.
    "quantize(Tensor weight, Tensor code, int block_size) -> (Tensor packed, Tensor absmax)",
    # absmax fp32 -> absmax uint8 of the same shape, scale_absmax fp32 [ceil(blocks/256)], scale_offset fp32 [].
    "quantize_absmax(Tensor absmax, Tensor scale_code, bool scale_is_e4m3)"
    " -> (Tensor absmax, Tensor scale_absmax, Tensor scale_offset)",
    # Ŵ[row_begin:row_end, col_begin:col_end] as a new contiguous tensor of dtype.
    f"dequantize({WEIGHT}, {RANGE}, ScalarType dtype) -> Tensor",
    # The same into out, whose shape is the range's and whose last dimension is contiguous.
    f"dequantize_out({WEIGHT}, {RANGE}, Tensor(a!) out) -> ()",
    # y[..., N] = x[..., K] @ Ŵ.T + scaling * lora_P[M, r] @ lora_B[N, r].T + bias, in x's dtype; summed in fp32. M rows
    # of lora_P as of x, whatever their leading dimensions; both factors contiguous and in x's dtype.
    f"linear(Tensor x, {WEIGHT}, Tensor? bias, Tensor? lora_P=None, Tensor? lora_B=None, float scaling=1.0) -> Tensor",
    # dx[..., K] = dy[..., N] @ Ŵ + scaling * lora_Q[M, r] @ lora_A[r, K], in dy's dtype; summed in fp32.
    f"linear_dgrad(Tensor dy, {WEIGHT}, Tensor? lora_Q=None, Tensor? lora_A=None, float scaling=1.0) -> Tensor",
    # y[T, N]: rows of x [T, K] times their expert's Ŵ.T + scaling * lora_P[T, r] @ lora_B[e].T + bias[e], in x's dtype;
    # summed in fp32. bias [E, N], lora_B [E, N, r]; these and lora_P are contiguous and in x's dtype. The weight of E
    # experts, as `QuantizedExperts.op_args` lists it: scale_offset [E], and the other tensors but the codebooks have E
    # in front. expert_offsets int32 [E], contiguous: the row past each expert's last one, as in torch's grouped_mm; an
    # expert may have none. Rows past the last offset become zeros, without a term. Offsets that fall or exceed T are an
    # error on the CPU. A device must not make the host wait: there each offset counts as min(offset, T), or as the one
    # before it where that is larger (0 before the first).
    f"grouped_linear(Tensor x, Tensor expert_offsets, {WEIGHT}, Tensor? bias=None, Tensor? lora_P=None, "
    "Tensor? lora_B=None, float scaling=1.0) -> Tensor",
    # dx[T, K]: rows of dy [T, N] times their expert's Ŵ + scaling * lora_Q [T, r] @ lora_A[e] [r, K], in dy's dtype.
    f"grouped_linear_dgrad(Tensor dy, Tensor expert_offsets, {WEIGHT}, Tensor? lora_Q=None, Tensor? lora_A=None, "
    "float scaling=1.0) -> Tensor",
    # scaling * small[M, r].T @ wide[..., C] as a new [r, C] (transposed: [C, r]) of dtype; fp32 sums, rounded once.
    "lora_grad(Tensor small, Tensor wide, float scaling, ScalarType dtype, bool transposed=False) -> Tensor",
    # P[T, r]: rows of x [T, D], in any strides, times their expert's lora_factor[e] [r, D].T (transposed: [D, r]), in
    # x's dtype, which is lora_factor's; summed in fp32. lora_factor contiguous; the offsets as in grouped_linear.
    "grouped_lora_inner(Tensor x, Tensor expert_offsets, Tensor lora_factor, bool transposed=False) -> Tensor",
    # scaling * small[rows of e].T @ wide[rows of e] as a new [E, r, C] (transposed: [E, C, r]) of dtype; zeros for an
    # expert without rows; fp32 sums, rounded once. small [T, r] contiguous and in wide's dtype, wide [T, C].
    "grouped_lora_grad(Tensor small, Tensor wide, Tensor expert_offsets, float scaling, ScalarType dtype, "
    "bool transposed=False) -> Tensor",
    # rows [T * k, H]: each row t of x [T, H] once for each of its choices top_k_index[t], int64 [T, k], sorted by
    # expert, rows of one expert in the order of (t, j). expert_offsets int32 [num_experts] as grouped_linear takes
    # them. positions int32 [T, k]: the row of each choice. num_experts stands for no expert: such rows are zeros after
    # all others, and their position is ~row. Another index is an error; on a device when it gets there.
    "sort_by_expert(Tensor x, Tensor top_k_index, int num_experts)"
    " -> (Tensor rows, Tensor expert_offsets, Tensor positions)",
    # out[t] = sum over j of weights[t, j] * rows[positions[t, j]] where that is not negative, a new [T, H] of dtype; in
    # fp32 in the order of j, each product and sum rounded, then once to dtype. rows [T * k, H], positions as
    # sort_by_expert gives them, weights [T, k] (None: 1), all in any strides. A position that is no row is an error on
    # the CPU; on a device it counts as none, here and in the next two.
    "combine_experts(Tensor rows, Tensor positions, Tensor? weights, ScalarType dtype) -> Tensor",
    # drows[positions[t, j]] = weights[t, j] * dout[t], zeros at ~ of a negative position, as a new [T * k, H] of dtype.
    "combine_experts_dgrad(Tensor dout, Tensor positions, Tensor? weights, ScalarType dtype) -> Tensor",
    # dweights[t, j] = the inner product of dout[t] and rows[positions[t, j]], 0 where that is negative, a new [T, k] of
    # dtype; summed in fp32, rounded once.
    "combine_experts_wgrad(Tensor dout, Tensor rows, Tensor positions, ScalarType dtype) -> Tensor",
)
OPS = tuple(schema.partition("(")[0] for schema in SCHEMAS)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


def _check_devices(op: str, *tensors: Tensor | None) -> None:
    """A meta tensor among real ones brings a call here: without this check its result would be uninitialised memory."""
    devices = {t.device for t in tensors if t is not None}
    torch._check(len(devices) == 1, lambda: f"nf4kernels.{op}: tensors must be on one device, got {devices}")


@torch.library.register_fake("nf4kernels::quantize", lib=LIBRARY)
def _(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_block_size(block_size, "nf4kernels.quantize")
    _check_devices("quantize", weight, code)
    N, K = weight.shape
    packed = weight.new_empty(packed_shape(N, K, code.shape[0]), dtype=torch.uint8)
    return packed, weight.new_empty(absmax_shape(N, K, block_size), dtype=torch.float32)


@torch.library.register_fake("nf4kernels::quantize_absmax", lib=LIBRARY)
def _(absmax: Tensor, scale_code: Tensor, scale_is_e4m3: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("quantize_absmax", absmax, scale_code)
    superblocks = -(-absmax.numel() // SUPERBLOCK)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(superblocks), absmax.new_empty(())


def _check_range(name, begin, end, size) -> None:
    torch._check(
        begin >= 0 and begin <= end and end <= size,
        lambda: f"nf4kernels.dequantize: {name} must be a range within 0..{size}, got {begin}..{end}",
    )


@torch.library.register_fake("nf4kernels::dequantize", lib=LIBRARY)
def _(packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
      row_begin, row_end, col_begin, col_end, dtype):  # fmt: skip
    _check_devices("dequantize", packed, absmax, scale_absmax, scale_offset, code, scale_code)
    _check_range("rows", row_begin, row_end, N)
    _check_range("cols", col_begin, col_end, K)
    return packed.new_empty((row_end - row_begin, col_end - col_begin), dtype=dtype)


@torch.library.register_fake("nf4kernels::dequantize_out", lib=LIBRARY)
def _(packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
      row_begin, row_end, col_begin, col_end, out):  # fmt: skip
    _check_devices("dequantize", packed, absmax, scale_absmax, scale_offset, code, scale_code, out)
    _check_range("rows", row_begin, row_end, N)
    _check_range("cols", col_begin, col_end, K)
    torch._check(
        out.shape == (row_end - row_begin, col_end - col_begin),
        lambda: (
            f"nf4kernels.dequantize: out must have shape {[row_end - row_begin, col_end - col_begin]},"
            f" got {list(out.shape)}"
        ),
    )


@torch.library.register_fake("nf4kernels::linear", lib=LIBRARY)
def _(x, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size, bias,
      lora_P=None, lora_B=None, scaling=1.0):  # fmt: skip
    _check_devices(
        "linear", x, packed, absmax, scale_absmax, scale_offset, code, scale_code, bias, lora_P, lora_B
    )  # fmt: skip
    torch._check(
        x.dim() > 0 and x.shape[-1] == K,
        lambda: f"nf4kernels.linear: x must have K={K} columns, got shape {list(x.shape)}",
    )
    return x.new_empty((*x.shape[:-1], N))


@torch.library.register_fake("nf4kernels::linear_dgrad", lib=LIBRARY)
def _(dy, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
      lora_Q=None, lora_A=None, scaling=1.0):  # fmt: skip
    _check_devices(
        "linear_dgrad", dy, packed, absmax, scale_absmax, scale_offset, code, scale_code, lora_Q, lora_A
    )  # fmt: skip
    torch._check(
        dy.dim() > 0 and dy.shape[-1] == N,
        lambda: f"nf4kernels.linear_dgrad: dy must have N={N} columns, got shape {list(dy.shape)}",
    )
    return dy.new_empty((*dy.shape[:-1], K))


@torch.library.register_fake("nf4kernels::grouped_linear", lib=LIBRARY)
def _(x, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
      bias=None, lora_P=None, lora_B=None, scaling=1.0):  # fmt: skip
    _check_devices(
        "grouped_linear", x, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, bias,
        lora_P, lora_B,
    )  # fmt: skip
    torch._check(
        x.dim() == 2 and x.shape[1] == K,
        lambda: f"nf4kernels.grouped_linear: x must have shape [T, K={K}], got {list(x.shape)}",
    )
    return x.new_empty((x.shape[0], N))


@torch.library.register_fake("nf4kernels::grouped_linear_dgrad", lib=LIBRARY)
def _(dy, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
      lora_Q=None, lora_A=None, scaling=1.0):  # fmt: skip
    _check_devices(
        "grouped_linear_dgrad", dy, expert_offsets, packed, absmax, scale_absmax, scale_offset, code, scale_code,
        lora_Q, lora_A,
    )  # fmt: skip
    torch._check(
        dy.dim() == 2 and dy.shape[1] == N,
        lambda: f"nf4kernels.grouped_linear_dgrad: dy must have shape [T, N={N}], got {list(dy.shape)}",
    )
    return dy.new_empty((dy.shape[0], K))


@torch.library.register_fake("nf4kernels::lora_grad", lib=LIBRARY)
def _(small, wide, scaling, dtype, transposed=False):
    _check_devices("lora_grad", small, wide)
    torch._check(
        small.dim() > 0 and wide.dim() > 0,
        lambda: f"nf4kernels.lora_grad: small and wide must have columns, got {list(small.shape)}, {list(wide.shape)}",
    )
    shape = (small.shape[-1], wide.shape[-1])
    return wide.new_empty(shape[::-1] if transposed else shape, dtype=dtype)


@torch.library.register_fake("nf4kernels::grouped_lora_inner", lib=LIBRARY)
def _(x, expert_offsets, lora_factor, transposed=False):
    _check_devices("grouped_lora_inner", x, expert_offsets, lora_factor)
    torch._check(
        lora_factor.dim() == 3,
        lambda: f"nf4kernels.grouped_lora_inner: lora_factor must be 3-D, got shape {list(lora_factor.shape)}",
    )
    D, r = lora_factor.shape[1:] if transposed else lora_factor.shape[:0:-1]
    torch._check(
        x.dim() == 2 and x.shape[1] == D,
        lambda: f"nf4kernels.grouped_lora_inner: x must have shape [T, {D}], got {list(x.shape)}",
    )
    return x.new_empty((x.shape[0], r))


@torch.library.register_fake("nf4kernels::grouped_lora_grad", lib=LIBRARY)
def _(small, wide, expert_offsets, scaling, dtype, transposed=False):
    _check_devices("grouped_lora_grad", small, wide, expert_offsets)
    torch._check(
        small.dim() == 2 and wide.dim() == 2 and expert_offsets.dim() == 1,
        lambda: (
            "nf4kernels.grouped_lora_grad: small, wide and expert_offsets must have shapes [T, r], [T, C] and [E], got"
            f" {list(small.shape)}, {list(wide.shape)} and {list(expert_offsets.shape)}"
        ),
    )
    shape = (small.shape[1], wide.shape[1])
    return wide.new_empty((expert_offsets.shape[0], *(shape[::-1] if transposed else shape)), dtype=dtype)


@torch.library.register_fake("nf4kernels::sort_by_expert", lib=LIBRARY)
def _(x, top_k_index, num_experts):
    _check_devices("sort_by_expert", x, top_k_index)
    torch._check(
        x.dim() == 2 and top_k_index.dim() == 2 and top_k_index.shape[0] == x.shape[0] and num_experts >= 0,
        lambda: (
            "nf4kernels.sort_by_expert: x and top_k_index must have shapes [T, H] and [T, k], got"
            f" {list(x.shape)} and {list(top_k_index.shape)}"
        ),
    )
    rows = x.new_empty((top_k_index.shape[0] * top_k_index.shape[1], x.shape[1]))
    integers = {"dtype": torch.int32}
    return rows, x.new_empty((num_experts,), **integers), x.new_empty(top_k_index.shape, **integers)


def _check_positions(op: str, name: str, tensor: Tensor, positions: Tensor, is_rows: bool) -> None:
    torch._check(
        tensor.dim() == 2
        and positions.dim() == 2
        and tensor.shape[0] == (positions.shape[0] * positions.shape[1] if is_rows else positions.shape[0]),
        lambda: (
            f"nf4kernels.{op}: {name} and positions must have shapes [{'T * k' if is_rows else 'T'}, H] and [T, k], got"
            f" {list(tensor.shape)} and {list(positions.shape)}"
        ),
    )


@torch.library.register_fake("nf4kernels::combine_experts", lib=LIBRARY)
def _(rows, positions, weights, dtype):
    _check_devices("combine_experts", rows, positions, weights)
    _check_positions("combine_experts", "rows", rows, positions, True)
    return rows.new_empty((positions.shape[0], rows.shape[1]), dtype=dtype)


@torch.library.register_fake("nf4kernels::combine_experts_dgrad", lib=LIBRARY)
def _(dout, positions, weights, dtype):
    _check_devices("combine_experts_dgrad", dout, positions, weights)
    _check_positions("combine_experts_dgrad", "dout", dout, positions, False)
    return dout.new_empty((positions.shape[0] * positions.shape[1], dout.shape[1]), dtype=dtype)


@torch.library.register_fake("nf4kernels::combine_experts_wgrad", lib=LIBRARY)
def _(dout, rows, positions, dtype):
    _check_devices("combine_experts_wgrad", dout, rows, positions)
    _check_positions("combine_experts_wgrad", "dout", dout, positions, False)
    return dout.new_empty(positions.shape, dtype=dtype)
