"""What quantization took from a model, back: better roundings, distillation, training that rounds, plans, pruning.

Functions over any model with layers of ours or nn.Linear; nothing here knows a framework. batches.py says what a batch
is and agreement.py measures how far a model is from another one.
"""

from .activations import activation_costs, activation_ranges, quantized_activations
from .agreement import Agreement, agreement
from .roundings import Awq, CalibratedRounding, Gptq, LqLora, ScaleSearch

__all__ = ["Agreement", "Awq", "CalibratedRounding", "Gptq", "LqLora", "ScaleSearch", "agreement"]
from .candidates import Candidate, Dropped, blocks_of, default_candidates, layers_of_one_input
from .plan import Plan, apply_plan, make_plan
from .sensitivity import Option, Sensitivities, sensitivity

__all__ = [
    "Agreement", "Candidate", "Dropped", "Option", "Plan", "Sensitivities", "agreement", "apply_plan", "blocks_of",
    "default_candidates", "layers_of_one_input", "make_plan", "sensitivity",
]  # fmt: skip
from .pruning import (
    MaskedLora,
    Structure,
    apply_masks,
    find_masks,
    find_structure,
    held,
    merge_pruned,
    prune_in_steps,
    prune_model,
    prune_structure,
    pruning_schedule,
    share_of_zeros,
)

__all__ = [
    "Agreement",
    "MaskedLora",
    "Structure",
    "agreement",
    "apply_masks",
    "find_masks",
    "find_structure",
    "held",
    "merge_pruned",
    "prune_in_steps",
    "prune_model",
    "prune_structure",
    "pruning_schedule",
    "share_of_zeros",
]
from .fake_quantize import FakeQuantLinear, fake_quantize
from .low_rank import LowRankLayer, low_rank_linear, low_rank_model
from .qat import convert_qat, prepare_qat, qat_train, remove_qat
from .shared_codebook import fit_codebook, shared_codebook

__all__ = [
    "Agreement", "FakeQuantLinear", "LowRankLayer", "activation_costs", "activation_ranges", "agreement", "convert_qat",
    "fake_quantize", "fit_codebook", "low_rank_linear", "low_rank_model", "prepare_qat", "qat_train",
    "quantized_activations", "remove_qat", "shared_codebook",
]  # fmt: skip
