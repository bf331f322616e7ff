"""What exports know of a model's family: its architecture, its stock configuration, where the blocks of a layer are."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...registry import Architecture, Catalog, ExpertUnit, ModelError, Producer, Site, SiteKind, SizeFields, SpecError
from ...registry.checks.sites import wrong_size
from ...registry.sites import owned_norms
from ...registry.tensors.linears import is_transposed
from ..models.exported import classes
from ..models.language import auto_class
from ..pruning.sites import architecture_of, find_sites

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
"""Fields of configurations with the number of routed experts, and with the channels of each; a family has one."""


@dataclass(frozen=True)
class Family:
    """The family of a model that is to be exported, by the model's configuration."""

    config: Any
    """The stock configuration, with the sizes of the dense model."""
    architecture: Architecture
    catalog: Catalog
    experts: ExpertUnit = "keep"
    """Whether channels of routed experts are cut, whole experts, or nothing of them."""

    @classmethod
    def of(cls, config: Any, catalog: Catalog, experts: ExpertUnit) -> Family:
        """Raises :class:`ModelError` for a model type that no architecture serves."""
        return cls(classes.homogeneous(config), architecture_of(config, catalog), catalog, experts)

    @property
    def kind(self) -> str:
        """The model type."""
        return self.config.model_type

    @property
    def text(self) -> Any:
        """The configuration of the language model."""
        return self.config.get_text_config()

    @property
    def is_inside(self) -> bool:
        """Whether the language model is inside of another one."""
        return self.text is not self.config

    @property
    def sizes(self) -> SizeFields:
        """The fields of the language model's configuration with its sizes."""
        return self.architecture.sizes or SizeFields()

    @cached_property
    def stock(self) -> nn.Module:
        """A model of the stock class, without values."""
        with torch.device("meta"):
            return auto_class(self.config).from_config(self.config)

    @cached_property
    def _found(self) -> list[Site]:
        return find_sites(self.stock, self.catalog, "kv_group", self.experts)[1]

    @cached_property
    def sites(self) -> list[Site]:
        """The sites of the stock model in its attentions and MLPs."""
        return [site for site in self._found if not site.routed]

    @cached_property
    def routed(self) -> list[Site]:
        """The sites of the stock model in its routed experts."""
        return [site for site in self._found if site.routed]

    @cached_property
    def blocks(self) -> dict[str, Any]:
        """Where the blocks of a layer are, as ``modeling_prunekit.LLAMA`` has it.

        Raises :class:`ModelError` where layers have them in different places.
        """
        fields = {"heads": self.sizes.heads, "kv_heads": self.sizes.kv_heads, "width": self.sizes.width}
        found: dict[str, Any] = {"layers": self.sites[0].consumer.partition(f".{self.sites[0].layer}.")[0]}
        found["fields"] = {**fields, "kv_heads": fields["kv_heads"] or fields["heads"]}
        norms = owned_norms(self.sites)
        for kind in ("attention", "mlp"):
            blocks = [self._block(site, norms) for site in self.sites if site.kind == kind]
            if any(block != blocks[0] for block in blocks):
                raise ModelError(f"the {kind} of {self.kind} is not built alike in all layers that have one")
            if blocks:
                found[kind] = blocks[0]
        return found

    def _block(self, site: Site, norms: set[str]) -> dict[str, Any]:
        def inside(path: str) -> str:
            return path.partition(f".{site.layer}.")[2]

        main = "heads" if site.kind == "attention" else "width"
        block: dict[str, Any] = {
            "entry": None if site.activation else inside(site.entry),
            "norm": inside(site.norm) if site.norm is not None and site.norm in norms else None,
            "producers": {inside(producer.path): self._size(site, producer) for producer in site.producers},
            "consumer": inside(site.consumer),
        }
        if site.shape_attributes:
            sizes = ((each, main if each.per_unit > 1 else self._by_unit(site)) for each in site.shape_attributes)
            block["sizes"] = {f"{inside(each.path)}.{each.attribute}": size for each, size in sizes}
        if site.returns is not None:
            block["returns"] = site.returns
        return block

    def _size(self, site: Site, producer: Producer) -> str:
        """What the producer's rows go with: heads, key/value heads or MLP channels."""
        rows = sum(segment.per_unit for segment in producer.segments) * site.units
        return "heads" if site.kind == "attention" and rows % site.channels == 0 else self._by_unit(site)

    def _by_unit(self, site: Site) -> str:
        return "kv_heads" if site.kind == "attention" else "width"

    def refusal(self, profile: str) -> str | None:
        """Why hf-uniform or hf-hetero cannot write smaller models of this family; None: as far as known, it can."""
        if self.routed and profile != "hf-uniform":
            return "routed experts are cut, and a checkpoint has one size of them for all layers, as hf-uniform writes"
        if self.routed and self.expert_field is None:
            return f"no field of the configuration says {self.routed[0].units} for all layers with routed experts"
        return self._refusal(profile) if self.sites else None

    @property
    def expert_field(self) -> str | None:
        """The configuration's field with what is cut of routed experts; None: none says what all layers have."""
        names = EXPERT_COUNTS if self.experts == "whole" else EXPERT_WIDTHS
        sizes = {site.units for site in self.routed}
        return next((name for name in names if {getattr(self.text, name, None)} == sizes), None)

    def _refusal(self, profile: str) -> str | None:
        if self.architecture.sizes is None:
            return (
                f"architecture {self.architecture.name} names no fields of the configuration that hold the sizes of "
                "all layers (sizes, docs/plugins.md)"
            )
        wrong = wrong_size(self.sizes, self.text, self.sites)
        if wrong is not None:
            return f"no field of the configuration holds the sizes of all layers: {wrong}"
        if profile == "hf-uniform":
            return None
        for site in self.sites:
            if is_transposed(self.stock.get_submodule(site.consumer)):
                return f"{site.consumer} is a Conv1D, and layers of different shapes are of nn.Linear alone"
        if self.is_inside:
            return f"a {self.text.model_type} inside of a {self.kind} has no class whose layers have different shapes"
        try:
            classes.class_of(self.kind)
            self.blocks  # noqa: B018 - it may raise
        except ModelError as error:
            return str(error)
        return None

    def nearest(self, profile: str) -> str:
        """The other profiles that can write the family, for the end of an error."""
        smaller = [each for each in ("hf-hetero", "hf-uniform") if self.refusal(each) is None]
        zeros = [] if self.experts == "whole" and self.routed else ["padded"]
        others = [each for each in (*smaller, *zeros, "dynamic") if each != profile]
        return f"nearest: {', or '.join(f'--profile {each}' for each in others)}"

    def check(self, profile: str) -> None:
        """Raise :class:`ModelError` for a profile that cannot write smaller models of this family."""
        reason = self.refusal(profile)
        if reason is not None:
            raise ModelError(f"profile {profile}: {reason}; {self.nearest(profile)}")

    def check_biases(self, profile: str, kinds: Iterable[SiteKind]) -> None:
        """Raise :class:`SpecError` where compensation gives biases that the family's own class has no place for."""
        for kind in dict.fromkeys(kinds):
            if kind in ("attention", "mlp") and not self._takes_bias(kind):
                other = "" if self.refusal("hf-hetero") else "--profile hf-hetero, or "
                what = f"the {kind.replace('mlp', 'MLP')}'s output projection a bias"
                raise SpecError(
                    f"profile {profile}: compensation gives {what}, and {type(self.stock).__name__} has no place for "
                    f"one; nearest: {other}--profile dynamic, or --set prune.compensate=none"
                )

    def _takes_bias(self, kind: SiteKind) -> bool:
        """Whether the output projection has a bias, or has one if the configuration asks for it."""
        if self.has_bias(kind):
            return True
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if not hasattr(text, f"{kind}_bias"):
            return False
        setattr(text, f"{kind}_bias", True)
        return replace(self, config=config).has_bias(kind)

    def has_bias(self, kind: SiteKind) -> bool:
        """Whether the output projection of the stock model has a bias."""
        consumers = [self.stock.get_submodule(site.consumer) for site in self.sites if site.kind == kind]
        return any(getattr(consumer, "bias", None) is not None for consumer in consumers)
