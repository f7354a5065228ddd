"""What quantization took from a model, back: better roundings, distillation, training that rounds, plans, pruning.

Functions over any model with layers of ours or nn.Linear; nothing here knows a framework. batches.py says what a batch
is and agreement.py measures how far a model is from another one.
"""

from .agreement import Agreement, agreement
from .distill import Distilled, DistillLoss, Training, distill
from .losses import Contrastive, Cosine, Hint, LayerLoss
from .sampling import sample_text
from .teacher import EarlierSelf, LiveTeacher, Teacher
from .teacher_cache import CachedTeacher, cache_teacher

__all__ = [
    "Agreement",
    "CachedTeacher",
    "Contrastive",
    "Cosine",
    "DistillLoss",
    "Distilled",
    "EarlierSelf",
    "Hint",
    "LayerLoss",
    "LiveTeacher",
    "Teacher",
    "Training",
    "agreement",
    "cache_teacher",
    "distill",
    "sample_text",
]
