"""Writes a pruned model in one of the profiles, and checks in advance whether that is possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...registry import Catalog, ModelError, Site, SiteScores, SpecError, Strategy
from ..models.architectures import PRUNED
from ..models.exported import classes
from ..models.exported.manifest import GGUF
from ..models.language import text_config
from ..models.loading import Loaded
from ..pruning.matching import Counts
from ..pruning.pruned import Pruned
from ..pruning.sites import find_sites, sites_within
from .configs import add_code, fitted, hetero_config, is_ruled, lacking, padded_config, shortened, uniform_config
from .constraint import RoundedCounts
from .cut_model import (
    LayerShape,
    check_shapes,
    constant_left,
    cut_shapes,
    layer_shapes,
    padded_tensors,
    shapes_of,
    sliced_tensors,
    uneven_heads,
    without_layers,
)
from .dynamic_state import save_state
from .expert_tensors import check_biases
from .family import Family
from .profiles import Profile
from .weights import SHARD_SIZE, Tensors, published, write_weights


def write_model(
    profile: Profile, pruned: Pruned, tokenizer: Any, folder: Path, shard_size: str = SHARD_SIZE, name: str = "pruned"
) -> tuple[str, ...]:
    """Write weights, configuration, generation settings and tokenizer of a model whose cut is made once.

    Profile ``dynamic`` writes the pruning's state instead. Returns notes for the user, one sentence each. Raises
    :class:`SpecError` and :class:`ModelError` if the profile cannot hold the cut.
    """
    if profile.name == "dynamic":
        save_state(pruned, folder)
        return ()
    family = Family.of(pruned.model.config, pruned.catalog, pruned.strategy.experts)
    if profile.name in ("hf-uniform", "hf-hetero"):
        family.check(profile.name)
    tensors = padded_tensors(pruned) if profile.name == "padded" else sliced_tensors(pruned)
    if profile.name == "gguf":
        from .gguf.file import write_gguf

        shapes = layer_shapes(pruned, tensors)
        config, layers = shortened(classes.homogeneous(pruned.model.config), shapes)
        tensors = without_layers(tensors, pruned.all_sites, shapes)
        notes = write_gguf(folder / GGUF, config, layers, tensors, tokenizer, name=name)
        tokenizer.save_pretrained(folder)
        return notes
    without = None
    with _quiet():
        if profile.name == "padded":
            config = padded_config(pruned, tensors, family)
        else:
            shapes = layer_shapes(pruned, tensors, family.sizes)
            config, layers = shortened(pruned.model.config, shapes)
            config, without = _config(profile, config, layers, family), lacking(layers)
            tensors = without_layers(tensors, pruned.all_sites, shapes)
        tensors = _fitted(config, pruned.model, tensors, family.nearest(profile.name))
        config.dtype = pruned.model.dtype
        config._name_or_path = ""
        if config.model_type.startswith(PRUNED):
            add_code(folder, config)
        as_published = None if config.model_type.startswith(PRUNED) else published(pruned.model)
        write_weights(folder, tensors, shard_size, as_published)
        config.save_pretrained(folder)
        _save_generation(getattr(pruned.model, "generation_config", None), folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return () if without is None else (f"{without}, and vLLM's layers have both: run this folder with transformers",)


def layers_left(pruned: Pruned, family: Family) -> list[int]:
    """The numbers of the layers that the smaller model has, in its order: something is left of each of them."""
    shapes = layer_shapes(pruned, {}, family.sizes)
    return [number for number, layer in enumerate(shapes) if not layer.gone]


def _fitted(config: Any, model: Any, tensors: Tensors, nearest: str) -> Tensors:
    # A file may say that the output layer is the embedding while the checkpoint has one of its own.
    config.tie_word_embeddings &= _output_name(model) not in tensors
    return fitted(config, tensors, nearest)


def _output_name(model: Any) -> str:
    """The name of the output layer's weight."""
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _save_generation(config: Any, folder: Path) -> None:
    if config is None:
        return
    try:
        config.save_pretrained(folder)
    except ValueError as error:  # transformers does not save settings that contradict one another
        raise ModelError(
            f"the base model's generation settings cannot be saved ({' '.join(str(error).split())[:200]}); correct "
            "model.generation_config, or its generation_config.json"
        ) from error


