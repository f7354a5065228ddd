"""A step simulated for one of many ranks against a real one on two, and estimate's formula against both."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from support.paths import python_path

from nf4kernels.stages.errors import StageError
from nf4kernels.stages.estimate import Built, Options, read_config
from nf4kernels.stages.rank_plan import rank_plans, speed
from nf4kernels.stages.simulated_ranks import Step, simulate

SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **SIZES}
# SmolLM2-135M (Allal et al. 2025), of whose shapes a config.json tells everything that memory depends on.
SMOLLM2 = {
    **LLAMA, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    "model_type": "qwen3_moe", **SIZES, "num_hidden_layers": 3, "head_dim": 64, "moe_intermediate_size": 256,
    "num_experts": 7, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
CASES = {
    "llama": (LLAMA, Options(2, 256)),
    "kept gathered": (LLAMA, Options(1, 128, reshard_after_forward=False)),
    "no checkpoints": (LLAMA, Options(1, 256, checkpointing=False)),
    "mixed precision": (LLAMA, Options(2, 128, mixed_precision=True)),
    "SmolLM2-135M": (SMOLLM2, Options(1, 256)),
    "experts": (EXPERTS, Options(2, 128)),
}
CASES = {name: (config, replace(options, device="cpu")) for name, (config, options) in CASES.items()}


def real_steps(folder: Path) -> dict[str, dict]:
    """What `support/measured_ranks.py` finds on rank 0 of two, by the name of the case."""
    from support import measured_ranks

    arguments = []
    for config, options in CASES.values():
        step = {
            "batch": options.batch, "length": options.length, "optimizer": options.optimizer, "state_bytes": 0.0,
            "reshard_after_forward": options.reshard_after_forward, "mixed_precision": options.mixed_precision,
        }  # fmt: skip
        arguments.append(json.dumps([config, step, options.rank, options.checkpointing]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, str(Path(measured_ranks.__file__)), *arguments], cwd=folder, capture_output=True, encoding="utf-8",
        env=os.environ | python_path() | {"OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [line.partition(": ")[2] for line in ran.stdout.splitlines() if line.startswith("measured: ")]
    return {name: json.loads(line) for name, line in zip(CASES, found, strict=True)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_real_steps_on_two_ranks(tmp_path):
    """The peak of tensors is the simulated one's within 10 %, and what ranks exchange the same."""
    real = real_steps(tmp_path)
    for name, (config, options) in CASES.items():
        (plan,) = rank_plans(config, [2], [options.batch], [options.length], [options.rank], options)
        simulated, found = plan.simulated, real[name]
        print(
            f"{name}: {found['peak'] / 1e6:.1f} MB measured, {simulated.peak / 1e6:.1f} simulated,"
            f" {plan.estimate.train / 1e6:.1f} estimated; resident set {found['resident'] / 1e6:.1f} larger"
        )
        assert simulated.peak == pytest.approx(found["peak"], rel=0.1), name
        assert plan.estimate.train == pytest.approx(found["peak"], rel=0.1), name
        for key in ("gathered", "gathers", "reduced", "reductions"):
            assert getattr(simulated, key) == found[key], (name, key)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_estimate_is_the_simulated_peak(ranks):
    """Rows that no number of ranks divides, and heads of experts fewer than ranks, are filled up."""
    for config, options in (CASES["llama"], CASES["kept gathered"], CASES["experts"]):
        (plan,) = rank_plans(config, [ranks], [1], [64], [options.rank], options)
        assert plan.simulated.ranks == ranks
        assert plan.estimate.train == pytest.approx(plan.simulated.peak, rel=0.1)


def gathered_bytes(ranks, **options):
    built = Built(read_config(LLAMA), Options())
    built.prepare_training(Options())
    layers = built.peft.base_model.model.model.layers
    step = Step(1, 16, "adamw_torch_fused", 0.0, None, **options)
    in_layers = sum(parameter.nbytes for parameter in layers.parameters())
    whole = sum(parameter.nbytes for parameter in built.peft.parameters())
    return simulate(built.peft, ranks, step), in_layers, whole - in_layers, built.adapters


