"""The tutorial's case: a small network learns digits from a larger one; which loss helps, over several seeds.

    python -m benchmarks.recover.digits

scikit-learn's 1797 digits of 8 x 8, offline. The larger network sees all training images and learns from labels; the
small one has few labelled images or many (--labelled), and the same images without labels where it learns from the
teacher. Each row is the same small network, the same steps and the same order of images; the seed draws all of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from nf4kernels.recover import Contrastive, Cosine, DistillLoss, Hint, Training, distill
from nf4kernels.recover.batches import IGNORED

TEST = 597
WIDE, NARROW, BATCH = 256, 16, 64
WIDTHS = (NARROW, WIDE)  # of the hidden layers
# The weights of cosine and regressor are those of PyTorch's tutorial on knowledge distillation.
LOSSES: dict[str, Callable[[], DistillLoss]] = {
    "student alone": lambda: DistillLoss(soft=0, hard=1),
    "soft labels, T = 4": lambda: DistillLoss(soft=1, temperature=4, hard=1),
    "soft labels alone, T = 4": lambda: DistillLoss(soft=1, temperature=4),
    "cosine, 0.25": lambda: DistillLoss(soft=0, hard=0.75, layers=[Cosine("pooled", "pooled", 0.25)]),
    "regressor, 0.5": lambda: DistillLoss(soft=0, hard=0.5, layers=[Hint("hidden", "hidden", WIDTHS, 0.5)]),
    "contrastive, 0.2": lambda: DistillLoss(soft=0, hard=1, layers=[Contrastive("hidden", "hidden", WIDTHS, 0.2)]),
    "soft labels, T = 4, and contrastive": lambda: DistillLoss(
        soft=1, temperature=4, hard=1, layers=[Contrastive("hidden", "hidden", WIDTHS, 0.2)]
    ),
}


class Net(nn.Module):
    """A convolution and a hidden layer; `pooled` has 16 numbers in both networks, `hidden` its own width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(16 * channels, width), nn.ReLU())
        self.pooled = nn.AdaptiveAvgPool1d(16)
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(self.features(x))
        self.pooled(hidden)
        return self.last(hidden)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(-1) == y).float().mean().item()


def batches(x: Tensor, y: Tensor, labelled: int) -> list[dict[str, Tensor]]:
    """Labels are there for the first `labelled` images alone."""
    known = torch.where(torch.arange(len(y)) < labelled, y, IGNORED)
    order = torch.randperm(len(y))
    return [{"x": x[part], "labels": known[part]} for part in order.split(BATCH)]


def one_seed(seed: int, labelled: int, steps: int, tell: Callable[[], object]) -> dict[str, float]:
    torch.manual_seed(seed)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y))
    x, y = x[order], y[order]
    train, test = (x[TEST:], y[TEST:]), (x[:TEST], y[:TEST])
    teacher = Net(32, WIDE)
    hard = DistillLoss(soft=0, hard=1)
    distill(teacher, teacher, batches(*train, len(train[1])), Training(steps, 3e-3, seed=seed), hard)
    found = {"teacher": accuracy(teacher, *test)}
    tell()
    for name, loss in LOSSES.items():
        torch.manual_seed(seed + 1)
        student = Net(2, NARROW)
        seen = (train[0][:labelled], train[1][:labelled]) if name == "student alone" else train
        distill(student, teacher, batches(*seen, labelled), Training(steps, 1e-2, seed=seed), loss())
        found[name] = accuracy(student, *test)
        tell()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--labelled", type=int, nargs="+", default=[100, 1200], help="images that have a label")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tqdm(total=len(args.labelled) * args.seeds * (1 + len(LOSSES)), desc="digits", unit="training") as bar:
        tables = {
            count: [one_seed(seed, count, args.steps, bar.update) for seed in range(args.seeds)]
            for count in args.labelled
        }  # fmt: skip
    sizes = {name: sum(each.numel() for each in Net(*shape).parameters()) for name, shape in
             (("teacher", (32, WIDE)), ("student", (2, NARROW)))}  # fmt: skip
    print(f"{sizes['teacher']} parameters teach {sizes['student']}; {args.seeds} seeds, {args.steps} steps of {BATCH}"
          f" images, {TEST} test images; {time.monotonic() - began:.0f} s\n")  # fmt: skip
    print("| test accuracy, % (mean, std of the sample) | " + " | ".join(f"{n} labelled" for n in tables) + " |")
    print("|---|" + "---|" * len(tables))
    for name in ("teacher", *LOSSES):
        cells = []
        for rows in tables.values():
            values = [100 * row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
