"""Checks of an architecture on a tiny random model: what is cut equals an independent zeroing of the dense model.

:func:`check_architecture` is all that an author needs. The zeroing reads nothing of a site but the path of its consumer
and the number of its units: columns of the consumer's weight are set to zero in a copy of the dense model. So the rows
of the producers, the sizes that a forward reads, the norm and the probe are all judged by it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...registry import Architecture, AttentionUnit, Catalog, ModelError, PruneWarning, Site, SiteKind
from ...registry.catalog import Entry
from ...registry.checks import check_sites, raised
from ...registry.checks.parts import expect
from ..models.language import text_config
from ..models.likeness import with_types
from .prune import prune
from .pruned import Pruned
from .sites import architecture_of, find_sites

STRATEGIES = ("wanda_sp", "flap", "pp", "full_batch_probing")
UNITS: tuple[AttentionUnit, ...] = ("kv_group", "query_head")
ATTENTIONS = ("eager", "sdpa")
PADDINGS = ("none", "left", "right")

ROWS, LENGTH, STEPS = 3, 10, 4
TOLERANCE = 2e-4
"""Largest difference of logits, relative to the largest logit."""


Place = tuple[int, SiteKind]
"""Layer and kind of a site."""
Kept = Mapping[Place, Iterable[int]]
"""The units that sites keep, ascending."""


class Case(NamedTuple):
    """One way to cut a model, and to run it."""

    strategy: str
    unit: AttentionUnit
    attention: str
    padding: str


ALL = [Case(*parts) for parts in product(STRATEGIES, UNITS, ATTENTIONS, PADDINGS)]
"""All 48 combinations."""


def cover() -> list[Case]:
    """12 of the 48: every strategy under every padding. Units and attentions take turns, so that each strategy meets
    both of both."""
    pairs = list(product(UNITS, ATTENTIONS))
    places = product(enumerate(STRATEGIES), enumerate(PADDINGS))
    return [
        Case(strategy, *pairs[(number + (0, 3, 1)[place]) % 4], padding)
        for (number, strategy), (place, padding) in places
    ]


def randomise(model: Any, seed: int = 0) -> Any:
    """Make every weight of a model random, norms, biases and sinks too: with norms of 1, wrong sites pass every check.

    Returns the model in evaluation mode, without gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.4 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval().requires_grad_(False)


def masks(padding: str) -> Tensor | None:
    """The attention mask (ROWS, LENGTH), with other numbers of real tokens in every row; None without padding."""
    if padding == "none":
        return None
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, -4:] = 0
    mask[2, -1:] = 0
    return mask.flip(1) if padding == "left" else mask


