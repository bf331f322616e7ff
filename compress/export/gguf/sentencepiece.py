"""BPE over characters (Llama 1 and 2, Mistral 7B), for which llama.cpp needs a score for each token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ....registry import ModelError

Pair = tuple[str, str]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def spaces(state: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a tokenizer (tokenizer.json) puts a space before text, and notes on steps that llama.cpp omits.

    Raises ModelError for normalizers and pre-tokenizers that llama.cpp does not have.
    """
    normalizer, splitter = state["normalizer"], state["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    collapsing = [step for step in steps if _collapses(step)]
    rest = [step for step in steps if not _collapses(step)]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    notes = []
    if collapsing:
        notes.append(
            "llama.cpp does not remove extra spaces as the tokenizer does: spaces at the ends of a text and repeated "
            "spaces give other tokens"
        )
    if splitter is None and rest in ([prepended, replaced], [replaced]):
        return prepended in rest, notes
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if not rest and splitter and metaspace.items() <= splitter.items():
        prepends = splitter["prepend_scheme"] != "never"
        if prepends:
            notes.append(
                "llama.cpp puts a space before a text that begins with one, and after every special token, where the "
                "tokenizer may not: such text gives other tokens"
            )
        return prepends, notes
    raise ModelError(
        f"profile gguf: the tokenizer's normalizer {normalizer} with pre_tokenizer {splitter} is none that llama.cpp "
        f"applies: it can turn spaces into {SPACE!r} and put one before the text. Use profile hf-hetero or hf-uniform, "
        "which keep the tokenizer as it is"
    )


def merge_scores(vocabulary: dict[str, int], merges: list[Pair]) -> tuple[dict[str, float], list[str]]:
    """A score for each token that merging creates, and notes on tokens that llama.cpp would create by other merges.

    A tokenizer merges the listed pairs in the order of the list. llama.cpp merges any pair that forms a token, the
    token with the highest score first. The merges within a token depend on that token's text alone, so each token has
    one last merge. The score is the negative rank of that merge: both then agree on all text if they agree on the last
    merge of every token.
    """
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise ModelError(
            f"profile gguf: the tokenizer falls back to bytes but has no token <0x{missing[0]:02X}>; llama.cpp needs "
            "all 256. Use profile hf-hetero or hf-uniform, which keep the tokenizer as it is"
        )
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    last = {token: _last_merge(token, lambda a, b: ranks.get((a, b))) for token in vocabulary}
    never = len(merges)
    score = {token: -float(ranks[pair] if pair else never) for token, pair in last.items()}
    others = [
        token
        for token, pair in last.items()
        if pair != _last_merge(token, lambda a, b: -score[a + b] if a + b in score else None)
    ]
    notes = []
    if others:
        notes.append(
            f"llama.cpp makes {len(others)} of {len(vocabulary)} tokens by other merges than the tokenizer, such as "
            f"{others[0]!r}: text with them may give other tokens"
        )
    return score, notes


def _last_merge(token: str, rank: Callable[[str, str], float | None]) -> Pair | None:
    """The pair that is merged last when a token's characters are merged; None if merging does not create the token."""
    parts = list(token)
    while len(parts) > 1:
        found = [(rank(*pair), place) for place, pair in enumerate(pairwise(parts))]
        ready = [choice for choice in found if choice[0] is not None]
        if not ready:
            return None
        if len(parts) == 2:
            return parts[0], parts[1]
        place = min(ready)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return None


def _collapses(step: dict[str, Any]) -> bool:
    """Whether a normalizer only removes spaces at the ends of a text, or repeated spaces."""
    if step["type"] == "Strip":
        return True
    return step["type"] == "Replace" and step["pattern"].get("Regex") in (r"\A +| +\z", " {2,}")
