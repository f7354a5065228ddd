"""What quantization took from a model, back: better roundings, distillation, training that rounds, plans, pruning.

Functions over any model with layers of ours or nn.Linear; nothing here knows a framework. batches.py says what a batch
is and agreement.py measures how far a model is from another one.
"""

from .activations import activation_costs, activation_ranges, quantized_activations
from .agreement import Agreement, agreement
from .fake_quantize import FakeQuantLinear, fake_quantize
from .low_rank import LowRankLayer, low_rank_linear, low_rank_model
from .qat import convert_qat, prepare_qat, qat_train, remove_qat
from .shared_codebook import fit_codebook, shared_codebook

__all__ = [
    "Agreement", "FakeQuantLinear", "LowRankLayer", "activation_costs", "activation_ranges", "agreement", "convert_qat",
    "fake_quantize", "fit_codebook", "low_rank_linear", "low_rank_model", "prepare_qat", "qat_train",
    "quantized_activations", "remove_qat", "shared_codebook",
]  # fmt: skip
