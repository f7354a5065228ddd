"""Benchmarks of one op each."""
