"""What quantization took from a model, back: better roundings, distillation, training that rounds, plans, pruning.

Functions over any model with layers of ours or nn.Linear; nothing here knows a framework. batches.py says what a batch
is and agreement.py measures how far a model is from another one.
"""

from .agreement import Agreement, agreement
from .roundings import Awq, CalibratedRounding, Gptq, LqLora, ScaleSearch

__all__ = ["Agreement", "Awq", "CalibratedRounding", "Gptq", "LqLora", "ScaleSearch", "agreement"]
