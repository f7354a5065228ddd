"""4-bit checkpoints as others publish them: read into this package's weights, without decoding one."""
