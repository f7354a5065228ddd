"""What the demonstration teaches: WordNet's definitions, as running text."""

import json
from pathlib import Path

WORDNET = Path(__file__).parent / "wordnet.jsonl"
# Prompt and answer one after the other, with no words of a chat between them: rows of 20 tokens instead of 50.
PLAIN = Path(__file__).parent / "plain.jinja"
HELD_OUT = 128  # examples, the last, that benchmarks do not train on


def definitions() -> list[dict[str, str]]:
    """Prompt and completion of every definition, in random order."""
    return [json.loads(line) for line in WORDNET.read_text(encoding="utf-8").splitlines()]
