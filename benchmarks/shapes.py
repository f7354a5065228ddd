"""The [N, K] weights that the benchmarks use, and where they come from."""

LINEAR = {
    "llama-7b attention": (4096, 4096),
    "llama-7b gate/up": (11008, 4096),
}
ROWS = (1, 16, 64, 512)
