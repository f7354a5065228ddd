"""Who runs an op: the compiled libraries, or the reference where none was built."""
