"""Writes a pruned model in one of the profiles, and says beforehand where that cannot work."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...registry import Catalog, ModelError, SiteScores, SpecError, Strategy
from ..models.architectures import PRUNED, heads_of
from ..models.exported.manifest import GGUF
from ..models.loading import Loaded
from ..pruning.prune import find_sites, sites_within
from ..pruning.pruned import Pruned
from .configs import fitted
from .constraint import RoundedCounts
from .cut_model import layer_shapes, padded_tensors, shapes_of, sliced_tensors, uneven_heads
from .dynamic_state import save_state
from .hetero import add_code, hetero_config, homogeneous
from .layers import LayerShape
from .profiles import Profile
from .stock import stock_config
from .tensors import Tensors
from .weights_file import SHARD_SIZE, write_weights


def write_model(
    profile: Profile, pruned: Pruned, tokenizer: Any, folder: Path, shard_size: str = SHARD_SIZE, name: str = "pruned"
) -> tuple[str, ...]:
    """Write weights, configuration, generation settings and tokenizer of a model whose cut is made once.

    Of profile ``dynamic``: what the pruning has learnt instead. Returns what is worth knowing of it, in sentences.
    Raises :class:`SpecError` and :class:`ModelError`
    where the profile has no place for the cut.
    """
    if profile.name == "dynamic":
        save_state(pruned, folder)
        return ()
    tensors = padded_tensors(pruned) if profile.name == "padded" else sliced_tensors(pruned)
    if profile.name == "gguf":
        from .gguf.file import write_gguf

        layers = layer_shapes(pruned, tensors)
        notes = write_gguf(folder / GGUF, homogeneous(pruned.model.config), layers, tensors, tokenizer, name=name)
        tokenizer.save_pretrained(folder)
        return notes
    with _quiet():
        if profile.name == "padded":
            config = _padded_config(pruned, tensors)
        else:
            config = _config(profile, pruned.model.config, layer_shapes(pruned, tensors))
        tensors = fitted(config, tensors)
        config.dtype = pruned.model.dtype
        config._name_or_path = ""
        if config.model_type.startswith(PRUNED):
            add_code(folder, config)
        write_weights(folder, tensors, shard_size)
        config.save_pretrained(folder)
        if getattr(pruned.model, "generation_config", None) is not None:
            _save_generation(pruned.model.generation_config, folder)
        tokenizer.save_pretrained(folder)
    return ()


def _save_generation(config: Any, folder: Path) -> None:
    try:
        config.save_pretrained(folder)
    except ValueError as error:  # transformers saves no settings that contradict one another
        raise ModelError(
            f"the base model's generation settings cannot be saved ({' '.join(str(error).split())[:200]}); mend "
            "model.generation_config, or its generation_config.json"
        ) from error


def check_possible(profile: Profile, loaded: Loaded, strategy: Strategy, catalog: Catalog) -> None:
    """Raise, before hours of calibration, what can be told of a cut by its counts alone.

    Where an allocator needs scores, the counts are not known yet: then what is wrong is found before anything is
    written.
    """
    config = loaded.model.config
    if profile.name == "gguf":
        from .gguf.file import check_supported
        from .gguf.tokenizer import read_vocabulary

        check_supported(homogeneous(config))
        read_vocabulary(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings)
    _, sites = find_sites(loaded.model, catalog, strategy.attention_unit)
    inside, ratio = sites_within(strategy, sites, layers=1 + max(site.layer for site in sites))
    if isinstance(strategy.allocator, RoundedCounts):
        strategy.allocator.check_reachable(inside)
    if profile.name in ("padded", "dynamic") or strategy.allocator.needs_scores:
        return
    counts = {(site.layer, site.kind): site.units for site in sites}
    kept = strategy.allocator.allocate([SiteScores(site, None, None) for site in inside], ratio)
    counts |= {(site.layer, site.kind): count for site, count in zip(inside, kept, strict=True)}
    for site in sites:
        count, kv_heads = counts[site.layer, site.kind], heads_of(config, site.layer)[1]
        if site.query_heads_per_kv and count % kv_heads:
            raise uneven_heads(site.layer, kv_heads, str(count))
    parameters = dict(loaded.model.named_parameters())

    def has_bias(site: Any) -> bool:
        cut = counts[site.layer, site.kind] < site.units
        return f"{site.consumer}.bias" in parameters or (cut and strategy.compensates)

    if profile.name != "gguf":
        with _quiet():
            _config(profile, config, shapes_of(config, sites, counts, has_bias))


def _config(profile: Profile, dense: Any, layers: Sequence[LayerShape]) -> Any:
    return stock_config(dense, layers) if profile.name == "hf-uniform" else hetero_config(dense, layers)


def _padded_config(pruned: Pruned, tensors: Tensors) -> Any:
    """The original configuration, with the biases that compensation has added where its class has any."""
    config = copy.deepcopy(pruned.model.config)
    for cut in pruned.cuts:
        name = f"{cut.site.consumer}.bias"
        if cut.consumer.bias is not None or name not in tensors:
            continue
        key = f"{cut.site.kind}_bias"
        if not hasattr(config, key):
            raise SpecError(
                f"profile padded: compensation gives {cut.site.consumer} a bias, and {type(pruned.model).__name__} has "
                "no place for one; nearest: --profile hf-hetero, or --set prune.compensate=none"
            )
        setattr(config, key, True)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remark that a value is read which layers may have for themselves: here it may be."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
