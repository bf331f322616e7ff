"""The profile hf-hetero: per-layer shapes in transformers' own per_layer_config, read by prunekit's model classes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...registry import ModelError
from ..models.architectures import PRUNED, head_size
from ..models.exported import classes
from ..models.exported.classes import CODE, family_of, register
from .configs import carried
from .layers import LayerShape


def homogeneous(config: Any) -> Any:
    """The configuration of the family's stock class, of one with a shape for every layer; any other as it is."""
    if not config.model_type.startswith(PRUNED):
        return config
    import transformers

    cls = type(transformers.AutoConfig.for_model(family_of(config)))
    size = {"head_dim": config.head_dim} if hasattr(config, "head_dim") else {}  # not a field of every class
    return cls(**{**carried(config, cls), **size})


def hetero_config(dense: Any, layers: Sequence[LayerShape]) -> Any:
    """A configuration with a shape for every layer; raises :class:`ModelError` for a family without a class."""
    family = family_of(dense)
    model = next((m for m in classes.model_classes() if m.config_class.model_type == PRUNED + family), None)
    if model is None:
        known = ", ".join(m.config_class.model_type.removeprefix(PRUNED) for m in classes.model_classes())
        raise ModelError(
            f"profile hf-hetero: there is no model class for {family!r}; there are {known}. Nearest: --profile padded "
            "keeps the original class, --profile dynamic needs none"
        )
    register()
    cls = model.config_class
    values = carried(dense, cls)
    # Biases that the family has anyway are no news.
    attention = values.get("enable_bias", False) or values.get("attention_bias", False)
    mlp = values.get("enable_bias", False) or values.get("mlp_bias", False)
    overrides = {}
    for index, layer in enumerate(layers):
        overrides[index] = {"num_attention_heads": layer.heads, cls.width: layer.width}
        if "num_key_value_heads" in values:
            overrides[index]["num_key_value_heads"] = layer.kv_heads
        if layer.attention_bias and not attention:
            overrides[index]["attention_output_bias"] = True
        if layer.mlp_bias and not mlp:
            overrides[index]["mlp_output_bias"] = True
    if "num_key_value_heads" in values:
        values["head_dim"] = head_size(dense)
    return cls(**values, per_layer_config=overrides)


def add_code(folder: Path, config: Any) -> None:
    """Put the model classes' code beside the weights, and say in ``config`` that it is there."""
    source = Path(classes.__file__).with_name(CODE)
    shutil.copyfile(source, folder / CODE)
    module, model = source.stem, config.architectures[0]
    config.auto_map = {
        "AutoConfig": f"{module}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{module}.{model}",
    }
