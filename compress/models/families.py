"""The model families that prunekit serves: a row for each form of a decoder layer, with the model types that have it.

Llama, Mistral, Qwen2, Qwen3 and OPT are in :mod:`.architectures`. To serve another model type of a known form, add it
to the row. A new row says only what differs from Llama.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import create_model

from ...registry import Architecture, hookimpl
from .architectures import PRUNED, Llama, MlpNames, PreNormDecoder


def family(types: str, **changes: Any) -> type[PreNormDecoder]:
    """The architecture of some model types, separated by spaces. Its name is the first of them.

    ``changes`` are fields that differ from those of Llama; of names, a mapping changes those in it alone.
    """
    served = tuple(types.split())
    own = {"model_types": (*served, *(PRUNED + each for each in served)), **changes}
    fields: dict[str, Any] = {"name": (Literal[served[0]], served[0])}
    for key, value in own.items():
        if isinstance(value, dict):
            value = Llama.model_fields[key].default.model_copy(update=value)
        fields[key] = PreNormDecoder.model_fields[key].annotation, value
    return create_model(
        served[0],
        __base__=Llama,
        __module__=__name__,
        __doc__=f"{', '.join(served)}: {own.get('form') or 'the names of Llama'}.",
        **fields,
    )


def mlp(first: str, consumer: str, **changes: Any) -> dict[str, Any]:
    """A module ``mlp`` with one linear layer before the activation, and one after it."""
    return {"producers": (f"mlp.{first}",), "consumer": f"mlp.{consumer}", **changes}


def expert(path: str, **changes: Any) -> tuple[MlpNames]:
    """A shared expert at ``path``, next to routed ones: with Llama's linear layers, or with other ``changes``."""
    producers = (f"{path}.gate_proj", f"{path}.up_proj")
    names = {"entry": path, "producers": producers, "consumer": f"{path}.down_proj", "beside_experts": True, **changes}
    return (Llama().mlp.model_copy(update=names),)


INSIDE = "inside of a model that also reads images"
NORMS_BY_HEAD = {"by_head": ("q_norm.weight",), "by_kv_head": ("k_norm.weight",)}
"""Norms with weights of every head, where the model has them."""
PARALLEL = {"norm": "input_layernorm"}
UP_DOWN = mlp("up_proj", "down_proj")
GATE_UP = mlp("gate_up_proj", "down_proj", fused=True)
LATENT = {"latent_query": "q_b_proj", "key": None, "value": "kv_b_proj", "query_parts": 0}
"""Heads are cut in the layers that read the latent; the latent itself stays whole."""
INTERLEAVED = {"query": "query_key_value", "key": None, "value": None, "query_parts": 3, "output": "dense"}
GRANITE_EXPERT = expert(
    "shared_mlp", producers=("shared_mlp.input_linear",), consumer="shared_mlp.output_linear", fused=True
)
SHARED_EXPERTS: dict[str, Any] = {"other_mlps": expert("mlp.shared_experts"), "sizes": None}
"""The first layers of such models have MLPs of another width, and no field of the configuration holds both."""

FAMILIES: tuple[type[PreNormDecoder], ...] = (
    # Only the names of modules.
    family(
        "granite gemma ministral ministral3 olmo smollm3 ernie4_5 hunyuan_v1_dense hyperclovax cwm seed_oss internlm3 "
        "iquestcoder"
    ),
    family("helium", sizes={"head_size": None}),
    family("gemma2 gemma3_text vaultgemma", mlp={"norm": "pre_feedforward_layernorm"}, form="sandwich norms"),
    family("cohere cohere2", attention=NORMS_BY_HEAD, mlp=PARALLEL, form="parallel blocks"),
    family(
        "phi", attention={"output": "dense"}, mlp=PARALLEL | mlp("fc1", "fc2"), form="parallel blocks, two-layer MLP"
    ),
    family("nemotron arcee jais2", mlp=UP_DOWN, form="two-layer MLP"),
    family("starcoder2", mlp=mlp("c_fc", "c_proj"), form="two-layer MLP"),
    family(
        "apertus",
        attention={"norm": "attention_layernorm"},
        mlp=UP_DOWN | {"norm": "feedforward_layernorm"},
        form="two-layer MLP",
    ),
    family("exaone4", attention={"norm": None}, mlp={"norm": None}, form="post-norm"),
    family("qwen2_vl_text qwen2_5_vl_text", sizes={"head_size": None}, form=INSIDE),
    family("qwen3_vl_text", form=INSIDE),
    # Layers of other shapes.
    family("glm", mlp=GATE_UP, form="fused gate_up"),
    family("glm4", mlp=GATE_UP, form="fused gate_up, sandwich norms"),
    family("nanochat", mlp=mlp("fc1", "fc2"), form="two-layer MLP"),
    family(
        "stablelm",
        attention={
            "head_count": "num_heads",
            "kv_head_count": "num_key_value_heads",
            "by_head": ("q_layernorm.norms",),
            "by_kv_head": ("k_layernorm.norms",),
        },
        mlp={"parallel_norm": "input_layernorm"},
        sizes={"head_size": None},
        form="parallel blocks where the configuration says so",
    ),
    family(
        "persimmon",
        attention=INTERLEAVED | {"head_count": "num_heads"},
        mlp=mlp("dense_h_to_4h", "dense_4h_to_h"),
        sizes={"kv_heads": None, "head_size": None},
        form="query, key and value interleaved in one layer, two-layer MLP",
    ),
    family("youtu minicpm3", attention=LATENT, form="MLA"),
    # Mixtures of experts; the routed ones are in :mod:`.experts`.
    family("mixtral phimoe granitemoe", mlp=None, form="no dense MLP"),
    family("qwen3_moe mellum", form="dense MLP in some layers"),
    family(
        "qwen2_moe",
        other_mlps=expert("mlp.shared_expert"),
        sizes={"width": "shared_expert_intermediate_size"},
        form="shared expert",
    ),
    family("hunyuan_v1_moe", other_mlps=expert("mlp.shared_mlp"), form="shared expert"),
    family(
        "granitemoeshared",
        mlp=None,
        other_mlps=GRANITE_EXPERT,
        sizes={"width": "shared_intermediate_size"},
        form="shared expert, fused",
    ),
    family("dots1 glm4_moe exaone_moe ernie4_5_moe solar_open hy_v3", **SHARED_EXPERTS, form="shared expert"),
    family("deepseek_v3 deepseek_v2 glm4_moe_lite", attention=LATENT, **SHARED_EXPERTS, form="MLA, shared expert"),
)


@hookimpl
def architectures() -> list[type[Architecture]]:
    return list(FAMILIES)
