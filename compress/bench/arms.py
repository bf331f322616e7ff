"""The models that are timed against each other: dense, sliced beforehand, and PP in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...registry import Catalog
from ..pruning.prune import prune
from ..pruning.pruned import Pruned
from ..pruning.sites import find_sites
from .presets import Preset
from .public_code import FullWeightPPsp, IndexedSlice
from .slicing import sharing_copy, sliced

CALIBRATION = 2
"""Calibration batches; the times do not depend on their content."""


@dataclass(frozen=True)
class Variant:
    """How an arm runs PP: the options of strategy and runtime that differ from the defaults."""

    title: str
    strategy: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)


PLAIN = {"column_major": False, "shared_buffers": False, "reuse_probe": False, "overlap": False}

COMPILING = {"compiled": ("compiled", "default"), "graphs": ("compiled with CUDA graphs", "reduce-overhead")}
"""How dense, ideal and PP are compiled: suffix of the arm's name -> its words, mode of ``torch.compile``."""

VARIANTS = {
    "pp": Variant("PP"),
    "pp-frozen": Variant("PP without history update", strategy={"merger": {"momentum": 1.0}}),
    "pp-reference": Variant("PP as in its public code", runtime=PLAIN),
    "pp-plain": Variant("PP without optimizations", runtime=PLAIN),
    "pp-ahead": Variant("PP deciding ahead", strategy={"selector": {"ahead": True}}),
    "pp-fused": Variant("PP gathering inside the product (Triton)", runtime={"fused_gather": True}),
    "pp-sequential": Variant("PP without overlap", runtime={"overlap": False}),
    **{f"pp-{how}": Variant(f"PP, {words}", runtime={"compile": mode}) for how, (words, mode) in COMPILING.items()},
}

COMPILED = {f"{arm}-{how}": arm for how in COMPILING for arm in ("dense", "ideal", "pp")}
"""Compiled arm -> the arm that it compiles."""

TITLES = {
    "dense": "dense",
    "ideal": "ideal (sliced beforehand)",
    **{name: variant.title for name, variant in VARIANTS.items()},
    **{f"{arm}-{how}": f"{arm}, {words}" for how, (words, _) in COMPILING.items() for arm in ("dense", "ideal")},
}

DEFAULT = ("dense", "ideal", "pp", "pp-frozen", "pp-reference")


@dataclass
class Arm:
    """One of the timed models."""

    name: str
    model: Any
    pruned: Pruned | None = None

    @property
    def decoder(self) -> nn.Module:
        """The timed part: all but the output embeddings."""
        return self.model.get_decoder()

    def close(self) -> None:
        """Remove the pruning."""
        if self.pruned is not None:
            self.pruned.remove()


@dataclass(frozen=True)
class Setting:
    """What is measured: shape, dtype, batch and ratio."""

    preset: str
    shape: Preset
    layers: int
    dtype: str
    batch: int
    length: int
    ratio: float
    skipped_layers: tuple[int, ...]
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Strategy options of all PP arms."""
    seed: int = 0

    @property
    def words(self) -> str:
        """One line for a table."""
        return f"{self.preset}, {self.dtype}, {self.ratio:.0%}, batch {self.batch} x {self.length:,}"


def build(setting: Setting, names: Sequence[str]) -> list[Arm]:
    """Models of one shape with the same random weights; those that no arm changes are in memory once.

    PP has the paper's settings: MLP widths are multiples of 64, and the higher ratio of the layers that are not skipped
    is rounded to two decimals. Raises :class:`SpecError` for a ratio that cannot be reached.
    """
    import transformers

    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    torch.manual_seed(setting.seed)
    config = setting.shape.config(setting.layers, setting.length)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    arms = {"dense": Arm("dense", model)}
    pruned: dict[str, Pruned] = {}
    catalog = Catalog.discover(block="")
    for name in (name for name in VARIANTS if name in names or name == "pp"):
        copied = sharing_copy(model)
        pruned[name] = _prune(name, copied, setting, catalog)
        arms[name] = Arm(name, copied, pruned[name])
    if any(COMPILED.get(name, name) == "ideal" for name in names):
        sites = find_sites(model, catalog, pruned["pp"].strategy.attention_unit)[1]
        arms["ideal"] = Arm("ideal", sliced(model, sites, pruned["pp"].counts))
    for name, of in COMPILED.items():
        if name in names and name not in arms:
            arms[name] = Arm(name, sharing_copy(arms[of].model))
            arms[name].decoder.compile(mode=COMPILING[name.rpartition("-")[2]][1])
    for name in [name for name in arms if name not in names]:
        arms.pop(name).close()
    return [arms[name] for name in names]


def _prune(name: str, model: Any, setting: Setting, catalog: Catalog) -> Pruned:
    variant = VARIANTS[name]
    options: dict[str, Any] = {
        "allocator": {"mlp_multiple": 64},
        "skip_layers": setting.skipped_layers,
        **setting.options,
    }
    for key, value in variant.strategy.items():  # in addition to what the user set of the same part
        given = options.get(key) or {}
        options[key] = {**({"name": given} if isinstance(given, str) else given), **value}
    if name == "pp-reference":
        options |= {"scorer": FullWeightPPsp(dtype=setting.dtype), "applier": IndexedSlice()}
    generator = torch.Generator().manual_seed(setting.seed)
    shape, vocabulary = (min(setting.batch, 4), setting.length), setting.shape.vocabulary
    text = [torch.randint(vocabulary, shape, generator=generator) for _ in range(CALIBRATION)]
    runtime = dict(variant.runtime)
    layers = model.config.num_hidden_layers
    cut = max(1, layers - len(setting.skipped_layers))
    ratio = round(setting.ratio * layers / cut, 2) * cut / layers  # of the layers that are cut, to two decimals
    return prune(model, "pp", ratio=ratio, calibration=text, catalog=catalog, runtime=runtime, **options)


def batch_of(setting: Setting, number: int) -> torch.Tensor:
    """The random token ids (B, T) of one round, the same for all arms."""
    generator = torch.Generator().manual_seed(setting.seed * 100_003 + number)
    ids = torch.randint(setting.shape.vocabulary, (setting.batch, setting.length), generator=generator)
    return ids.to(setting.device)


def close_all(arms: Sequence[Arm]) -> None:
    """Remove the pruning of all arms, even after an error."""
    for arm in arms:
        with suppress(Exception):
            arm.close()