class Oracle:
    """A copy of the dense model whose dropped units weigh nothing where they are read."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        copied: Any = copy.deepcopy(model)
        self.model, self.sites = copied, sites
        self.consumers: dict[Place, Any] = {place(site): copied.get_submodule(site.consumer) for site in sites}
        self.weights = {where: columns_of(linear).clone() for where, linear in self.consumers.items()}
        self.biases = {
            where: linear.bias.clone() for where, linear in self.consumers.items() if linear.bias is not None
        }

    def zero(self, kept: Kept) -> None:
        """Set the columns of all units but ``kept`` to zero; a site that keeps nothing adds nothing."""
        for site in self.sites:
            where, chosen = place(site), chosen_of(site, kept)
            columns = columns_of(self.consumers[where])
            columns.copy_(self.weights[where] * chosen.repeat_interleave(columns.shape[1] // site.units))
            if where in self.biases:
                self.consumers[where].bias.copy_(self.biases[where] * chosen.any())

    def read(self, **call: Any) -> tuple[Tensor, dict[Place, Tensor]]:
        """Logits, and by site what its consumer read: (ROWS, LENGTH, C)."""
        seen: dict[Place, Tensor] = {}

        def note(where: Place, linear: nn.Module, given: tuple) -> None:
            seen[where] = given[0].reshape(ROWS, LENGTH, -1)

        hooks = [each.register_forward_pre_hook(partial(note, where)) for where, each in self.consumers.items()]
        try:
            return self.model(**call).logits, seen
        finally:
            for hook in hooks:
                hook.remove()


def chosen_of(site: Site, kept: Kept) -> Tensor:
    """(U,) bool: the kept units of a site."""
    chosen = torch.zeros(site.units, dtype=torch.bool)
    chosen[list(kept[place(site)])] = True
    return chosen


def columns_of(linear: Any) -> Tensor:
    """The weight with a column for each channel that is read; (O, C). Some layers store it the other way round."""
    return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight


def place(site: Site) -> Place:
    """Layer and kind of a site."""
    return site.layer, site.kind


def check_architecture(architecture: Architecture, model: nn.Module, cases: Sequence[Case] | None = None) -> None:
    """Raise :class:`AssertionError` unless a model is cut right at the architecture's sites.

    :func:`~prunekit.registry.checks.check_sites` and :func:`check_family` are run on a copy of the model, which must be
    small. Its weights are made random: where norms are 1, wrong sites pass. Raises :class:`ModelError` where the
    architecture refuses the model.
    """
    kind = text_config(model).model_type
    serves = kind in architecture.model_types
    expect(serves, architecture, f"does not serve model type {kind!r}, but {', '.join(architecture.model_types)}")
    cause = ""
    try:
        copied = randomise(copy.deepcopy(model))
        for unit in UNITS:
            check_sites(architecture, copied, unit)
        cause = "with fewer units; a producer or a size (head_count, width) may be missing, or a unit is not whole"
        check_family(copied, cases, catalog_of(architecture, kind))
    except (AssertionError, ModelError):
        raise
    except Exception as error:
        raise raised(architecture, error, cause) from error


def catalog_of(architecture: Architecture, kind: str) -> Catalog:
    """The catalog with one architecture alone, with its options, for a model type."""
    own = type(architecture)
    fields = {key: info for key, info in own.model_fields.items() if key != "model_types"}
    options = {key: (info.annotation, getattr(architecture, key)) for key, info in fields.items()}
    entry = Entry("architectures", architecture.name, own, architecture.name, own.__module__)
    return with_types(Catalog.discover(), entry, kind, options)


def check_family(
    model: Any,
    cases: Sequence[Case] | None = None,
    catalog: Catalog | None = None,
    ratio: float = 0.4,
    **options: Any,
) -> None:
    """Check every case (:func:`cover` by default) on a model, whose weights are made random first.

    Routed experts are left out: :mod:`prunekit.registry.checks.experts` checks them.

    Sliced equals zeroed, and one wrong unit does not. Full-batch probing's decisions are computed again from what the
    dense consumers read. Generated tokens are the oracle's. Blocks that keep nothing add nothing. After removal the
    model is bit-identical, and no key of the state dict has changed. ``options`` are those of ``prune``. Raises
    :class:`AssertionError`.
    """
    catalog = Catalog.discover(block="") if catalog is None else catalog
    randomise(model)
    check = Cuts(architecture_of(model.config, catalog), model, catalog, {"ratio": ratio, **options})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", PruneWarning)
        check.run(cover() if cases is None else cases)


class Cuts:
    """The cuts of one model, compared with its zeroed copies."""

    def __init__(self, architecture: Architecture, model: Any, catalog: Catalog, options: Mapping[str, Any]):
        self.architecture, self.model, self.catalog, self.options = architecture, model, catalog, options
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.get_input_embeddings().num_embeddings
        self.ids, *self.texts = (torch.randint(3, vocabulary, (ROWS, LENGTH), generator=generator) for _ in range(3))

    def expect(self, condition: Any, message: str) -> None:
        expect(bool(condition), self.architecture, message)

    def run(self, cases: Sequence[Case]) -> None:
        """Run all cases, and then the model without some of its blocks."""
        model = self.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        oracles = {
            unit: Oracle(model, find_sites(model, self.catalog, unit, "keep")[1])
            for unit in {case.unit for case in cases}
        }
        for number, case in enumerate(cases):
            oracle = oracles[case.unit]
            for each in (model, oracle.model):  # some classes have eager attention alone
                each.set_attn_implementation(case.attention if each._supports_sdpa else "eager")
            mask = masks(case.padding)
            call: dict[str, Any] = dict(input_ids=self.ids, attention_mask=mask, use_cache=False)
            dense = model(**call).logits
            merger = {"merger": "probe_only"} if case.strategy == "full_batch_probing" else {}
            with prune(
                model, case.strategy, calibration=self.texts, catalog=self.catalog, trace=True, experts="keep",
                attention_unit=case.unit, compensate="none", **{**self.options, **merger},
            ) as pruned:  # fmt: skip
                self.expect(list(model.state_dict()) == list(before), f"{case}: keys of the state dict changed")
                self.logits(case, number, pruned, oracle, call)
                if case.padding != "right":
                    self.generation(case, pruned, oracle, mask)
            same = torch.equal(model(**call).logits, dense)
            self.expect(same, f"{case}: the model computes otherwise after removal")
        self.absent(case, oracle)
        after = model.state_dict()
        same = list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        self.expect(same, "leaves other weights after removal")

    def logits(self, case: Case, number: int, pruned: Pruned, oracle: Oracle, call: dict[str, Any]) -> None:
        """Sliced equals zeroed on the real tokens, and does not where one unit of one site, in turn, is another one."""
        logits, mask = self.model(**call).logits, call["attention_mask"]
        kept = kept_of(pruned)
        cut_somewhere = any(len(kept[place(site)]) < site.units for site in oracle.sites)
        self.expect(cut_somewhere, f"{case}: nothing was cut; take a model with more units")
        oracle.zero(kept)
        expected, seen = oracle.read(**call)
        real = slice(None) if mask is None else mask.bool()
        allowed = TOLERANCE * float(expected[real].abs().max())
        difference = float((logits - expected)[real].abs().max())
        self.expect(
            difference <= allowed,
            f"{case}: logits are {difference:.2g} off the zeroed model's, allowed is {allowed:.2g}",
        )
        if case.strategy == "full_batch_probing":
            self.decisions(case, kept, oracle, seen, mask)
        cut = [site for site in oracle.sites if 0 < len(kept[place(site)]) < site.units]
        site = cut[number % len(cut)]
        swapped = [unit for unit in range(site.units) if unit not in kept[place(site)]][:1]
        oracle.zero(kept | {place(site): [*kept[place(site)][1:], *swapped]})
        moved = float((oracle.model(**call).logits - expected)[real].abs().max())
        self.expect(moved > 5 * allowed, f"{case}: a wrong unit in {site.label} moves the logits by {moved:.2g} alone")

    def absent(self, case: Case, oracle: Oracle) -> None:
        """A model without its first attention and its last MLP computes as if these added nothing."""
        places = [place(site) for site in oracle.sites]
        attentions, mlps = ([each for each in places if each[1] == kind] for kind in ("attention", "mlp"))
        gone, layers = [*attentions[:1], *mlps[-1:]], 1 + places[-1][0]
        shares = {kind: [float((layer, kind) in gone) for layer in range(layers)] for kind in ("attention", "mlp")}
        options = {**self.options, "ratio": None, "allocator": {"name": "explicit", **shares}}
        with prune(
            self.model, "magnitude", attention_unit=case.unit, catalog=self.catalog, trace=True, experts="keep",
            **options,
        ) as pruned:  # fmt: skip
            empty = [where for where, count in pruned.counts.items() if not count]
            self.expect(empty == sorted(gone), f"keeps nothing at {empty}, and not at {sorted(gone)}")
            call = dict(input_ids=self.ids, use_cache=False)
            oracle.zero(kept_of(pruned))
            expected = oracle.model(**call).logits
            difference, allowed = (
                (self.model(**call).logits - expected).abs().max(),
                TOLERANCE * expected.abs().max(),
            )
            off = f"without {gone}: logits are {difference:.2g} off, allowed is {allowed:.2g}"
            self.expect(difference <= allowed, off)
            self.generation(case, pruned, oracle, None)

    def decisions(
        self, case: Case, kept: Kept, oracle: Oracle, seen: Mapping[Place, Tensor], mask: Tensor | None
    ) -> None:
        """The kept units have the highest scores: energy of the channels times the norm of squared weights."""
        real = torch.ones(ROWS, LENGTH, 1) if mask is None else mask[..., None]
        for site in oracle.sites:
            energy = ((seen[place(site)].square() * real).sum(0) / real.sum(0).clamp(min=1)).sum(0)
            channels = energy * oracle.weights[place(site)].pow(4).sum(0).sqrt()
            scores, chosen = channels.view(site.units, -1).norm(dim=1), chosen_of(site, kept)
            if not chosen.all():
                low, high = float(scores[chosen].min()), float(scores[~chosen].max())
                right = low >= high * (1 - 1e-4)
                self.expect(right, f"{case}: {site.label} keeps a score of {low:.3g}, drops {high:.3g}")

    def generation(self, case: Case, pruned: Pruned, oracle: Oracle, mask: Tensor | None) -> None:
        """Greedy tokens, one after another through the key/value cache, are those of the zeroed model."""
        pruned.reset()
        tokens = greedy(pruned.model, self.ids, mask)
        oracle.zero(kept_of(pruned))
        same = torch.equal(tokens, greedy(oracle.model, self.ids, mask))
        self.expect(same, f"{case}: other tokens than the zeroed model's")


def kept_of(pruned: Pruned) -> dict[Place, Sequence[int]]:
    """The units that every site computed with in the last batch, by layer and kind."""
    trace = pruned.trace or []
    last = [record for record in trace if record["batch"] == trace[-1]["batch"]]
    whole = {place(site): range(site.units) for site in pruned.all_sites}
    return {**whole, **pruned.sites_kept} | {(record["layer"], record["kind"]): record["kept"] for record in last}


def greedy(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """(ROWS, LENGTH + STEPS) tokens."""
    options = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
