"""Text from the teacher itself: what a student is trained on where there is no data of the task."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .agreement import evaluating
from .heads import Head, HeadReader
from .teacher import device_of


@torch.no_grad()
def sample_text(
    model: nn.Module, prompts: Tensor, length: int, temperature: float = 1.0, *, greedy: int = 0, seed: int = 0,
    batch: int = 32, head: Head = "auto", progress: bool = False,
) -> Tensor:  # fmt: skip
    """int64 `[n, length]`: token ids that go on from `prompts`, drawn from the model.

    LLM-QAT (Liu et al., 2023, section 2.1) begins with a token drawn from the whole vocabulary, goes on with the
    likeliest ones for a few tokens, which keeps the text sensible, and draws the rest: `prompts =
    torch.randint(vocabulary, (n, 1))`, `greedy=3`. The model is run on the whole text for each token, with nothing
    kept between: what generates with a cache is faster for long texts.

    Args:
        model: takes token ids `[B, T]` and returns logits `[B, T, vocabulary]`, as such or in a mapping.
        prompts: int64 `[n, p]`, which the result begins with.
        temperature: logits are divided by it.
        greedy: tokens after the prompt that are the likeliest one instead of drawn.
        batch: texts that are made at a time.

    Raises:
        ValueError: prompts is not `[n, p]` with p from 1 to length, or temperature is not above 0.
    """
    who = "nf4kernels.recover.sample_text"
    if prompts.dim() != 2 or not 1 <= prompts.shape[1] <= length:
        raise ValueError(f"{who}: prompts must be [n, p] with p from 1 to length={length}, got {list(prompts.shape)}")
    if not temperature > 0:
        raise ValueError(f"{who}: temperature must be above 0, got {temperature}")
    device = device_of(model)
    draw = torch.Generator(device).manual_seed(seed)
    reader, made = HeadReader(model, head), []
    done = prompts.shape[1]
    parts = prompts.to(device).split(batch)
    with evaluating(model), tqdm(total=len(parts) * (length - done), desc="sampling", disable=not progress) as bar:
        for ids in parts:
            for place in range(done, length):
                logits = reader.last_logits(ids).float()
                if place - done < greedy:
                    following = logits.argmax(-1, keepdim=True)
                else:
                    following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)
                ids = torch.cat([ids, following], 1)
                bar.update()
            made.append(ids.cpu())
    return torch.cat(made)
