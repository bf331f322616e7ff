"""Whether checkpoint, configuration and tokenizer of a model fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...registry import ModelError
from ..output.reading import brief


def check_report(label: str, report: Mapping[str, Any]) -> None:
    """Raise :class:`ModelError` where checkpoint and configuration do not fit, by transformers' report on loading.

    The report leaves out what transformers knows to be harmless, such as stored rotary frequencies.
    """
    mismatched = {name: (tuple(found), tuple(expected)) for name, found, expected in report["mismatched_keys"]}
    if mismatched:
        first = min(mismatched)
        found, expected = mismatched[first]
        empty = any(0 in shape for shape, _ in mismatched.values())
        raise ModelError(
            f"model.name: {len(mismatched)} weights of the checkpoint {label} have other shapes than its config.json "
            f"says ({first}: found {found}, expected {expected}); "
            + (
                "empty ones are left by DeepSpeed ZeRO-3 if it saves without gathering: save again with "
                "stage3_gather_16bit_weights_on_model_save, or convert with zero_to_fp32.py"
                if empty
                else "correct config.json, or name the checkpoint that belongs to it"
            )
        )
    if report["missing_keys"]:
        raise ModelError(
            f"model.name: the checkpoint {label} lacks {len(report['missing_keys'])} of the model's weights "
            f"({_some(report['missing_keys'])}), which would stay random; name the complete checkpoint of a "
            "causal language model"
        )
    if report["unexpected_keys"]:
        raise ModelError(
            f"model.name: config.json of {label} has no place for {len(report['unexpected_keys'])} weights of the "
            f"checkpoint ({_some(report['unexpected_keys'])}), and without them this is another model; correct "
            "config.json (such as num_hidden_layers, attention_bias, mlp_bias), or name the checkpoint that belongs "
            "to it"
        )


def check_tokenizer(tokenizer: Any, rows: int, label: str) -> None:
    """Raise :class:`ModelError` for special tokens that are empty, and for a BOS token beyond the embedding's ``rows``.

    transformers would search for the id of an empty token for ever.
    """
    empty = [name for name, text in tokenizer.special_tokens_map.items() if text == ""]
    if empty:
        raise ModelError(
            f"model.name: tokenizer_config.json of {label} sets {', '.join(empty)} to an empty text; write the tokens "
            "that the model was trained with, or delete these keys"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and bos >= rows:
        raise ModelError(
            f"model.name: the tokenizer's BOS token {tokenizer.bos_token!r} has the id {bos}, but the model {label} "
            f"embeds {rows} ids only (0 to {rows - 1}); use the tokenizer that the model was trained with, or delete "
            "bos_token from tokenizer_config.json"
        )


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(brief(name) for name in found[:3]) + more