def check_possible(profile: Profile, model: Any, strategy: Strategy, catalog: Catalog) -> None:
    """Raise for a family, or a cut whose counts alone show it, that the profile cannot hold; nothing is computed.

    ``model`` needs no values. If an allocator looks at the model, the counts are not known yet; they are checked when
    the model has been pruned.
    """
    family = Family.of(model.config, catalog, strategy.experts)
    if profile.name == "gguf":
        _check_gguf(family)
    elif profile.name in ("hf-uniform", "hf-hetero"):
        family.check(profile.name)
    layers, sites = find_sites(model, catalog, strategy.attention_unit, strategy.experts)
    check_experts(profile, sites)
    inside, ratio = sites_within(strategy, sites, len(model.get_submodule(layers)))
    if strategy.compensates and (profile.name == "padded" or (profile.name == "hf-uniform" and not is_ruled(family))):
        family.check_biases(profile.name, [site.kind for site in inside])
        check_biases(model, inside, {(site.layer, site.kind): 0 for site in inside})
    if isinstance(strategy.allocator, RoundedCounts):
        strategy.allocator.check_reachable(inside)
    if strategy.allocator.looks_at_model:
        return
    kept = strategy.allocator.allocate([SiteScores(site) for site in inside], ratio or 0.0)
    counts = {(site.layer, site.kind): count for site, count in zip(inside, kept, strict=True)}
    check_counts(profile, model, strategy, sites, counts, family)


def check_experts(profile: Profile, sites: Sequence[Site]) -> None:
    """Raise :class:`SpecError` for whole experts in a format that keeps all of a model's shapes."""
    if profile.name == "padded" and any(site.router is not None for site in sites):
        raise SpecError(
            "profile padded: whole experts are gone, and a router with rows for all of them would choose them; "
            "nearest: --profile hf-uniform"
        )


def _check_gguf(family: Family) -> None:
    """Raise for a family that llama.cpp does not compute, naming the profiles that can write it."""
    from .gguf.file import CONVERT, check_supported

    smaller = [profile for profile in ("hf-hetero", "hf-uniform") if family.refusal(profile) is None]
    check_supported(family.config, CONVERT if len(smaller) == 2 else ", ".join([*smaller, "padded or dynamic"]))


def check_vocabulary(profile: Profile, loaded: Loaded) -> None:
    """Raise :class:`ModelError` for a tokenizer that the profile cannot hold."""
    if profile.name == "gguf":
        from .gguf.tokenizer import read_vocabulary

        read_vocabulary(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings)


def check_counts(
    profile: Profile, model: Any, strategy: Strategy, sites: Sequence[Site], counts: Counts, family: Family
) -> None:
    """Raise :class:`SpecError` or :class:`ModelError` for numbers of kept units that the profile cannot hold.

    ``sites`` are all of the model; those that are not among ``counts`` keep all of their units.
    """
    check_experts(profile, sites)
    if profile.name in ("padded", "dynamic"):
        return
    parameters = dict(model.named_parameters())
    counts = {(site.layer, site.kind): site.units for site in sites} | dict(counts)
    for site in sites:
        count = counts[site.layer, site.kind]
        if site.query_heads_per_kv:
            kv_heads = site.units // site.query_heads_per_kv
            if count % kv_heads:
                raise uneven_heads(site.layer, kv_heads, str(count))
        if not count and strategy.compensates:
            raise constant_left(site)
        if 0 < count < site.units:
            check_shapes(site)

    if strategy.compensates:
        check_biases(model, sites, counts)

    def has_bias(site: Site) -> bool:
        count = counts[site.layer, site.kind]
        own = f"{site.consumer}.bias" in parameters and count > 0
        return own or (count < site.units and strategy.compensates)

    shapes = shapes_of(text_config(model), sites, counts, has_bias, family.sizes)
    config, layers = shortened(model.config, shapes)
    if profile.name == "gguf":
        from .gguf.file import check_layers

        check_layers(layers)
        return
    with _quiet():
        tensors = without_layers(cut_shapes(model, sites, counts, has_bias), sites, shapes)
        _fitted(_config(profile, config, layers, family), model, tensors, family.nearest(profile.name))


def _config(profile: Profile, dense: Any, layers: Sequence[LayerShape], family: Family) -> Any:
    make = uniform_config if profile.name == "hf-uniform" else hetero_config
    return make(dense, layers, family)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warning about reading a global value that layers may override: that is intended here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
