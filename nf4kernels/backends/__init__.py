"""Who runs an op: the compiled libraries, Triton, or the reference."""
