"""Registers the models of profile hf-hetero with vLLM, as an entry point of the group ``vllm.general_plugins``.

Written for the interface of vLLM 0.33.0; it has not been run with vLLM's engine or on a GPU. It serves Llama, Mistral,
Qwen2 and Qwen3; OPT is refused with a remedy.
"""

from __future__ import annotations

import logging

from ...registry import ModelError, SpecError

MODELS = "prunekit.compress.export.vllm_models"
"""The module with the model classes; it imports vLLM, so only vLLM may import it."""

ARCHITECTURES = (
    "PrunekitLlamaForCausalLM",
    "PrunekitMistralForCausalLM",
    "PrunekitQwen2ForCausalLM",
    "PrunekitQwen3ForCausalLM",
    "PrunekitOPTForCausalLM",
)
"""Names of the classes in config.json and in vLLM."""


def register() -> None:
    """Register the configurations with transformers and the model classes with vLLM; may be called repeatedly."""
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise SpecError(
            f"vLLM cannot be imported ({error}); install it with pip install vllm, or load the export with transformers"
        ) from error
    from ..models.exported.classes import register as register_with_transformers

    try:
        register_with_transformers()
    except ModelError as error:
        # vLLM calls this in each of its processes for any model: an error here would stop it from serving all others.
        logging.getLogger(__name__).warning("prunekit's models are not registered with vLLM: %s", error)
        return
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            # A string: importing the class here could initialize CUDA before vLLM forks.
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
