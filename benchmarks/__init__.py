"""`python -m benchmarks`: every op beside its peers."""
