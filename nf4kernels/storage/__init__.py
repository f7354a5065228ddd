"""All that touches a disk: checkpoints, adapters, conversion, and files that appear whole or not at all."""
