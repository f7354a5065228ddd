"""What a program does around a model: resuming a run, forks and threads, torch.export."""

import os
import threading

import pytest
import torch
from support import tiny
from torch import nn

import nf4kernels as nf4

CONFIG = nf4.LoraConfig(r=4, init="gaussian")
X = torch.linspace(-1, 1, 4 * 64).view(4, 64)


@pytest.mark.slow
def test_trainer_resumes_bit_for_bit(tmp_path):
    """Report's kind: a resumed run that differs from one that was not interrupted."""
    transformers = tiny.transformers()
    pytest.importorskip("accelerate")

    def trained(out, steps, resume=None):
        model = tiny.quantized_llama(lora=CONFIG)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        data = [{"input_ids": row, "labels": row} for row in torch.arange(80).view(16, 5)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / out), max_steps=steps, per_device_train_batch_size=2, save_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1, seed=1, lr_scheduler_type="constant",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    whole = trained("whole", 4)
    trained("part", 2)
    resumed = trained("part", 4, resume=str(tmp_path / "part" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_fork_computes_what_its_parent_does():
    """Report's kind: a data loader's worker, or a server's, forked after the first product."""
    layer = nf4.QuantLinear(64, 64, dtype=torch.float32)
    expected = layer(X)
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            os._exit(0 if torch.equal(layer(X), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_compute_what_one_does():
    """Report's kind: a server with a thread a request, and backward from several threads."""
    layer = nf4.QuantLinear(64, 64, lora=CONFIG, dtype=torch.float32)
    expected = layer(X).detach()
    wrong = []

    def work():
        for _ in range(20):
            x = X.clone().requires_grad_()
            y = layer(x)
            torch.autograd.grad(y.sum(), [x])
            if not torch.equal(y.detach(), expected):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("lora", [None, CONFIG], ids=["plain", "lora"])
def test_torch_export(lora):
    """Report's kind: custom ops that torch.export cannot trace, or buffers that it lifts wrongly."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    nf4.quantize_model(model, lora=lora, progress=False)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: rows},))
    with torch.no_grad():
        assert torch.equal(program.module()(X), model(X))
        assert torch.equal(program.module()(X[:3]), model(X[:3]))


def test_a_saved_export_loads(tmp_path):
    """And back from a file."""
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    nf4.quantize_model(model, progress=False)
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "a.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(X), model(X))


def test_rows_keep_their_bits_for_few_and_for_many():
    """README: the bits may differ with the number of rows. Within M <= 4 they do not, nor above it."""
    layer = nf4.QuantLinear(64, 64, dtype=torch.float32)
    x = torch.randn(16, 64)
    many, few = layer(x), layer(x[:4])
    for row in range(4):
        assert torch.equal(layer(x[row : row + 1])[0], few[row])
    assert torch.equal(layer(x[:9]), many[:9])
