"""Makes the bundled multiple-choice task: which of four continuations is the one that the text goes on with.

A question is the beginning of a paragraph of prose from a bundled evaluation text. Questions are put together in
fours by the length of their continuations, and each question of a four offers the continuations of all four: wrong
answers are as long and as likely in themselves as right ones, and without the context nobody does better than chance.

`python -m tools.bundled_model.continuations` writes the file again, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence

from prunekit.compress.bundled import TEXTS
from prunekit.evaluators.tasks import TRUE_CONTINUATION

SOURCES = ("reference-evaluation", "docstrings-evaluation")
PER_TEXT = 100  # questions from each text, a multiple of CHOICES
CHOICES = 4
SHORTEST, LONGEST = 16, 24  # words of a paragraph that are used, continuation included
CONTINUATION = 4  # words
PROSE = 0.8  # least share of a paragraph's words that are nothing but letters
SEED = 0


def is_word(text: str) -> bool:
    """Whether it is a plain word, punctuation around it aside."""
    return text.strip(".,;:!?()\"'\u2018\u2019\u201c\u201d").isalpha()


def paragraphs(text: str) -> list[list[str]]:
    """The words of every paragraph that is prose and long enough, cut to `LONGEST`."""
    found = (paragraph.split() for paragraph in text.split("\n\n"))
    return [
        words[:LONGEST] for words in found if len(words) >= SHORTEST and sum(map(is_word, words)) > PROSE * len(words)
    ]


def shuffled(items: Sequence, generator: random.Random) -> list:
    """In an order that only depends on `random()`, whose values no version of Python changes."""
    return [item for _, item in sorted(((generator.random(), i), item) for i, item in enumerate(items))]


def four(questions: list[tuple[str, str]], generator: random.Random) -> list[dict]:
    """Questions that share their continuations; each place holds the right answer once."""
    rows = []
    for place, (context, right) in zip(shuffled(range(CHOICES), generator), questions, strict=True):
        choices = shuffled([other for _, other in questions if other != right], generator)
        choices.insert(place, right)
        rows.append({"context": context, "choices": choices, "answer": place})
    return rows


def questions_of(text: str, source: str) -> list[dict]:
    """`PER_TEXT` questions from a text, in a shuffled order."""
    generator = random.Random(f"{SEED} {source}")
    pairs: dict[str, str] = {}
    for words in shuffled(paragraphs(text), generator):
        pairs.setdefault(" ".join(words[-CONTINUATION:]), " ".join(words[:-CONTINUATION]))
    chosen = [(context, right) for right, context in list(pairs.items())[:PER_TEXT]]
    if len(chosen) < PER_TEXT:
        raise ValueError(f"{source} has {len(chosen)} paragraphs that will do, fewer than {PER_TEXT}")
    chosen.sort(key=lambda pair: (len(pair[1]), pair[1]))
    rows = [row for start in range(0, PER_TEXT, CHOICES) for row in four(chosen[start : start + CHOICES], generator)]
    return [{"source": source, **row} for row in shuffled(rows, generator)]


def task_data() -> str:
    """The content of the task's file: one question a line."""
    rows = [row for source in SOURCES for row in questions_of(TEXTS[source].read_text(encoding="utf-8"), source)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write the task's file and print how much is in it."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = task_data()
    partial = TRUE_CONTINUATION.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, TRUE_CONTINUATION)
    print(f"{TRUE_CONTINUATION.name}: {text.count(chr(10))} questions, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
