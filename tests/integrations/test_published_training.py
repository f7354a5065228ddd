"""LoRA on models that are published in 4 bits: 100 steps beside the dense twin of the same numbers, and its tokens."""

import pytest
import torch
from support import directories, published, tiny
from support.peft_layers import peft

import nf4kernels as nf4
from nf4kernels.integrations.transformers import Nf4Config

CASES = [("gpt-oss", "gpt_oss"), ("Qwen3-MoE", "compressed_nvfp4"), ("Qwen3-MoE", "compressed_int4")]
STEPS, RATE = 100, 5e-3


def adapted(model, seed=0):
    """Adapters on attention and on both weights of every expert; drawn in the same order on both models."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    return peft.get_peft_model(model, config).train()


def train(model, tokens):
    """The loss of each step, over the same few sequences."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in range(STEPS):
        batch = tokens[step % len(tokens)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_100_steps_follow_the_dense_twin(tmp_path, family, layout):
    class_name, usual = directories.FAMILIES[family]
    twin = published.publish(tmp_path, tiny.make(class_name, dtype=torch.float32, **usual), layout)
    model = directories.load(tmp_path, dtype=torch.float32, quantization_config=Nf4Config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    model, twin = adapted(model), adapted(twin)
    ours, theirs = (dict(each.named_parameters()) for each in (model, twin))
    trained = [name for name, p in ours.items() if p.requires_grad]
    assert len(trained) == 2 * 2 * (4 + 2)  # layers, factors, attention and experts
    for name in trained:
        assert theirs[name].requires_grad
        theirs[name].data.copy_(ours[name])

    tokens = torch.randint(0, twin.config.vocab_size, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    losses, expected = train(model, tokens), train(twin, tokens)
    assert expected[-8:].mean() < 0.9 * expected[:8].mean()
    torch.testing.assert_close(losses[:20], expected[:20], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)  # routing turns rounding into other experts
    after = {name.removeprefix("base_model.model."): t for name, t in model.state_dict().items()}
    for name, tensor in before.items():
        found = [t for key, t in after.items() if key.replace(".base_layer", "") == name]
        assert len(found) == 1, name
        assert torch.equal(found[0], tensor), name

    for each in (model, twin):
        each.eval()
    prompt = tokens[0, :1, :4]
    assert torch.equal(model.generate(prompt, max_new_tokens=8), twin.generate(prompt, max_new_tokens=8))
    nf4_layers = [m for m in model.modules() if isinstance(m, nf4.QuantExperts)]
    assert len(nf4_layers) == 2
