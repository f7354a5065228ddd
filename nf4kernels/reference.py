"""The truth: every op in plain PyTorch, with the op's name and arguments, on any device.

Short enough to check by eye against the format (docs/design.md, section 3). Compiled kernels equal `quantize`,
`quantize_absmax` and `dequantize` bit for bit. Where no compiled kernel is at hand these functions run instead, so they
take every shape.
"""

import functools
import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .quantized_weight import INT8_LEVELS, SUPERBLOCK, absmax_shape, packed_shape


def quantize(weight: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    flat = weight.reshape(-1).float()
    blocks = pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    finite = absmax.isfinite()
    absmax = torch.where(finite, absmax, torch.nan)  # a block with NaN or inf: NaN scale, every code that of 0
    scaled = torch.where(finite[:, None], blocks * (1 / absmax.clamp(min=2.0**-126))[:, None], 0)
    if code.numel() == INT8_LEVELS:
        integers = (scaled * 127).round().to(torch.int8)  # nearest even
        scale = absmax / torch.full_like(absmax, 127)
        return integers.view(torch.uint8).view(-1)[: flat.numel()].view(N, K), scale.view(
            absmax_shape(N, K, block_size)
        )

    levels, order = code.sort(stable=True)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = order[torch.bucketize(scaled, midpoints)].to(torch.uint8).view(-1)[: flat.numel() + flat.numel() % 2]
    packed = codes[0::2] << 4 | codes[1::2]
    return packed.view(packed_shape(N, K)), absmax.view(absmax_shape(N, K, block_size))


def quantize_absmax(absmax: Tensor, scale_code: Tensor, scale_is_e4m3: bool) -> tuple[Tensor, Tensor, Tensor]:
    flat = absmax.reshape(-1)
    groups = pad(flat, (0, -flat.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
    partial_sums = functools.reduce(operator.add, groups.double().unbind(1))  # left to right
    mean = functools.reduce(operator.add, partial_sums.tolist(), 0.0) / max(flat.numel(), 1)
    scale_offset = torch.tensor(mean, dtype=torch.float64, device=absmax.device).float()

    centred = pad(flat - scale_offset, (0, -flat.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
    scale_absmax = centred.abs().amax(1) if centred.numel() else centred.new_zeros(0)
    s = scale_absmax.clamp(min=2.0**-100)[:, None]
    if scale_is_e4m3:
        # A tensor over a tensor: torch computes `448 / s` as `s.reciprocal() * 448`, two roundings. `1 / s` has one.
        index = (centred * (torch.full_like(s, 448) / s)).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        index = torch.bucketize(centred * (1 / s), (scale_code[:-1] + scale_code[1:]) / 2).to(torch.uint8)
    return index.view(-1)[: flat.numel()].view(absmax.shape), scale_absmax, scale_offset


def dequantize(
    packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, row_begin: int, row_end: int, col_begin: int,
    col_end: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    scale = absmax.reshape(-1).float() if scale_code is None else scale_code[absmax.reshape(-1).long()]
    if scale_absmax is not None:
        superblock = torch.arange(scale.numel(), device=scale.device) // SUPERBLOCK
        scale = scale * scale_absmax[superblock] + scale_offset
    codes = packed.reshape(-1)
    if code.numel() != INT8_LEVELS:
        codes = torch.stack([codes >> 4, codes & 15], 1).view(-1)[: N * K]
    values = code[codes.long()] * scale.repeat_interleave(block_size)[: N * K]
    part = values.view(N, K)[row_begin:row_end, col_begin:col_end]
    return torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)


def dequantize_out(
    packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, row_begin: int, row_end: int, col_begin: int,
    col_end: int, out: Tensor,
) -> None:  # fmt: skip
    out.copy_(
        dequantize(packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                   row_begin, row_end, col_begin, col_end, out.dtype)
    )  # fmt: skip


def linear(
    x: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, bias: Tensor | None, lora_P: Tensor | None = None,
    lora_B: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    w = dequantize(packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                   0, N, 0, K, torch.float32)  # fmt: skip
    y = _matmul(x, w.T)
    if lora_P is not None:
        y += scaling * _matmul(lora_P, lora_B.float().T).reshape(y.shape)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_dgrad(
    dy: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None, N: int, K: int, block_size: int, lora_Q: Tensor | None = None,
    lora_A: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    w = dequantize(packed, absmax, scale_absmax, scale_offset, code, scale_code, N, K, block_size,
                   0, N, 0, K, torch.float32)  # fmt: skip
    dx = _matmul(dy, w)
    if lora_Q is not None:
        dx += scaling * _matmul(lora_Q, lora_A.float()).reshape(dx.shape)
    return dx.to(dy.dtype)


def grouped_linear(
    x: Tensor, expert_offsets: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None,
    scale_offset: Tensor | None, code: Tensor, scale_code: Tensor | None, N: int, K: int, block_size: int,
    bias: Tensor | None = None, lora_P: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    y = x.new_zeros(x.shape[0], N)
    for expert, rows in _experts_rows(expert_offsets, x.shape[0], "grouped_linear"):
        weight = _expert(expert, packed, absmax, scale_absmax, scale_offset, code, scale_code)
        terms = (t if t is None else t[i] for t, i in ((bias, expert), (lora_P, rows), (lora_B, expert)))
        y[rows] = linear(x[rows], *weight, N, K, block_size, *terms, scaling)
    return y


def grouped_linear_dgrad(
    dy: Tensor, expert_offsets: Tensor, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None,
    scale_offset: Tensor | None, code: Tensor, scale_code: Tensor | None, N: int, K: int, block_size: int,
    lora_Q: Tensor | None = None, lora_A: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    dx = dy.new_zeros(dy.shape[0], K)
    for expert, rows in _experts_rows(expert_offsets, dy.shape[0], "grouped_linear_dgrad"):
        weight = _expert(expert, packed, absmax, scale_absmax, scale_offset, code, scale_code)
        term = (t if t is None else t[i] for t, i in ((lora_Q, rows), (lora_A, expert)))
        dx[rows] = linear_dgrad(dy[rows], *weight, N, K, block_size, *term, scaling)
    return dx


def lora_grad(small: Tensor, wide: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    rows = small.reshape(small.shape[:-1].numel(), small.shape[-1])
    grad = scaling * _matmul(rows.T, wide.reshape(rows.shape[0], wide.shape[-1]).float())
    grad = grad.T if transposed else grad
    return torch.empty(grad.shape, dtype=dtype, device=grad.device).copy_(grad)


def grouped_lora_inner(x: Tensor, expert_offsets: Tensor, lora_factor: Tensor, transposed: bool = False) -> Tensor:
    factors = lora_factor if transposed else lora_factor.mT  # [E, D, r]
    P = x.new_zeros(x.shape[0], factors.shape[2])
    for expert, rows in _experts_rows(expert_offsets, x.shape[0], "grouped_lora_inner"):
        P[rows] = _matmul(x[rows], factors[expert].float()).to(x.dtype)
    return P


def grouped_lora_grad(
    small: Tensor, wide: Tensor, expert_offsets: Tensor, scaling: float, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    shape = (small.shape[1], wide.shape[1])
    grad = wide.new_zeros(expert_offsets.shape[0], *(shape[::-1] if transposed else shape), dtype=dtype)
    for expert, rows in _experts_rows(expert_offsets, wide.shape[0], "grouped_lora_grad"):
        grad[expert] = lora_grad(small[rows], wide[rows], scaling, dtype, transposed)
    return grad


def sort_by_expert(x: Tensor, top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_offsets, positions = expert_positions(top_k_index, num_experts)
    return combine_experts_dgrad(x, positions, None, x.dtype), expert_offsets, positions


def expert_positions(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(expert_offsets, positions) of sort_by_expert; nothing waits for a device."""
    experts_of = top_k_index.reshape(-1)
    is_wrong = (experts_of < 0) | (experts_of > num_experts)
    message = f"nf4kernels.sort_by_expert: top_k_index must be in 0..{num_experts}"
    if experts_of.device.type == "cpu" and is_wrong.any():
        first = int(is_wrong.nonzero()[0])
        raise RuntimeError(f"{message}, got {experts_of[first]} in row {first // top_k_index.shape[1]}")
    torch._assert_async(~is_wrong.any(), message)
    in_order, choices = experts_of.sort(stable=True)
    row = choices.argsort().int()
    positions = torch.where(experts_of < num_experts, row, ~row).view(top_k_index.shape)
    experts = torch.arange(num_experts, device=top_k_index.device)
    return torch.searchsorted(in_order, experts, right=True, out_int32=True), positions


def combine_experts(rows: Tensor, positions: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_positions(positions, "combine_experts")
    total = rows.new_zeros(positions.shape[0], rows.shape[1], dtype=torch.float32)
    for choice, position in enumerate(positions.unbind(1)):
        term = _taken(rows, position)
        if weights is not None:
            term = torch.where(position < 0, 0, weights[:, choice].float())[:, None] * term
        total = total + term
    return total.to(dtype)


def combine_experts_dgrad(dout: Tensor, positions: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_positions(positions, "combine_experts_dgrad")
    flat = positions.reshape(-1)
    choices = torch.where(flat < 0, ~flat, flat).argsort()  # of each row
    drows = dout[choices // max(positions.shape[1], 1)].float()
    if weights is not None:
        drows = weights.reshape(-1)[choices, None].float() * drows
    return torch.where(flat[choices, None] < 0, 0, drows).to(dtype)


def combine_experts_wgrad(dout: Tensor, rows: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    _check_positions(positions, "combine_experts_wgrad")
    taken = _taken(rows, positions.reshape(-1)).view(*positions.shape, rows.shape[1])
    return (dout.float()[:, None] * taken).sum(-1).to(dtype)


def _check_positions(positions: Tensor, op: str) -> None:
    """On the CPU, as the native kernels do; elsewhere it would wait for the device."""
    count, seen = positions.numel(), set()
    for position in positions.reshape(-1).tolist() if positions.device.type == "cpu" else ():
        row = ~position if position < 0 else position
        if row >= count or row in seen:
            expected = f"each row below {count}, or ~ of it, once"
            raise RuntimeError(f"nf4kernels.{op}: positions must have {expected}, got {position}")
        seen.add(row)


def _taken(rows: Tensor, position: Tensor) -> Tensor:
    """The rows at these positions in fp32, zeros where a position is that of no expert."""
    none = position < 0
    return torch.where(none[:, None], 0, rows[torch.where(none, ~position, position).long()].float())


def _expert(
    expert: int, packed: Tensor, absmax: Tensor, scale_absmax: Tensor | None, scale_offset: Tensor | None, code: Tensor,
    scale_code: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """One expert's tensors; scale_code is each expert's own where it alone scales."""
    if scale_absmax is not None and scale_offset is not None:
        scale_absmax, scale_offset = scale_absmax[expert], scale_offset[expert]
    elif scale_code is not None:
        scale_code = scale_code[expert]
    return packed[expert], absmax[expert], scale_absmax, scale_offset, code, scale_code


def _experts_rows(expert_offsets: Tensor, T: int, op: str) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each that has some. Reads the offsets: without them, every expert would take all rows."""
    begin = 0
    for expert, end in enumerate(expert_offsets.tolist()):
        if not begin <= end <= T:
            raise RuntimeError(
                f"nf4kernels.{op}: expert_offsets must not fall and not exceed T={T}, got {end} after {begin}"
            )
        if begin < end:
            yield expert, slice(begin, end)
        begin = end


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """In fp32 also under autocast, and in bits that do not depend on a's strides."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float().contiguous() @ b
