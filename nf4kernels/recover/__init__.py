"""What quantization took from a model, back: better roundings, distillation, training that rounds, plans, pruning.

Functions over any model with layers of ours or nn.Linear; nothing here knows a framework. batches.py says what a batch
is and agreement.py measures how far a model is from another one.
"""

from .activations import activation_costs, activation_ranges, quantized_activations
from .agreement import Agreement, agreement
from .candidates import Candidate, Dropped, blocks_of, default_candidates, layers_of_one_input
from .distill import Distilled, DistillLoss, Training, distill
from .fake_quantize import FakeQuantLinear, fake_quantize
from .losses import Contrastive, Cosine, Hint, LayerLoss
from .low_rank import LowRankLayer, low_rank_linear, low_rank_model
from .plan import Plan, apply_plan, make_plan
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
from .qat import convert_qat, prepare_qat, qat_train, remove_qat
from .roundings import Awq, CalibratedRounding, Gptq, LqLora, ScaleSearch
from .sampling import sample_text
from .sensitivity import Option, Sensitivities, sensitivity
from .shared_codebook import fit_codebook, shared_codebook
from .teacher import EarlierSelf, LiveTeacher, Teacher
from .teacher_cache import CachedTeacher, cache_teacher

__all__ = [
    "Agreement",
    "Awq",
    "CachedTeacher",
    "CalibratedRounding",
    "Candidate",
    "Contrastive",
    "Cosine",
    "DistillLoss",
    "Distilled",
    "Dropped",
    "EarlierSelf",
    "FakeQuantLinear",
    "Gptq",
    "Hint",
    "LayerLoss",
    "LiveTeacher",
    "LowRankLayer",
    "LqLora",
    "MaskedLora",
    "Option",
    "Plan",
    "ScaleSearch",
    "Sensitivities",
    "Structure",
    "Teacher",
    "Training",
    "activation_costs",
    "activation_ranges",
    "agreement",
    "apply_masks",
    "apply_plan",
    "blocks_of",
    "cache_teacher",
    "convert_qat",
    "default_candidates",
    "distill",
    "fake_quantize",
    "find_masks",
    "find_structure",
    "fit_codebook",
    "held",
    "layers_of_one_input",
    "low_rank_linear",
    "low_rank_model",
    "make_plan",
    "merge_pruned",
    "prepare_qat",
    "prune_in_steps",
    "prune_model",
    "prune_structure",
    "pruning_schedule",
    "qat_train",
    "quantized_activations",
    "remove_qat",
    "sample_text",
    "sensitivity",
    "share_of_zeros",
    "shared_codebook",
]
