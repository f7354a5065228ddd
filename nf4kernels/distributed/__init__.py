"""What torch's engines beyond one device need to know of our layers: styles for `parallelize_module`."""

from .expert_load import ExpertLoad
from .expert_parallel import ExpertParallel
from .model_plan import tensor_parallel_plan
from .tensor_parallel import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "ExpertLoad", "ExpertParallel", "RowwiseParallel", "tensor_parallel_plan"]
