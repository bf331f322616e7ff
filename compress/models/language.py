"""The language model inside of a model that also reads images, sound or video."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...registry import Architecture

AUTO_CLASSES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
}
"""Classes of transformers that load language models, alone or inside of others, and the hub's names of their tasks."""

READ_IMAGES = ("gemma3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm")
"""Model types that also read images, and of which prunekit's tests cut the language model."""


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that builds a model of this configuration.

    Where several can, it is the one whose class the configuration names. Without a name, a model with a language model
    inside is built whole: ``AutoModelForCausalLM`` may build the language model alone, without the vision tower.
    """
    import transformers

    known = [getattr(transformers, name) for name in AUTO_CLASSES if hasattr(transformers, name)]
    builds = [auto for auto in known if type(config) in auto._model_mapping]
    if len(builds) < 2:
        return next(iter(builds), known[0])
    whole = config.get_text_config() is not config

    def later(auto: Any) -> tuple[bool, bool]:
        named = auto._model_mapping[type(config)].__name__ in (config.architectures or ())
        return not named, whole and auto is known[0]

    return min(builds, key=later)


def auto_name(model_class: str | None) -> str:
    """The name of the Auto class that loads a class of transformers, such as "LlavaForConditionalGeneration".

    ``AutoModelForCausalLM`` where none of the others does.
    """
    from transformers.models.auto import modeling_auto

    names = {
        "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    }
    for auto, mapping in names.items():
        if model_class in getattr(modeling_auto, mapping, {}).values():
            return auto
    return next(iter(AUTO_CLASSES))


def text_config(model: Any) -> Any:
    """The configuration of the language model that a model is, or that is inside of it; None without any."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class WithTextConfig(nn.Module):
    """A model, its modules at the same paths, with the configuration of the language model inside of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._modules = model._modules
        self.config = text_config(model)


def inside(family: Architecture, model: nn.Module) -> Architecture | None:
    """``family`` for the language model inside of ``model``; None where its decoder layers are not there.

    It is the first module of the language model's type that has the family's layers: a model with an output layer, or a
    backbone, which is what the first name of the family's paths stands for.
    """
    kind = text_config(model).model_type
    for path, module in model.named_modules():
        if path and getattr(getattr(module, "config", None), "model_type", None) == kind:
            for layers in (family.layers, family.layers.partition(".")[2]):
                if has_layers(module, layers):
                    return family.model_copy(update={"layers": f"{path}.{layers}"})
    return None


def has_layers(model: nn.Module, path: str) -> bool:
    """Whether the model has a list of modules there."""
    try:
        return isinstance(model.get_submodule(path), nn.ModuleList)
    except AttributeError:
        return False
