"""The rows of the table, group by group."""

from collections.abc import Callable, Sequence
from functools import partial

import nf4kernels as nf4
from nf4kernels import recover
from nf4kernels.recover import DistillLoss
from nf4kernels.recover.activations import TABLE

from .makers import (
    RANK,
    STEPS,
    Options,
    cut,
    dense,
    distilled,
    layer_loss,
    of_low_rank,
    planned,
    remembered,
    rounded,
    rounded_while_trained,
    with_integer_inputs,
    with_levels,
    zeroed,
)
from .setting import Way

SEEDS = (0, 1, 2)
LONG_STEPS = 500
PLANS = (5.0, 4.5, 4.144, 4.03, 3.5)  # bits a weight: 4.144 are NF4's, and 4.02 the least without dropping


def plan_name(bits: float) -> str:
    return f"plan at {bits} bits"


GPTQ = partial(recover.Gptq, scales="search")  # one object: rows that begin at the same rounding share it
ROUNDINGS: Sequence[tuple[str, Options]] = (
    ("scales searched", {"make": lambda batches: recover.ScaleSearch()}),
    ("scales searched by inputs", {"make": recover.ScaleSearch}),
    ("scales searched by inputs, both texts", {"make": recover.ScaleSearch, "mixed": True}),
    ("levels of each layer (k-means)", {"make": partial(recover.ScaleSearch, scales="absmax", levels="kmeans")}),
    ("AWQ", {"make": recover.Awq}),
    ("AWQ + scales searched", {"make": lambda batches: recover.Awq(batches, recover.ScaleSearch(batches))}),
    ("GPTQ", {"make": recover.Gptq}),
    ("GPTQ + scales searched", {"make": GPTQ}),
    ("GPTQ + scales searched, both texts", {"make": GPTQ, "mixed": True}),
    ("GPTQ + scales searched, 128 windows", {"make": GPTQ, "windows": 128}),
    ("GPTQ + scales + levels", {"make": partial(recover.Gptq, scales="search", levels="kmeans")}),
    ("GPTQ + scales + sweeps", {"make": partial(recover.Gptq, scales="search", sweeps=3)}),
)
LQ_LORA = {"make": recover.LqLora, "lora": RANK}
LQ_LORA_GPTQ = {"make": lambda batches: recover.LqLora(batches, then=recover.Gptq(scales="search")), "lora": RANK}
STARTS: Sequence[tuple[str, Options]] = (
    ("LoftQ, r 16", {"lora": nf4.LoraConfig(r=16, init="loftq")}),
    ("PiSSA, r 16", {"lora": nf4.LoraConfig(r=16, init="pissa")}),
    ("LQ-LoRA by inputs, r 16", LQ_LORA),
    ("LQ-LoRA by inputs and GPTQ, r 16", LQ_LORA_GPTQ),
    ("LQ-LoRA by inputs and GPTQ, r 16, 128 windows", LQ_LORA_GPTQ | {"windows": 128}),
)
LOSSES: Sequence[tuple[str, Callable[[], DistillLoss]]] = (
    ("labels alone", lambda: DistillLoss(soft=0, hard=1)),
    ("KL", DistillLoss),
    ("KL, T 2", lambda: DistillLoss(temperature=2)),
    ("KL of the 64 likeliest", lambda: DistillLoss(k=64)),
    ("KL + 0.5 labels", lambda: DistillLoss(hard=0.5)),
    ("KL + cosine", partial(layer_loss, "cosine")),
    ("KL + hint", partial(layer_loss, "hint")),
    ("KL + contrast", partial(layer_loss, "contrast")),
)
WAYS = (
    Way("bf16", "start", dense),
    Way("NF4", "start", rounded),
    Way("NF4, blocks of 32", "start", partial(rounded, block_size=32)),
    Way("AF4", "start", partial(rounded, codebook="af4")),
    Way("int8", "start", partial(rounded, codebook="int8")),
    Way("levels of the model (k-means)", "rounding", with_levels),
    *(Way(name, "rounding", partial(remembered, **options)) for name, options in (*ROUNDINGS, *STARTS)),
    *(Way(f"LoRA, {name}", "distill", partial(distilled, loss=loss), SEEDS) for name, loss in LOSSES),
    Way(f"LoRA, KL, {LONG_STEPS} steps", "distill", partial(distilled, steps=LONG_STEPS), SEEDS),
    Way("LoRA, KL, text drawn from bf16", "distill", partial(distilled, drawn=True), SEEDS),
    *(
        Way(f"GPTQ + scales searched{where}, then LoRA, KL", "distill",
            partial(distilled, **options), SEEDS)
        for where, options in (("", {"make": GPTQ}), (", both texts", {"make": GPTQ, "mixed": True}))
    ),
    *(
        Way(f"LQ-LoRA by inputs{how}", "distill", partial(distilled, steps=steps, rate=rate, **options), SEEDS)
        for how, options, steps, rate in (
            (", then KL at 1e-3", LQ_LORA, STEPS, 1e-3), (", then KL", LQ_LORA, STEPS, 2e-4),
            (f", then KL, {LONG_STEPS} steps", LQ_LORA, LONG_STEPS, 2e-4),
            (" and GPTQ, then KL", LQ_LORA_GPTQ, STEPS, 2e-4),
            (" and GPTQ, 128 windows, then KL", LQ_LORA_GPTQ | {"windows": 128}, STEPS, 2e-4),
            (" and GPTQ, 128 windows, then KL, 250 steps", LQ_LORA_GPTQ | {"windows": 128}, 250, 2e-4),
        )
    ),
    Way("QAT, labels", "qat", partial(rounded_while_trained, rate=2e-5, against_teacher=False), SEEDS),
    Way("QAT, KL", "qat", partial(rounded_while_trained, rate=2e-5), SEEDS),
    Way("QAT of merged LoRA, KL", "qat", partial(rounded_while_trained, rate=2e-4, is_adapted=True), SEEDS),
    *(Way(f"NF4, inputs {name}", "inputs", partial(with_integer_inputs, **options)) for name, options in TABLE.items()),
    Way("NF4, inputs static, symmetric, 99.9 %", "inputs",
        partial(with_integer_inputs, mode="static", percentile=99.9)),
    *(Way(plan_name(bits), "plan", partial(planned, bits=bits)) for bits in PLANS),
    *(
        Way(f"{plan_name(bits)}, GPTQ + scales searched", "plan",
            partial(planned, bits=bits, make=GPTQ))
        for bits in (4.5, 4.144)
    ),
    Way("NF4, blocks of 4096", "plan", partial(rounded, block_size=4096)),
    Way("low rank by inputs, half of the bytes", "plan", partial(of_low_rank, share=0.5, is_rounded=False)),
    Way("low rank by inputs, half of the bytes, then NF4", "plan", partial(of_low_rank, share=0.5, is_rounded=True)),
    *(
        Way(f"{pattern} {100 * share:.0f} %, {method}{', recovered' if is_recovered else ''}", "prune",
            partial(zeroed, pattern=pattern, method=method, share=share, is_recovered=is_recovered),
            SEEDS if is_recovered else (0,))
        for pattern, method, share in (
            ("unstructured", "wanda", 0.25), ("unstructured", "wanda", 0.5), ("2:4", "wanda", 0.5)
        )
        for is_recovered in (False, True)
    ),
    *(
        Way(f"unstructured 50 %, {method}", "prune", partial(zeroed, pattern="unstructured", method=method, share=0.5))
        for method in ("magnitude", "gradient")
    ),
    *(
        Way(f"{pattern} 50 %, wanda, {how}", "prune",
            partial(zeroed, pattern=pattern, method="wanda", share=0.5, order=order))
        for pattern in ("unstructured", "2:4")
        for how, order in (("rounded first", "round, prune"), ("in bf16", "prune"))
    ),
    *(
        Way(f"{unit} {100 * share:.0f} %, {method}{', recovered' if is_recovered else ''}", "prune",
            partial(cut, unit=unit, method=method, share=share, is_recovered=is_recovered),
            SEEDS if is_recovered else (0,))
        for unit, method, share in (
            ("heads", "gradient", 1 / 3), ("channels", "gradient", 0.25), ("channels", "gradient", 0.5),
            ("layers", "influence", 0.25), ("layers", "influence", 0.5),
        )
        for is_recovered in (False, True)
    ),
)  # fmt: skip