def test_bytes_exchanged():
    """Layers are gathered forward and backward, or once; what is in no layer once; gradients are reduced."""
    found, layers, root, adapters = gathered_bytes(2)
    assert (found.gathers, found.reductions) == (13, 6)
    assert found.gathered == 2 * layers + root
    assert found.reduced == adapters
    assert found.sent == (found.gathered + found.reduced) // 2
    kept, *_ = gathered_bytes(2, reshard_after_forward=False)
    assert (kept.gathers, kept.gathered) == (7, layers + root)
    padded, *_ = gathered_bytes(64)  # 16 rows of an adapter's factor become 64
    assert padded.gathered > 2 * layers + root
    alone, *_ = gathered_bytes(1)
    assert (alone.gathers, alone.reductions, alone.sent) == (0, 0, 0)


def test_the_model_stays_as_it_is():
    built = Built(read_config(LLAMA), Options())
    built.prepare_training(Options())
    before = {name: id(parameter) for name, parameter in built.peft.named_parameters()}
    simulate(built.peft, 4, Step(1, 16, "sgd", 0.0, torch.bfloat16))
    assert {name: id(parameter) for name, parameter in built.peft.named_parameters()} == before
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "sgd"])
def test_optimizer_states(optimizer):
    """A paged optimizer's are not on the device; 8-bit ones are there without a step of torch's."""
    (plan,) = rank_plans(LLAMA, [2], [1], [16], [16], Options(1, 16, optimizer=optimizer))
    held = plan.simulated.parts.get("Optstate", 0)
    assert plan.estimate.optimizer <= held <= plan.estimate.optimizer + 2**14
    assert plan.estimate.train == pytest.approx(plan.simulated.peak, rel=0.1)


def test_accumulated_gradients():
    (once,) = rank_plans(LLAMA, [2], [1], [16], [16], Options(1, 16))
    (twice,) = rank_plans(LLAMA, [2], [1], [16], [16], Options(1, 16, accumulation=2))
    assert twice.simulated.peak > once.simulated.peak
    assert twice.sent == 2 * once.sent


def test_links():
    (plan,) = rank_plans(LLAMA, [16], [1], [16], [16], Options(1, 16))
    assert plan.seconds("nvlink") is None  # 16 GPUs are in no machine
    assert plan.seconds("45") == plan.seconds("400g") == plan.sent / 45e9
    assert plan.sent == (plan.simulated.gathered + plan.simulated.reduced) * 15 // 16
    assert speed("450") == speed("nvlink")


@pytest.mark.parametrize(
    ("ranks", "options", "sentence"),
    [
        ([0], Options(), "--ranks must be 1 or more, got 0"),
        ([8, -1], Options(), "--ranks must be 1 or more, got -1"),
        ([2], Options(gpus=2), "--ranks and --gpus must not both be given"),
        (
            [2],
            Options(shard="fsdp2", offload_activations=True),
            "--ranks simulates what stays on the device, so --offload-activations must be left out",
        ),
        ([2], Options(shard="zero3"), "--ranks simulates FSDP2, so --shard must be fsdp2, got zero3"),
    ],
)
def test_refused(ranks, options, sentence):
    with pytest.raises(StageError, match=sentence):
        rank_plans(LLAMA, ranks, [1], [16], [16], options)


@pytest.mark.parametrize("link", ["carrier pigeon", "0", "-3", "nan", "inf"])
def test_unknown_link(link):
    with pytest.raises(StageError, match=f"--link must be one of nvlink, .* or a number of GB/s, got {link}"):
        speed(link)


def test_no_simulation_among_real_ranks():
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=2)
    try:
        plans = rank_plans(LLAMA, [2], [1], [16], [16], Options(1, 16))
        with pytest.raises(StageError, match="run it without torchrun"):
            next(plans)
    finally:
        torch.distributed.destroy_process_group()
