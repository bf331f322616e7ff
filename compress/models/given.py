"""The model that a caller gives: taken out of a wrapper that computes the same, or refused by name with the remedy."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...registry import ModelError

INSIDE = ("module", "_fsdp_wrapped_module")
"""Names under which wrappers for several devices hold their one module."""


def model_in(given: Any) -> nn.Module:
    """The model to prune in what a caller gives: the module inside of one that ``torch.compile`` returned, else itself.

    Raises :class:`ModelError` for what is not a module, for adapters that are not merged (peft), for wrappers of
    several devices or processes (DataParallel, DistributedDataParallel, FSDP), and for what predicts no next token.
    """
    if not isinstance(given, nn.Module):
        raise ModelError(
            f"model: expected a loaded model, found {given!r:.80}; load it with transformers' "
            "AutoModelForCausalLM.from_pretrained first, or name it in a pipeline file"
        )
    kind = type(given).__name__
    if type(given).__module__.startswith("peft.") and hasattr(given, "peft_config"):
        merges = hasattr(given, "merge_and_unload")
        raise ModelError(
            f"model: a {kind} is a model with an adapter that is not merged, so that a cut would miss the adapter's "
            "part of the weights; "
            + (
                "merge it first, model = model.merge_and_unload(), and prune what that returns"
                if merges
                else "this kind (prompt tuning) cannot be merged: prune model.get_base_model(), without the adapter"
            )
        )
    inner = given._modules.get("_orig_mod")
    if inner is not None:  # torch.compile's OptimizedModule, which notices what is changed inside of it
        return model_in(inner)
    for name in INSIDE:
        inner = given._modules.get(name)
        if inner is not None and len(given._modules) == 1:
            raise ModelError(
                f"model: a {kind} is a wrapper; prune the model inside it, model.{name}, a {type(inner).__name__}, "
                "before it is wrapped"
            )
    check_predicts(getattr(given, "config", None))
    return given


def check_predicts(config: Any) -> None:
    """Raise :class:`ModelError` for the configuration of an encoder-decoder, or of an encoder alone."""
    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{kind} is an encoder-decoder: its decoder attends to an encoder's states, which the sites of a decoder "
            "do not cover, and it predicts nothing from a text alone; prune a decoder-only language model"
        )
    if is_encoder(config):
        raise ModelError(
            f"{kind} is an encoder: every token attends to later ones, so that it predicts no next token, by which "
            "pruning is decided and measured here; prune a decoder-only language model"
        )


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration fills in masked tokens, and is not set to be a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = getattr(config, "model_type", None)
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
