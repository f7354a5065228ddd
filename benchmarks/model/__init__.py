"""Benchmarks of a whole model."""
