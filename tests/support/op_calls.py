"""One sound call of every op, calls with one wrong argument each, and the same call on meta tensors."""

import torch
from support import cases
from support.cases import DEFAULT

from nf4kernels.codebook import SCALE_CODEBOOKS

ops = torch.ops.nf4kernels
SHAPES = ((37, 100), (33, 65), (16, 64), (0, 64), (5, 0))


# Each token's two of 4 experts; 4 is none.
CHOICES = torch.tensor([[3, 1], [0, 4], [1, 1], [3, 0], [4, 4], [1, 3], [0, 1]])


def samples(op, N=37, K=100, layout=DEFAULT, dtype=torch.bfloat16):
    """The arguments of one sound call."""
    weight = cases.quantized(N, K, layout).op_args()
    if op == "quantize":
        return cases.weight(N, K, dtype), layout.code.clone(), layout.block_size
    if op == "quantize_absmax":
        name = layout.scale_codebook or "e4m3"
        return torch.rand(N, K), SCALE_CODEBOOKS[name].clone(), name == "e4m3"
    if op == "dequantize":
        return *weight, N // 3, N, 0, K - K // 4, dtype
    if op == "dequantize_out":
        return *weight, N // 3, N, 0, K - K // 4, torch.empty(N - N // 3, K - K // 4, dtype=dtype)
    if op == "linear":
        lora = torch.randn(2, 3, 4).to(dtype), torch.randn(N, 4).to(dtype), 0.75
        return torch.randn(2, 3, K).to(dtype), *weight, torch.randn(N).to(dtype), *lora
    if op == "lora_grad":
        return torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, N).to(dtype), 0.75, torch.float32, True
    if op.startswith("grouped_linear"):
        qweights = cases.quantized_experts(3, N, -(-K // 64) * 64, layout)
        inner, ends, K = torch.randn(7, 4).to(dtype), offsets(4, 4, 6), qweights.shape[2]
        if op == "grouped_linear_dgrad":
            return torch.randn(7, N).to(dtype), ends, *qweights.op_args(), inner, torch.randn(3, 4, K).to(dtype), 0.75
        bias, factor = torch.randn(3, N).to(dtype), torch.randn(3, N, 4).to(dtype)
        return torch.randn(7, K).to(dtype), ends, *qweights.op_args(), bias, inner, factor, 0.75
    if op == "grouped_lora_inner":
        return torch.randn(7, N).to(dtype), offsets(4, 4, 6), torch.randn(3, N, 4).to(dtype), True
    if op == "sort_by_expert":
        return torch.randn(7, K).to(dtype), CHOICES.clone(), 4
    if op.startswith("combine_experts"):
        tokens, rows = torch.randn(7, K).to(dtype), torch.randn(14, K).to(dtype)
        _, _, positions = ops.sort_by_expert(tokens, CHOICES, 4)
        if op.endswith("wgrad"):
            return tokens, rows, positions, torch.float32
        return tokens if op.endswith("dgrad") else rows, positions, torch.rand(7, 2), torch.bfloat16
    if op == "grouped_lora_grad":
        return torch.randn(7, 4).to(dtype), torch.randn(7, N).to(dtype), offsets(4, 4, 6), 0.75, torch.float32, True
    assert op == "linear_dgrad"
    return torch.randn(2, 3, N).to(dtype), *weight, torch.randn(2, 3, 4).to(dtype), torch.randn(4, K).to(dtype), 0.75


def fake_tensors(arguments):
    return [torch.empty_like(a, device="meta") if isinstance(a, torch.Tensor) else a for a in arguments]


def replaced(op, **changes):
    """(arguments with some replaced by name, message part) of a call."""
    schema = getattr(ops, op).default._schema
    arguments = dict(zip((a.name for a in schema.arguments), samples(op)))
    assert set(changes) <= set(arguments), f"{op} has no {set(changes) - set(arguments)}"
    return list((arguments | changes).values())


def offsets(*ends):
    return torch.tensor(ends, dtype=torch.int32)


# op, replaced arguments, what the message must name, and whether the fake must refuse as well, because its own result
# would have a wrong shape.
WRONG = [
    ("quantize", {"weight": torch.randn(100)}, "weight", True),
    ("quantize", {"weight": torch.randn(2, 3, 4)}, "weight", True),
    ("quantize", {"weight": torch.ones(4, 64, dtype=torch.int64)}, "weight", False),
    ("quantize", {"weight": torch.ones(4, 64, dtype=torch.float64)}, "weight", False),
    ("quantize", {"code": torch.zeros(15)}, "code", False),
    ("quantize", {"code": torch.zeros(16).double()}, "code", False),
    ("quantize", {"block_size": 48}, "block_size", True),
    ("quantize", {"block_size": 0}, "block_size", True),
    ("quantize", {"block_size": -64}, "block_size", True),
    ("quantize", {"block_size": 8192}, "block_size", True),
    ("quantize_absmax", {"absmax": torch.zeros(5).half()}, "absmax", False),
    ("quantize_absmax", {"scale_code": torch.zeros(255)}, "scale_code", False),
    ("dequantize", {"packed": torch.zeros(5, dtype=torch.uint8)}, "packed", False),
    ("dequantize", {"packed": torch.zeros(37, 50)}, "packed", False),
    ("dequantize", {"absmax": torch.zeros(58)}, "absmax", False),
    ("dequantize", {"scale_offset": None}, "scale_offset", False),
    ("dequantize", {"scale_absmax": torch.zeros(2)}, "scale_absmax", False),
    ("dequantize", {"N": -1}, "N", False),
    ("dequantize", {"row_begin": -1}, "row", True),
    ("dequantize", {"row_end": 38}, "row", True),
    ("dequantize", {"row_begin": 30, "row_end": 20}, "row", True),
    ("dequantize", {"col_end": 101}, "col", True),
    ("dequantize", {"dtype": torch.float64}, "dtype", False),
    ("dequantize", {"dtype": torch.int8}, "dtype", False),
    ("dequantize_out", {"out": torch.empty(24, 75)}, "out", True),
    ("dequantize_out", {"out": torch.empty(25, 75).double()}, "out", False),
    ("dequantize_out", {"out": torch.empty(75, 25).T}, "out", False),
    ("linear", {"x": torch.randn(3, 99)}, "x", True),
    ("linear", {"x": torch.randn(())}, "x", True),
    ("linear", {"x": torch.randn(3, 100).double()}, "x", False),
    ("linear", {"x": torch.ones(3, 100, dtype=torch.int32)}, "x", False),
    ("linear", {"bias": torch.randn(36).bfloat16()}, "bias", False),
    ("linear", {"bias": torch.randn(37).double()}, "bias", False),
    ("linear", {"scale_code": None}, "scale", False),
    ("linear", {"block_size": 100}, "block_size", False),
    ("linear", {"lora_P": None}, "lora_P and lora_B must be given together", False),
    ("linear", {"lora_B": None}, "lora_P and lora_B must be given together", False),
    ("linear", {"lora_P": torch.randn(2, 3, 5).bfloat16()}, "lora_P must have r=4 columns", False),
    ("linear", {"lora_P": torch.randn(2, 2, 4).bfloat16()}, "lora_P must have 24 elements", False),
    ("linear", {"lora_P": torch.randn(2, 3, 4)}, "lora_P must be BFloat16, got Float", False),
    ("linear", {"lora_P": torch.randn(3, 2, 4).bfloat16().transpose(0, 1)}, "lora_P must be contiguous", False),
    ("linear", {"lora_B": torch.randn(36, 4).bfloat16()}, "lora_B must have 37 rows, got shape [36, 4]", False),
    ("linear", {"lora_B": torch.randn(37 * 4).bfloat16()}, "lora_B must have 37 rows, got shape [148]", False),
    ("linear", {"lora_B": torch.randn(37, 4)}, "lora_B must be BFloat16, got Float", False),
    ("linear", {"lora_B": torch.randn(4, 37).bfloat16().T}, "lora_B must be contiguous", False),
    ("linear_dgrad", {"lora_Q": None}, "lora_Q and lora_A must be given together", False),
    ("linear_dgrad", {"lora_A": None}, "lora_Q and lora_A must be given together", False),
    ("linear_dgrad", {"lora_Q": torch.randn(2, 3, 5).bfloat16()}, "lora_Q must have r=4 columns", False),
    ("linear_dgrad", {"lora_A": torch.randn(4, 99).bfloat16()}, "lora_A must have 100 columns", False),
    ("linear_dgrad", {"lora_A": torch.randn(100, 4).bfloat16().T}, "lora_A must be contiguous", False),
    ("grouped_linear", {"x": torch.randn(7, 127)}, "x must have", True),
    ("grouped_linear", {"x": torch.randn(128)}, "x must", True),
    ("grouped_linear", {"x": torch.randn(2, 7, 128)}, "x must", True),
    ("grouped_linear", {"x": torch.randn(7, 128).double()}, "x", False),
    ("grouped_linear", {"expert_offsets": torch.tensor([4, 4, 6])}, "expert_offsets must be Int, got Long", False),
    ("grouped_linear", {"expert_offsets": torch.ones(2, dtype=torch.int32)}, "packed must have", False),
    (
        "grouped_linear",
        {"expert_offsets": torch.ones(3, 1, dtype=torch.int32)},
        "expert_offsets must have shape",
        False,
    ),
    ("grouped_linear", {"expert_offsets": torch.ones(6, dtype=torch.int32)[::2]}, "expert_offsets must be cont", False),
    ("grouped_linear", {"expert_offsets": offsets(4, 3, 6)}, "must not fall and not exceed T=7, got 3 after 4", False),
    (
        "grouped_linear",
        {"expert_offsets": offsets(-1, 3, 6)},
        "must not fall and not exceed T=7, got -1 after 0",
        False,
    ),
    ("grouped_linear", {"expert_offsets": offsets(4, 4, 8)}, "must not fall and not exceed T=7, got 8 after 4", False),
    ("grouped_linear", {"scale_offset": torch.zeros(1)}, "scale_offset must have 3 elements", False),
    ("grouped_linear", {"scale_absmax": torch.zeros(1)}, "scale_absmax must have 3 elements", False),
    ("grouped_linear", {"scale_code": None}, "scale", False),
    ("grouped_linear", {"block_size": 256, "absmax": torch.zeros(3, 37, dtype=torch.uint8)}, "absmax must have", False),
    ("grouped_linear", {"N": 74, "K": 64}, "x must have", True),
    ("grouped_linear_dgrad", {"dy": torch.randn(7, 128)}, "dy must", True),
    ("grouped_linear_dgrad", {"dy": torch.randn(37)}, "dy must", True),
    ("grouped_linear_dgrad", {"dy": torch.randn(7, 37).double()}, "dy", False),
    ("grouped_linear_dgrad", {"expert_offsets": offsets(4, 3, 6)}, "expert_offsets must not fall", False),
    (
        "grouped_linear",
        {"x": torch.randn(7, 32).bfloat16(), "N": 148, "K": 32},
        "K must be a multiple of 64 at block_size=64, got 32",
        False,
    ),
    ("grouped_linear", {"bias": torch.randn(37).bfloat16()}, "bias must have 111 elements", False),
    ("grouped_linear", {"bias": torch.randn(3, 37)}, "bias must be BFloat16, got Float", False),
    ("grouped_linear", {"lora_P": None}, "lora_P and lora_B must be given together", False),
    ("grouped_linear", {"lora_P": torch.randn(6, 4).bfloat16()}, "lora_P must have 28 elements", False),
    ("grouped_linear", {"lora_P": torch.randn(7, 5).bfloat16()}, "lora_P must have r=4 columns", False),
    ("grouped_linear", {"lora_B": torch.randn(37, 4).bfloat16()}, "lora_B must have 37 rows for each of 3", False),
    ("grouped_linear", {"lora_B": torch.randn(2, 37, 4).bfloat16()}, "lora_B must have 37 rows for each of 3", False),
    ("grouped_linear", {"lora_B": torch.randn(3, 4, 37).bfloat16().mT}, "lora_B must be contiguous", False),
    ("grouped_linear_dgrad", {"lora_A": None}, "lora_Q and lora_A must be given together", False),
    ("grouped_linear_dgrad", {"lora_Q": torch.randn(7, 4)}, "lora_Q must be BFloat16, got Float", False),
    ("grouped_linear_dgrad", {"lora_A": torch.randn(3, 4, 64).bfloat16()}, "lora_A must have 128 columns", False),
    ("grouped_lora_inner", {"x": torch.randn(7, 36).bfloat16()}, "x must have shape [T, ", True),
    ("grouped_lora_inner", {"x": torch.randn(2, 7, 37).bfloat16()}, "x must have shape [T, ", True),
    ("grouped_lora_inner", {"x": torch.randn(7, 37).double()}, "x must be float32, bfloat16 or float16", False),
    ("grouped_lora_inner", {"lora_factor": torch.randn(37, 4).bfloat16()}, "lora_factor must have a matrix", True),
    ("grouped_lora_inner", {"lora_factor": torch.randn(2, 37, 4).bfloat16()}, "for each of 3 experts", False),
    ("grouped_lora_inner", {"lora_factor": torch.randn(3, 37, 4)}, "lora_factor must be BFloat16, got Float", False),
    ("grouped_lora_inner", {"lora_factor": torch.randn(3, 4, 37).bfloat16().mT}, "must be contiguous", False),
    ("grouped_lora_inner", {"expert_offsets": torch.tensor([4, 4, 6])}, "expert_offsets must be Int, got", False),
    ("grouped_lora_inner", {"expert_offsets": offsets(4, 3, 6)}, "must not fall and not exceed T=7, got 3", False),
    ("grouped_lora_grad", {"small": torch.randn(6, 4).bfloat16()}, "small must have 28 elements", False),
    ("grouped_lora_grad", {"small": torch.randn(7, 1, 4).bfloat16()}, "small and wide must be 2-D", True),
    ("grouped_lora_grad", {"small": torch.randn(7, 4)}, "small must be BFloat16, got Float", False),
    ("grouped_lora_grad", {"wide": torch.randn(7, 37).double()}, "wide must be float32, bfloat16 or float16", False),
    ("grouped_lora_grad", {"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16", False),
    ("grouped_lora_grad", {"expert_offsets": offsets(4, 4, 8)}, "must not fall and not exceed T=7, got 8", False),
    ("sort_by_expert", {"x": torch.randn(6, 100)}, r"x and top_k_index must have shapes [T, H] and [T, k]", True),
    ("sort_by_expert", {"x": torch.randn(7, 1, 100)}, r"x and top_k_index must have shapes [T, H] and [T, k]", True),
    ("sort_by_expert", {"x": torch.randn(7, 100).double()}, "x must be float32, bfloat16 or float16", False),
    ("sort_by_expert", {"top_k_index": CHOICES.int()}, "top_k_index must be Long, got Int", False),
    ("sort_by_expert", {"top_k_index": CHOICES[:, 0]}, r"x and top_k_index must have shapes [T, H] and [T, k]", True),
    ("sort_by_expert", {"top_k_index": CHOICES + 1}, "top_k_index must be in 0..", False),
    ("sort_by_expert", {"top_k_index": CHOICES - 1}, "top_k_index must be in 0..", False),
    ("combine_experts", {"rows": torch.randn(13, 100)}, "rows and positions must have shapes [T * k, H] and", True),
    ("combine_experts", {"rows": torch.randn(14, 100).int()}, "rows must be float32, bfloat16 or float16", False),
    ("combine_experts", {"positions": CHOICES}, "positions must be Int, got Long", False),
    (
        "combine_experts",
        {"weights": torch.rand(7, 3)},
        "weights must have shape [7, 2] as positions, got [7, 3]",
        False,
    ),
    ("combine_experts", {"weights": CHOICES}, "weights must be float32, bfloat16 or float16", False),
    ("combine_experts", {"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16", False),
    ("combine_experts_dgrad", {"dout": torch.randn(14, 100)}, "dout and positions must have shapes [T, H] and", True),
    ("combine_experts_dgrad", {"positions": CHOICES}, "positions must be Int, got Long", False),
    ("combine_experts_dgrad", {"weights": torch.rand(2, 7)}, "weights must have shape [7, 2] as positions", False),
    ("combine_experts_wgrad", {"rows": torch.randn(14, 99)}, "rows must have H=100 columns as dout", False),
    ("combine_experts_wgrad", {"rows": torch.randn(7, 100)}, "rows and positions must have shapes [T * k, H]", False),
    ("combine_experts_wgrad", {"dtype": torch.int8}, "dtype must be float32, bfloat16 or float16", False),
    ("lora_grad", {"small": torch.randn(2, 2, 4).bfloat16()}, "small must have 24 elements", False),
    ("lora_grad", {"small": torch.randn(2, 3, 4)}, "small must be BFloat16, got Float", False),
    ("lora_grad", {"small": torch.randn(3, 2, 4).bfloat16().transpose(0, 1)}, "small must be contiguous", False),
    ("lora_grad", {"small": torch.randn(()).bfloat16()}, "small and wide must have columns", True),
    ("lora_grad", {"wide": torch.randn(2, 3, 37).double()}, "wide must be float32, bfloat16 or float16", False),
    ("lora_grad", {"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16", False),
    ("linear_dgrad", {"dy": torch.randn(3, 100)}, "dy", True),
    ("linear_dgrad", {"dy": torch.randn(3, 37).double()}, "dy", False),
    ("linear_dgrad", {"code": torch.zeros(17)}, "code", False),
]


def wrong_id(case):
    op, changes, *_ = case
    return op + "-" + "-".join(
        f"{k}={cases.shape_id(v.shape)}-{cases.dtype_id(v.dtype)}" if isinstance(v, torch.Tensor) else f"{k}={v}"
        for k, v in changes.items()
    )  # fmt: skip


def tensors(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)
