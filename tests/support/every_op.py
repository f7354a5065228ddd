"""Every op's results by the backend that the environment forces, Triton's if it interprets; saved where sys.argv says.

    NF4KERNELS_BACKEND=reference python tests/support/every_op.py results.pt

In a process of its own: a backend is settled by the first call.
"""

import os
import sys
from types import SimpleNamespace

import torch
from support import cases

import nf4kernels as nf4
from nf4kernels import codebook

LAYOUTS = (cases.DEFAULT, cases.Layout(64, "fp4", "dynamic8"), cases.Layout(32, "int4", None))
SHAPES = ((40, 128), (33, 65))


def main() -> None:
    ops, results = torch.ops.nf4kernels, {}
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support import triton_interpreter

        from nf4kernels.backends import triton

        triton_interpreter.correct()
        ops = SimpleNamespace(**triton.OPS)
    for layout in LAYOUTS:
        for N, K in SHAPES:
            packed, absmax = ops.quantize(cases.weight(N, K), layout.code, layout.block_size)
            scales, scale_code = (None, None), None
            if layout.scale_codebook is not None:
                scale_code = codebook.resolve_scale(layout.scale_codebook, "test")
                absmax, *scales = ops.quantize_absmax(absmax, scale_code, layout.scale_codebook == "e4m3")
            q = (packed, absmax, *scales, layout.code, scale_code, N, K, layout.block_size)
            own = results[str(layout), N, K] = {"quantize": q[:6]}
            for dtype in cases.DTYPES:
                x, dy, bias = (cases.activations(*shape, dtype) for shape in ((5, K), (5, N), (1, N)))
                P, B, A = (cases.activations(*shape, dtype, seed=1) for shape in ((5, 3), (N, 3), (3, K)))
                own["dequantize", dtype] = ops.dequantize(*q, 0, N, 0, K, dtype)
                own["linear", dtype] = ops.linear(x, *q, bias[0], P, B, 0.5)
                own["linear_dgrad", dtype] = ops.linear_dgrad(dy, *q, P, A, 0.5)
                own["lora_grad", dtype] = ops.lora_grad(x[:, :8].contiguous(), dy, 0.5, torch.float32)
                choices = torch.tensor([[1, 0], [2, 3], [0, 0], [3, 1], [2, 1]])  # 3 is none
                rows, _, positions = ops.sort_by_expert(x, choices, 3)
                weights = torch.linspace(0.1, 1, 10).view(5, 2)
                own["sort_by_expert", dtype] = rows
                own["combine_experts", dtype] = ops.combine_experts(rows, positions, weights, dtype)
                own["combine_experts_dgrad", dtype] = ops.combine_experts_dgrad(x, positions, weights, dtype)
                own["combine_experts_wgrad", dtype] = ops.combine_experts_wgrad(x, rows, positions, torch.float32)
                if K % 64 == 0 and K % layout.block_size == 0:
                    experts = [t if t is None or (t.dim() == 1 and t.numel() in (16, 256)) else t[None] for t in q[:6]]
                    ends = torch.tensor([4], dtype=torch.int32)
                    own["grouped_linear", dtype] = ops.grouped_linear(x, ends, *experts, *q[6:])
                    own["grouped_linear_dgrad", dtype] = ops.grouped_linear_dgrad(dy, ends, *experts, *q[6:])
                    own["grouped_lora_inner", dtype] = ops.grouped_lora_inner(x, ends, A[None])
                    own["grouped_lora_grad", dtype] = ops.grouped_lora_grad(P, dy, ends, 0.5, torch.float32)[0]
    torch.save(results, sys.argv[1])
    print(nf4.backend_info())


if __name__ == "__main__":
    main()
