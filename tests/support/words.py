"""A tokenizer of whole words, made on the spot, and a tiny Llama in a Hugging Face directory that speaks them."""

from pathlib import Path

import torch

from . import tiny

WORDS = list("abcdefghijklmnop")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 2 are those of tiny.SIZES


def tokenizer():
    """Its words are WORDS, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tiny.transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def directory(path: Path, dtype=torch.float32, **changes) -> Path:
    """`path`, with a model of tiny.SIZES and `changes` and its tokenizer."""
    tiny.llama(dtype, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
