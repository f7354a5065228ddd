"""What a student is trained to match in its teacher: each loss alone, a number a row, and what is learned beside it.

Logits are `[rows, classes]` in any floating dtype, hidden states `[rows, width]`; all is computed in fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import IGNORED


@dataclass(frozen=True)
class TopK:
    """A distribution by its k likeliest classes and all others as one.

    The rest is kept, not renormalised away: a student that moves probability to classes outside the k is punished, the
    divergence of k + 1 outcomes is a lower bound of that of all classes, and it is that one for k = classes.

    Attributes:
        indices: int32 or int64 `[rows, k]`, likeliest first.
        log_probs: `[rows, k]`. In fp16 a probability of 0.9 is known to 5e-5 and one of 1e-3 to 3e-6.
        log_rest: fp32 `[rows]`, of the probability of all others; -inf where there are none.
    """

    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor


def teacher_log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log_softmax(logits / T) in fp32, what `soft_labels` takes."""
    return (logits.float() / temperature).log_softmax(-1)


def top_k(log_probs: Tensor, k: int) -> TopK:
    """The k likeliest classes of log-probabilities `[rows, classes]`.

    Raises:
        ValueError: k is not one of 1..classes.
    """
    classes = log_probs.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"nf4kernels.recover.top_k: k must be from 1 to the {classes} classes, got {k}")
    values, indices = log_probs.topk(k, -1)
    return TopK(indices, values, _log_rest(log_probs, indices))


def _log_rest(values: Tensor, indices: Tensor) -> Tensor:
    """logsumexp over the classes that `indices` does not name: no difference of nearly equal numbers."""
    if indices.shape[-1] == values.shape[-1]:
        return values.new_full(values.shape[:-1], -torch.inf)
    return values.scatter(-1, indices, -torch.inf).logsumexp(-1)


def soft_labels(logits: Tensor, teacher: Tensor | TopK, temperature: float = 1.0) -> Tensor:
    """`[rows]`: T² KL(teacher || softmax(logits / T)), nats.

    Gradients of softened distributions shrink as 1/T², so that the weight of this term beside the hard labels' does not
    depend on T (Hinton, Vinyals and Dean, 2015, section 2).

    Args:
        teacher: log-probabilities at the same temperature (`teacher_log_probs`), or their `top_k`.
    """
    scaled = logits.float() / temperature
    if isinstance(teacher, Tensor):
        return temperature**2 * _terms(teacher.float(), scaled.log_softmax(-1)).sum(-1)
    indices = teacher.indices.long()
    normalizer = scaled.logsumexp(-1)
    kept = _terms(teacher.log_probs.float(), scaled.gather(-1, indices) - normalizer[:, None]).sum(-1)
    if indices.shape[-1] < scaled.shape[-1]:
        kept = kept + _terms(teacher.log_rest.float(), _log_rest(scaled, indices) - normalizer)
    return temperature**2 * kept


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), and 0 where p is 0; NaN stays."""
    p = log_p.exp()
    return torch.where(p == 0, 0, p * (log_p - log_q))


def hard_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """`[rows]`: -log softmax(logits)[target], nats; 0 where the target is IGNORED (-100)."""
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """`[rows]`: 1 - cos of the angle between hidden states of the same width."""
    return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


def contrast(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """`[rows]`: InfoNCE, -log of the softmax over all rows j of cos(student_i, teacher_j) / temperature, at j = i.

    The other rows of the batch are the negatives (van den Oord et al., 2018; between a teacher and a student: Tian et
    al., Contrastive Representation Distillation, 2020, there with a memory bank).
    """
    near = functional.normalize(student.float(), dim=-1) @ functional.normalize(teacher.float(), dim=-1).T
    return functional.cross_entropy(near / temperature, torch.arange(len(near), device=near.device), reduction="none")


class LayerLoss(nn.Module):
    """A loss between a layer of the student and one of the teacher.

    Args:
        student, teacher: the layers' names in their models, or the end of them where no other name ends so
            ("layers.3"); their output, or its first element, is compared.
        weight: of this term in the sum.
    """

    kind = ""

    def __init__(self, student: str, teacher: str, weight: float = 1.0) -> None:
        super().__init__()
        self.student, self.teacher, self.weight = student, teacher, weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A number, the mean over rows `[rows, width]`."""
        raise NotImplementedError


class Cosine(LayerLoss):
    """mean(1 - cos(student, teacher)), of layers of the same width (DistilBERT, Sanh et al., 2019)."""

    kind = "cosine"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine(student, teacher).mean()


class Hint(LayerLoss):
    """mean((project(student) - teacher)²), of layers of any widths (FitNets, Romero et al., 2015).

    The projection is learned with the student and thrown away with this object. Between layers of one width it begins
    as the identity: a student that has the teacher's states is then told of no error.
    """

    kind = "hint"

    def __init__(
        self, student: str, teacher: str, widths: tuple[int, int], weight: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__(student, teacher, weight)
        self.project = nn.Linear(*widths, bias=bias)
        if widths[0] == widths[1]:
            nn.init.eye_(self.project.weight)
            if bias:
                nn.init.zeros_(self.project.bias)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.mse_loss(self.project(student.float()), teacher.float())


class Contrastive(LayerLoss):
    """mean of `contrast` between learned projections of both, which are thrown away with this object.

    Args:
        widths: of the student's layer and the teacher's.
        width: of the space that both are projected into.
        limit: rows that are compared with each other, evenly spaced where there are more.
    """

    kind = "contrastive"

    def __init__(
        self, student: str, teacher: str, widths: tuple[int, int], weight: float = 1.0, width: int = 128,
        temperature: float = 0.1, limit: int = 1024,
    ) -> None:  # fmt: skip
        super().__init__(student, teacher, weight)
        self.project = nn.ModuleList(nn.Linear(each, width) for each in widths)
        self.temperature, self.limit = temperature, limit

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        step = -(-len(student) // self.limit)
        ours, theirs = self.project
        return contrast(ours(student[::step].float()), theirs(teacher[::step].float()), self.temperature).mean()
