"""Compiles for one target, without its device, every kernel that a list of calls would launch, and prints JSON.

    python tests/support/triton_compile.py cuda:90
    python tests/support/triton_compile.py cuda:90 FOLDER    the products as they run by the table, as cubins, instead

The host functions run as they are, on CPU tensors; where they launch, Triton compiles for the target and nothing runs.
In a process of its own: a kernel is either compiled or interpreted, from when it is defined on.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from nf4kernels.backends.triton import OPS, choose  # noqa: E402
from nf4kernels.quantized_weight import INT8_LEVELS, LEVELS, expert_specs, tensor_specs  # noqa: E402

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}  # KB a program
CODE = torch.linspace(-1, 1, 16)


class Driver:
    """What Triton asks of a device before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def target_of(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if "gfx9" in arch else 32)


def resources(kernel, target: GPUTarget) -> dict:
    """Registers and bytes spilled of a compiled kernel."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        spilled = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
        return {"registers": number("vgpr_count"), "spilled": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def arithmetic(kernel, target: GPUTarget) -> dict:
    """Whether denormals are flushed; how many divisions of fp32 are IEEE's and not; how many contracted operations."""
    if target.backend == "cuda":
        text = kernel.asm["ptx"]
        inexact = text.count("div.full") + text.count("div.approx") + text.count("rcp.approx")
        exact = text.count("div.rn.f32") + text.count("rcp.rn.f32")
        return {"flushes": ".ftz" in text, "exact": exact, "inexact": inexact, "fma": text.count("fma.")}
    text = kernel.asm["amdgcn"]
    return {
        "flushes": "amdhsa_float_denorm_mode_32 3" not in text,
        "exact": text.count("v_div_fixup_f32"),
        "inexact": 0,  # not to be told: v_rcp_f32 also divides integers
        # Plus -0 it is a product alone: that is how RDNA multiplies by an fp16.
        "fma": len(re.findall(r"v_(?:pk_|dual_)?(?:fma|fmac|mad|mac)(?!.*neg\(0\))", text)),
    }


