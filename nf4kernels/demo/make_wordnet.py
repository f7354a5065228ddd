"""Makes `wordnet.jsonl` again: `python -m nf4kernels.demo.make_wordnet DICT_DIR OUT.jsonl`.

DICT_DIR holds WordNet 3.0's `index.*` and `data.*` files, /usr/share/wordnet of the Debian package wordnet-base. The
same input gives the same bytes.
"""

import json
import random
import sys
from pathlib import Path

KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
COUNT = 4128
ANSWER_CHARACTERS = range(20, 141)
UNWANTED = ("offensive", "derogat", "disparag", "ethnic slur", "obscene", "sexual", "genital", "prostitut")


def definition(data: bytes, offset: int) -> str:
    """The gloss of the synset at a byte offset, without its example sentences."""
    gloss = data[offset : data.index(b"\n", offset)].decode().split(" | ", 1)[1]
    return gloss.split('; "')[0].strip().rstrip(";:")


def entries(directory: Path) -> list[tuple[str, str, str]]:
    """(word, kind, definition) of the commonest sense of every single, lower-case word that has counted uses."""
    found = []
    for suffix, kind in KINDS.items():
        data = (directory / f"data.{suffix}").read_bytes()
        for line in (directory / f"index.{suffix}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            word, _, synsets, pointers, *rest = line.split()
            counted_senses = int(rest[int(pointers) + 1])
            if word.isascii() and word.isalpha() and len(word) > 2 and counted_senses:
                found.append((word, kind, definition(data, int(rest[-int(synsets)]))))
    return found


def sample(found: list[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    """`count` entries in random order, no word and no definition twice, so that held-out ones are new in both."""
    random.Random(0).shuffle(found)
    words, glosses, chosen = set(), set(), []
    for word, kind, gloss in found:
        if word in words or gloss in glosses or len(gloss) not in ANSWER_CHARACTERS:
            continue
        if any(part in gloss for part in UNWANTED):
            continue
        words.add(word)
        glosses.add(gloss)
        chosen.append((word, kind, gloss))
    return chosen[:count]


def main(directory: str, out: str) -> None:
    lines = []
    for word, kind, gloss in sample(entries(Path(directory)), COUNT):
        lines.append(json.dumps({"prompt": f"The definition of the {kind} {word} is", "completion": f" {gloss}."}))
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
