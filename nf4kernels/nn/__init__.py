"""Modules that hold a 4-bit weight, and the adapters on them."""
