"""A Llama of two layers with random weights, for the checks of components that need a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sites import Producer, Rows, Site, SiteKind
from .parts import UNIT_SIZE, UNITS, draw, some_site

HIDDEN, LAYERS, VOCABULARY = 36, 2, 32


def toy_model() -> Any:
    """The model: its sites are like those of :func:`~.parts.some_site`, and none of its norms is 1."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=UNITS * UNIT_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=UNITS,
        num_key_value_heads=UNITS,
        head_dim=UNIT_SIZE,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng([]):
        model = transformers.LlamaForCausalLM(config).float().eval().requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = 0.3 * draw(*parameter.shape, seed=number) + (parameter.dim() == 1)
    return model


def toy_sites() -> list[Site]:
    """Its sites, attention before MLP."""
    return [_site(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp")]


def _site(layer: int, kind: SiteKind) -> Site:
    path = f"model.layers.{layer}"
    norm, block = ("input_layernorm", "self_attn") if kind == "attention" else ("post_attention_layernorm", "mlp")
    attention = kind == "attention"
    names = ("q_proj", "k_proj", "v_proj", "o_proj") if attention else ("gate_proj", "up_proj", "down_proj")
    like = some_site(kind, layer)
    producers = tuple(Producer(f"{path}.{block}.{name}", (Rows(0, like.unit_size),)) for name in names[:-1])
    return Site(
        layer,
        kind,
        f"{path}.{norm}",
        f"{path}.{block}",
        producers,
        f"{path}.{block}.{names[-1]}",
        like.units,
        like.unit_size,
        unit_parameters=len(names) * HIDDEN * like.unit_size,
        outputs=HIDDEN,
    )


def toy_batches() -> list[dict[str, Tensor]]:
    """Two batches of text, the second of them padded at the left."""
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:].clone().masked_fill_(mask == 0, 0), "attention_mask": mask}]


def toy_tokenizer() -> Any:
    """A tokenizer of as many words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def reorder(model: Any, site: Site, units: Tensor) -> None:
    """Put the units of a site in another order; the model computes the same."""
    for producer in site.producers:
        weight = model.get_submodule(producer.path).weight
        weight.data = weight.data[producer.rows(units)]
    weight = model.get_submodule(site.consumer).weight
    weight.data = weight.data[:, site.columns(units)]
