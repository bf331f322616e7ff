"""The models that are timed against each other: dense, sliced beforehand, and PP in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...registry import Catalog, SpecError
from ..pruning.prune import find_sites, prune
from ..pruning.pruned import Pruned
from .presets import VOCABULARY, Preset
from .reference_way import FullWeightPPsp, IndexedSlice
from .slicing import sliced, twin

CALIBRATION = 2
"""Batches that histories are filled from; times do not depend on what is in them."""


@dataclass(frozen=True)
class Way:
    """How an arm runs PP: options of the strategy and of the runtime that differ from the defaults."""

    title: str
    strategy: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)


PLAIN = {"column_major": False, "shared_buffers": False, "reuse_probe": False, "overlap": False}

COMPILING = {"compiled": ("compiled", "default"), "graphs": ("compiled with CUDA graphs", "reduce-overhead")}
"""How dense, ideal and PP are compiled: the ending of the arm's name, its words, torch's mode."""

WAYS = {
    "pp": Way("PP"),
    "pp-frozen": Way("PP without history update", strategy={"merger": {"momentum": 1.0}}),
    "pp-reference": Way("PP the reference's way", runtime=PLAIN),
    "pp-plain": Way("PP without what is done for speed", runtime=PLAIN),
    "pp-ahead": Way("PP deciding ahead", strategy={"selector": {"ahead": True}}),
    "pp-fused": Way("PP gathering inside the product (Triton)", runtime={"fused_gather": True}),
    "pp-sequential": Way("PP without overlap", runtime={"overlap": False}),
    **{f"pp-{how}": Way(f"PP, {words}", runtime={"compile": mode}) for how, (words, mode) in COMPILING.items()},
}

COMPILED = {f"{arm}-{how}": arm for how in COMPILING for arm in ("dense", "ideal", "pp")}
"""Compiled arms, and what they are compiled of."""

TITLES = {
    "dense": "dense",
    "ideal": "ideal (sliced beforehand)",
    **{name: way.title for name, way in WAYS.items()},
    **{f"{arm}-{how}": f"{arm}, {words}" for how, (words, _) in COMPILING.items() for arm in ("dense", "ideal")},
}

DEFAULT = ("dense", "ideal", "pp", "pp-frozen", "pp-reference")


@dataclass
class Arm:
    """One of the models that are timed."""

    name: str
    model: Any
    pruned: Pruned | None = None

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def decoder(self) -> nn.Module:
        """What a batch runs through: everything but the output embeddings."""
        return self.model.get_decoder()

    def close(self) -> None:
        """Let go of it."""
        if self.pruned is not None:
            self.pruned.remove()


@dataclass(frozen=True)
class Setting:
    """What is measured: a shape, a dtype, a batch, a ratio."""

    preset: str
    shape: Preset
    layers: int
    dtype: str
    batch: int
    length: int
    ratio: float
    skipped: tuple[int, ...]
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the strategy that all PP arms share."""
    seed: int = 0

    @property
    def words(self) -> str:
        """In a table's words."""
        return f"{self.preset}, {self.dtype}, {self.ratio:.0%}, batch {self.batch} x {self.length:,}"


def build(setting: Setting, names: Sequence[str]) -> list[Arm]:
    """Models of one shape with the same random weights, in memory once as far as nobody changes them.

    PP keeps to the paper's settings: MLP widths in multiples of 64, the harder ratio of the layers that are not skipped
    rounded to two decimals. Raises :class:`SpecError` for a ratio that is out of reach.
    """
    import transformers

    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    torch.manual_seed(setting.seed)
    config = setting.shape.config(setting.layers, setting.length)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    arms, counts = {"dense": Arm("dense", model)}, None
    catalog = Catalog.discover(block="")
    for name in (name for name in WAYS if name in names or name == "pp"):
        arms[name] = _pruned(name, twin(model), setting, catalog)
        counts = arms[name].pruned.counts
    sites = find_sites(model, catalog, arms["pp"].pruned.strategy.attention_unit)[1]
    if any(COMPILED.get(name, name) == "ideal" for name in names):
        arms["ideal"] = Arm("ideal", sliced(model, sites, counts))
    for name, of in COMPILED.items():
        if name in names and name not in arms:
            arms[name] = Arm(name, twin(arms[of].model))
            arms[name].decoder.compile(mode=COMPILING[name.rpartition("-")[2]][1])
    for name in [name for name in arms if name not in names]:
        arms.pop(name).close()
    return [arms[name] for name in names]


def _pruned(name: str, model: Any, setting: Setting, catalog: Catalog) -> Arm:
    way = WAYS[name]
    options: dict[str, Any] = {
        "allocator": {"mlp_multiple": 64},
        "skip_layers": setting.skipped,
        "rescale": "two_decimals",
        **setting.options,
    }
    for key, value in way.strategy.items():  # beside what the user set of the same part
        given = options.get(key) or {}
        options[key] = {**({"name": given} if isinstance(given, str) else given), **value}
    if name == "pp-reference":
        options |= {"scorer": FullWeightPPsp(dtype=setting.dtype), "applier": IndexedSlice()}
    generator = torch.Generator().manual_seed(setting.seed)
    rows = min(setting.batch, 4)
    text = [torch.randint(VOCABULARY, (rows, setting.length), generator=generator) for _ in range(CALIBRATION)]
    pruned = prune(
        model, "pp", ratio=setting.ratio, calibration=text, catalog=catalog, runtime=dict(way.runtime), **options
    )
    return Arm(name, model, pruned)


def batch_of(setting: Setting, number: int) -> torch.Tensor:
    """The token ids (B, T) of one round, random and the same for all arms."""
    generator = torch.Generator().manual_seed(setting.seed * 100_003 + number)
    ids = torch.randint(VOCABULARY, (setting.batch, setting.length), generator=generator)
    return ids.to(setting.device)


def close_all(arms: Sequence[Arm]) -> None:
    """Let go of the models."""
    for arm in arms:
        with suppress(Exception):
            arm.close()


def check_names(names: Sequence[str]) -> None:
    """Raise :class:`SpecError` for an arm that there is none of."""
    from ...registry import near

    for name in names:
        if name not in TITLES:
            raise SpecError(f"--arms: there is no arm {name!r}{near(name, TITLES)}; there are {', '.join(TITLES)}")