class Recorder:
    """Takes the place of every launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.kernels, self.call, self.launched = target, {}, "", []
        run = triton.runtime.jit.JITFunction.run

        def compile_only(function, *args, grid, warmup, **options):
            kernel = run(function, *args, grid=grid, warmup=True, **options)
            self.launched.append(id(kernel))
            self.kernels.setdefault(id(kernel), (function.fn.__name__, self.call, kernel))
            return kernel

        triton.runtime.jit.JITFunction.run = compile_only

    def report(self) -> list[dict]:
        rows = []
        for name, call, kernel in self.kernels.values():
            row = {"kernel": name, "call": call, "shared": kernel.metadata.shared}
            rows.append(row | arithmetic(kernel, self.target) | resources(kernel, self.target))
        return rows


def of_zeros(specs, *sizes) -> tuple:
    return *(None if dtype is None else torch.zeros(shape, dtype=dtype) for dtype, shape in specs.values()), *sizes


def weight(N, K, block_size=64, scales="double", levels=LEVELS) -> tuple:
    """As `QuantizedWeight.op_args` lists it."""
    return of_zeros(tensor_specs(N, K, block_size, scales, levels), N, K, block_size)


def weights(E, N, K, block_size=64, scales="double", levels=LEVELS) -> tuple:
    """As `QuantizedExperts.op_args` lists it."""
    return of_zeros(expert_specs(E, N, K, block_size, scales, levels), N, K, block_size)


def run_calls(recorder: Recorder, table: choose.Table) -> None:
    def call(name: str, op: str, *arguments) -> None:
        recorder.call = name
        OPS[op](*arguments)

    half, full = torch.bfloat16, torch.float32
    for block_size in (64, 4096):
        call(f"block {block_size}", "quantize", torch.zeros(64, 128, dtype=half), CODE, block_size)
    for is_e4m3 in (True, False):
        call(f"e4m3 {is_e4m3}", "quantize_absmax", torch.zeros(2048), torch.linspace(-1, 1, 256), is_e4m3)
    N, K = 256, 256
    for block_size, scales in ((64, "double"), (64, "float32"), (32, "float16"), (16, "codes")):
        for dtype in (full, half):
            q = weight(N, K, block_size, scales)
            call(f"{dtype} blocks of {block_size}, {scales}", "dequantize", *q, 0, N, 0, K, dtype)
        int8 = weight(N, K, 64, "double", INT8_LEVELS)
        call(f"{dtype} int8", "dequantize", *int8, 0, N, 0, K, half)
        call(f"{dtype} int8", "quantize", torch.zeros(64, 128, dtype=dtype), torch.zeros(INT8_LEVELS), 64)
    call("columns of odd K", "dequantize", *weight(33, 65), 1, 30, 3, 60, half)

    # Every bucket of the table, whole and split, with every term; then fp32, odd shapes and other layouts.
    for op in table.configs:
        for most, config in table.configs[op]:
            splits = 1 if most > 32 else 2  # a longer contraction has two
            n, k = (N, config.depth * splits) if op == "linear" else (config.depth * splits, K)
            product(call, op, f"bucket {most}", weight(n, k), min(most, 256), half, 16, config)
            for block_size, rank in ((32, 0), (16, 16)):
                name, q = f"blocks of {block_size}, bucket {most}", weight(N, K, block_size, "codes")
                product(call, op, name, q, min(most, 256), half, rank, config)
            product(
                call, op, f"int8, bucket {most}", weight(n, k, levels=INT8_LEVELS), min(most, 256), half, 16, config
            )
        product(call, op, "int8, blocks of 32", weight(N, K, 32, "float16", INT8_LEVELS), 3, half, 0)
        for dtype in (full, half):
            product(call, op, f"int8, odd {dtype}", weight(33, 65, levels=INT8_LEVELS), 3, dtype, 5)
        product(call, op, "int8, fp32", weight(N, K, levels=INT8_LEVELS), 40, full, 16)
        grouped_product(call, op, "int8", 2, weights(2, N, K, levels=INT8_LEVELS), 64, half, 16)
        product(call, op, "fp16", weight(N, K), 40, torch.float16, 0)
        product(call, op, "no double quantization", weight(N, K, 128, "float32"), 40, half, 0)
        product(call, op, "scales of 16 bits", weight(N, K, 32, "float16"), 3, half, 40)
        for dtype in (full, half):
            product(call, op, f"odd {dtype}", weight(33, 65), 3, dtype, 5)
        product(call, op, "fp32", weight(N, K), 40, full, 16)
        for most, _ in table.configs[op]:
            long = choose.LONGEST_DEPTH + 64
            n, k = (N, long) if op == "linear" else (long, K)
            grouped_product(call, op, f"two runs of {most}", 2, weights(2, n, k), min(most, 256), half)
            q = weights(2, N, K, 32, "codes")
            grouped_product(call, op, f"terms, blocks of 32, {most}", 2, q, min(most, 256), half, 16)
        for rows in (64, 256):
            grouped_product(call, op, f"one run of {rows}", 2, weights(2, N, K), rows, half)
        grouped_product(call, op, "fp16", 300, weights(300, N, K, 16, "float16"), 4, torch.float16, 40)
        grouped_product(call, op, "fp32", 2, weights(2, N, K, 128, "float32"), 4, full, 16)
    call("dequantize_gemm", "linear", torch.zeros(2048, K, dtype=half), *weight(N, K), None)
    offsets = torch.tensor([200, 600], dtype=torch.int32)
    for dtype in (full, half):
        small, wide = torch.zeros(600, 16, dtype=dtype), torch.zeros(600, 128, dtype=dtype)
        call(f"{dtype}", "lora_grad", small, wide, 1.0, half)
        call(f"{dtype}", "grouped_lora_grad", small, wide, offsets, 1.0, half)
        call(f"{dtype}", "grouped_lora_inner", wide, offsets, torch.zeros(2, 40, 128, dtype=dtype))
        call(f"{dtype} transposed", "grouped_lora_inner", wide, offsets, torch.zeros(2, 128, 16, dtype=dtype), True)
        positions, weights_of = torch.arange(20, dtype=torch.int32).view(10, 2), torch.zeros(10, 2)
        tokens, rows = torch.zeros(10, 128, dtype=dtype), torch.zeros(20, 128, dtype=dtype)
        for given in (weights_of, None):
            call(f"{dtype}", "combine_experts", rows, positions, given, dtype)
            call(f"{dtype}", "combine_experts_dgrad", tokens, positions, given, dtype)
        call(f"{dtype}", "combine_experts_wgrad", tokens, rows, positions, full)


def product(call, op, name, weight_args, M, dtype, rank, config=None):
    """One product through the fused kernel, with LoRA's term of this rank and a bias."""
    N, K = weight_args[6:8]
    depth, columns = (K, N) if op == "linear" else (N, K)
    small = torch.zeros(M, rank, dtype=dtype) if rank else None
    factor = torch.zeros((columns, rank) if op == "linear" else (rank, columns), dtype=dtype) if rank else None
    bias = (torch.zeros(N, dtype=dtype),) if op == "linear" else ()
    with choose.forcing("fused", config):
        call(name, op, torch.zeros(M, depth, dtype=dtype), *weight_args, *bias, small, factor, 2.0)


def grouped_product(call, op, name, E, weight_args, rows, dtype, rank=0):
    """The product of `rows` rows for each of the experts, with the table's configuration for them; of a rank: with
    LoRA's term and a bias."""
    N, K = weight_args[6:8]
    offsets = torch.arange(1, E + 1, dtype=torch.int32) * rows
    x = torch.zeros(rows * E, K if op == "linear" else N, dtype=dtype)
    small = torch.zeros(rows * E, rank, dtype=dtype) if rank else None
    factor = torch.zeros((E, N, rank) if op == "linear" else (E, rank, K), dtype=dtype) if rank else None
    bias = (torch.zeros(E, N, dtype=dtype) if rank else None,) if op == "linear" else ()
    call(f"{name} of {E}", f"grouped_{op}", x, offsets, *weight_args, *bias, small, factor, 2.0)


