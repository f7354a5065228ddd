"""What torch's engines beyond one device need to know of our layers: styles for `parallelize_module`."""

from .tensor_parallel import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "RowwiseParallel"]
