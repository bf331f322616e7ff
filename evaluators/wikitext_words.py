"""lm-evaluation-harness' word-level convention for WikiText: pages, its detokenised text, and its rolling windows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..registry import DataError
from ..registry.tensors.windows import Window

TITLE = re.compile(r"\s*= (?!= ).*(?<! =) =\s*")
"""The first line of a page: a heading of the first level, " = Title = "."""


@dataclass(frozen=True)
class Pages:
    """Windows of all pages in text order, and the numbers that lm-eval divides the summed loss by."""

    windows: list[Window]
    pages: int
    words: int
    bytes: int
    prefix: int
    """Id of the first token of every page."""


def pages_of(documents: Sequence[str]) -> list[str]:
    """Documents split at the titles of pages; texts without titles do not change.

    Documents that are single lines, such as WikiText's rows, are first joined to one text, in which a blank row is the
    line " " of WikiText's files. Text before the first title is a page if it is not blank.
    """
    if all("\n" not in document.removesuffix("\n") for document in documents) and any(map(TITLE.fullmatch, documents)):
        documents = ["".join((row.removesuffix("\n") or " ") + "\n" for row in documents)]
    return [page for document in documents for page in _split(document) if page.strip()]


def _split(text: str) -> Iterator[str]:
    page: list[str] = []
    for line in text.split("\n"):
        if TITLE.fullmatch(line):
            yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def read_pages(documents: Sequence[str], tokenizer: Any, window: int, limit: int | None, label: str) -> Pages:
    """Cut at most ``limit`` pages of ``documents`` as lm-eval's ``wikitext`` task does.

    The text is tokenised with the special tokens that the tokenizer adds. A page's first window starts with the BOS
    token (EOS if there is no BOS). Windows score ``window`` tokens; the last one is filled up with context. Words and
    bytes are those of the text before detokenising. Raises :class:`DataError` if there is neither BOS nor EOS.
    """
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise DataError(
            "perplexity.convention: wikitext_words begins every page with the tokenizer's BOS or EOS token, and this "
            "tokenizer has neither; use convention: tokens"
        )
    found, words, size = [], 0, 0
    pages = pages_of(documents)[:limit]
    for page in pages:
        document = {"page": page}
        counts = process_results(document, (0.0,))
        words += counts["word_perplexity"][1]
        size += counts["byte_perplexity"][1]
        ids = tokenizer.encode(wikitext_detokenizer(document), verbose=False)
        for pair in get_rolling_token_windows(ids, prefix, window, context_len=1):
            context, scored = make_disjoint_window(pair)
            found.append(Window(torch.tensor(context + scored), len(scored), unseen=1))
    if not found:
        raise DataError(f"{label} gives no tokens to score; name a longer text")
    return Pages(found, len(pages), words, size, prefix)
