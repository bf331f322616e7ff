"""Finds the built-in rule of llama.cpp that splits text into words as a byte-level tokenizer does."""

from __future__ import annotations

from typing import Any

from ....registry import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
DIGITS = r"\p{N}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)

NAMES = {
    # The splitting expressions, and whether a word that is a token is used without merges.
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
"""llama.cpp's ``tokenizer.ggml.pre`` for the splitting expressions of a tokenizer."""


def pre_tokenizer_name(state: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for the splitting of a byte-level tokenizer (tokenizer.json), and notes on differences.

    Raises ModelError if llama.cpp has no such rule: text would become other tokens than in training.
    """
    normalizer = (state["normalizer"] or {}).get("type")
    rules = _rules(state["pre_tokenizer"])
    name = None if rules is None else NAMES.get((rules, bool(state["model"].get("ignore_merges"))))
    if name is None or normalizer not in (None, "NFC"):
        raise ModelError(
            f"profile gguf: the tokenizer's pre_tokenizer {state['pre_tokenizer']} (normalizer {normalizer}, "
            f"ignore_merges {state['model'].get('ignore_merges')}) is none that is known to be built into llama.cpp: "
            f"{', '.join(NAMES.values())}. Use profile hf-hetero or hf-uniform, which keep the tokenizer as it is"
        )
    notes = []
    if normalizer == "NFC":
        notes.append(
            "llama.cpp does not apply the tokenizer's NFC normalization: text with decomposed accents gives other "
            "tokens"
        )
    if name == "tekken":
        notes.append(
            "llama.cpp distinguishes upper and lower case only in ASCII letters: other words of mixed case may give "
            "other tokens"
        )
    return name, notes


def _rules(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions that split text in turn, or None if one of them is not known."""
    pre_tokenizer = pre_tokenizer or {"type": "none"}
    *splits, last = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    rules = [_rule(split) for split in splits] + ([GPT2] if last["use_regex"] else [])
    known = tuple(rule for rule in rules if rule is not None)
    return known if len(known) == len(rules) else None


def _rule(split: dict[str, Any]) -> str | None:
    if split["type"] == "Digits" and split["individual_digits"]:
        return DIGITS
    # The two behaviors are equal for expressions that match all text.
    if split["type"] == "Split" and (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True)):
        return split["pattern"].get("Regex")
    return None
