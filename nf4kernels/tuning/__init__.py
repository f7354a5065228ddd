"""Measures on the present card which kernels its products are to run by: `nf4kernels tune`."""