def run_calls_of_one(recorder: Recorder) -> None:
    """Sizes of 1, which Triton makes constants of their own: every kernel must still compile."""
    half, full = torch.bfloat16, torch.float32
    for N, K in ((1, 1), (1, 64), (64, 1), (1, 3000)):
        recorder.call = f"{N}x{K}"
        q = weight(N, K)
        OPS["quantize"](torch.zeros(N, K), CODE, 64)
        OPS["dequantize"](*q, 0, N, 0, K, half)
        OPS["dequantize"](*q, 0, 1, 0, 1, full)
        for dtype in (half, full):
            one = torch.zeros(1, 1, dtype=dtype)
            for op, depth, factor in (("linear", K, (N, 1)), ("linear_dgrad", N, (1, K))):
                x, bias = torch.zeros(1, depth, dtype=dtype), () if op == "linear_dgrad" else (None,)
                OPS[op](x, *q, *bias, one, torch.zeros(factor, dtype=dtype), 1.0)
            if K % 64 == 0:
                experts, offsets = weights(1, N, K), torch.ones(1, dtype=torch.int32)
                OPS["grouped_linear"](torch.zeros(1, K, dtype=dtype), offsets, *experts)
                OPS["grouped_linear_dgrad"](torch.zeros(1, N, dtype=dtype), offsets, *experts)
                OPS["grouped_lora_inner"](torch.zeros(1, K, dtype=dtype), offsets, torch.zeros(1, 1, K, dtype=dtype))
                OPS["grouped_lora_grad"](one, torch.zeros(1, K, dtype=dtype), offsets, 1.0, full, True)
            OPS["lora_grad"](one, torch.zeros(1, K, dtype=dtype), 1.0, full, True)
            row, position = torch.zeros(1, K, dtype=dtype), torch.zeros(1, 1, dtype=torch.int32)
            OPS["combine_experts"](row, position, torch.ones(1, 1), half)
            OPS["combine_experts_dgrad"](row, position, None, half)
            OPS["combine_experts_wgrad"](row, row, position, full)
    OPS["quantize_absmax"](torch.zeros(1), torch.linspace(-1, 1, 256), True)


def write_products(recorder: Recorder, table: choose.Table, folder: Path) -> None:
    """FOLDER/*.cubin and kernels.json: each product's kernel for each bucket of the table, 4096 x 4096 in one run."""
    N = K = 4096
    rows_of = {}

    def call(name: str, op: str, *arguments) -> None:
        recorder.call = name
        OPS[op](*arguments)

    for op in table.configs:
        for most, config in table.configs[op]:
            rows_of[f"{op}, M <= {most}"] = rows_of[f"grouped_{op}, M <= {most} of 2"] = config.BLOCK_M
            rows, bias = min(most, 256), (None,) if op == "linear" else ()
            with choose.forcing("fused"):
                call(f"{op}, M <= {most}", op, torch.zeros(rows, K, dtype=torch.bfloat16), *weight(N, K), *bias)
            grouped_product(call, op, f"grouped_{op}, M <= {most}", 2, weights(2, N, K), rows, torch.bfloat16)
    described = []
    for function, name, kernel in recorder.kernels.values():
        if name in rows_of and "linear" in function:  # not the sum of splits
            cubin = f"{len(described)}.cubin"
            (folder / cubin).write_bytes(kernel.asm["cubin"])
            described.append({"name": name.removesuffix(" of 2"), "rows": rows_of[name], "cubin": cubin})
    (folder / "kernels.json").write_text(json.dumps(described), encoding="utf-8")


def compilations_by_rows(recorder: Recorder) -> list[int]:
    """How many kernels serve all M of a bucket, of all buckets, and all numbers of rows of experts in a bucket."""
    counts = []
    for rows in (range(5, 17), (1, 2, 3, 4, 7, 16, 17, 31, 32, 64, 65, 128, 160, 321)):
        recorder.launched.clear()
        q = weight(64, 2048)
        for M in rows:
            OPS["linear"](torch.zeros(M, 2048, dtype=torch.bfloat16), *q, None)
        counts.append(len(set(recorder.launched)))
    recorder.launched.clear()
    experts, offsets = weights(8, 64, 2048), torch.zeros(8, dtype=torch.int32)
    for T in range(8 * 4 + 1, 8 * 16, 5):
        OPS["grouped_linear"](torch.zeros(T, 2048, dtype=torch.bfloat16), offsets, *experts)
    return [*counts, len(set(recorder.launched))]


def main(name: str, folder: str | None = None) -> None:
    target = target_of(name)
    triton.runtime.driver.set_active(Driver(target))
    architecture = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    choose.INTERPRETED = architecture
    table = choose.table_for(architecture)
    recorder = Recorder(target)
    if folder is not None:
        write_products(recorder, table, Path(folder))
        return
    run_calls(recorder, table)
    if architecture == "sm_80":
        run_calls_of_one(recorder)
    rows = recorder.report()
    counts = compilations_by_rows(recorder)
    print(json.dumps({"shared_limit": SHARED[target.arch] * 1024, "kernels": rows, "by_rows": counts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
