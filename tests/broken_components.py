"""66 broken components: each passes for one that works, and gives wrong results, or an error from deep inside.

``BROKEN`` lists them with their role, what is broken, and words that the message of the check must contain.
"""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import transformers
from prunekit.registry import (
    Architecture,
    Catalog,
    Component,
    Evaluator,
    MeanSquare,
    Measurement,
    ProbeSelector,
    Producer,
    Rows,
    SparsityAllocator,
    position_means,
    position_sums,
)
from prunekit.strategies.application import Slice, Zero
from prunekit.strategies.pp.mergers import MovingAverage
from prunekit.strategies.pp.scorer import PPsp

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


class Broken(NamedTuple):
    """A component that breaks a rule."""

    role: str
    what: str
    """What is broken."""
    component: Component
    words: str
    """Part of the message of the check that catches it."""
    model: str = ""
    """The type of model that an architecture is checked on."""


@cache
def model_of(kind: str) -> Any:
    """A tiny random model."""
    more = {"stablelm": dict(qk_layernorm=True, num_key_value_heads=4), "llama": dict(num_key_value_heads=2)}
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more.get(kind, {}))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def made(base: type[Component], what: str, **body: Any) -> Component:
    """An object of a class derived from ``base``, with other methods."""
    name = "Broken" + base.__name__
    body = {"__module__": __name__, "__doc__": f"It {what}.", **body}
    annotations = {"statistic": ClassVar[Any], "sizes": Any}
    body["__annotations__"] = {key: annotations[key] for key in body if key in annotations}
    return type(name, (base,), body)()


# Scorers


class Good(PPsp):
    """A scorer that keeps all rules."""

    name: Literal["good"] = "good"


PREPARED: dict[tuple, torch.Tensor] = {}


def remembered(self, weight, site):
    return PREPARED.setdefault(tuple(weight.shape), weight.square().square().sum(0).sqrt())


SCORERS = [
    ("writes to the weight", "changes the weight", dict(prepare=lambda self, w, site: w.abs_().sum(0))),
    ("writes to the statistic", "changes the statistic", dict(score=lambda self, p, s: s.mul_(p))),
    ("gives scores of another shape", "found float32 (1,", dict(score=lambda self, p, s: (p * s)[None])),
    ("gives scores in float64", "found float64", dict(score=lambda self, p, s: (p * s).double())),
    ("gives scores in int64", "found int64", dict(score=lambda self, p, s: (1e3 * p * s).long())),
    ("gives NaN", "NaN or infinity", dict(score=lambda self, p, s: p * s / s)),
    ("draws at random", "scores the same input differently", dict(score=lambda self, p, s: p * s * torch.rand(len(s)))),
    (
        "gives the units' scores in reverse",
        "number of a unit",
        dict(unit_scores=lambda self, c, size: c.view(-1, size).sum(1).flip(0)),
    ),
    (
        "takes every nth channel for a unit",
        "number of a unit",
        dict(unit_scores=lambda self, c, size: c.view(size, -1).sum(0)),
    ),
    (
        "scores by the number of the channel",
        "number of a channel",
        dict(score=lambda self, p, s: p * s * torch.arange(1.0, 1 + len(s))),
    ),
    ("remembers weights by their shape", "number of a channel", dict(prepare=remembered)),
    (
        "scores a unit by its first channel",
        "number of a unit",
        dict(unit_scores=lambda self, c, size: c.view(-1, size)[:, 0].clone()),
    ),
]

# Statistics


class CountsPadding(MeanSquare):
    """Padding enters the history."""

    name: Literal["counts_padding"] = "counts_padding"

    def observe(self, history, x, valid):
        super().observe(history, x, None)


class OtherScale(MeanSquare):
    """Measures the root of what it observes."""

    name: Literal["other_scale"] = "other_scale"

    def measure(self, x, valid, mean):
        return position_means(x, valid, square=True).sqrt()


class NeverDivides(MeanSquare):
    """Sums where it should average."""

    name: Literal["never_divides"] = "never_divides"

    def observe(self, history, x, valid):
        sums, counts = position_sums(x, valid, square=True)
        history.grow(len(sums))
        history.table[: len(sums)] += sums
        history.rows[: len(sums)] += counts


STATISTICS = [
    ("counts padding", "looks at padded tokens when it observes", dict(statistic=CountsPadding())),
    ("measures on another scale than it observes", "measures a batch otherwise than", dict(statistic=OtherScale())),
    ("never divides by the rows", "measures a batch otherwise than", dict(statistic=NeverDivides())),
]

# Probe selectors


class Everything(ProbeSelector):
    """All rows, and every second position with real tokens."""

    name: Literal["everything"] = "everything"

    def select(self, states, valid, generator):
        rows, positions = (torch.arange(size) for size in states.shape[:2])
        return rows, (positions if valid is None else positions[valid.any(0)])[::2]


def picking(positions):
    """A method that picks these positions of the first row."""
    return lambda self, states, valid, generator: (torch.tensor([0]), torch.tensor(positions(states)))


def padding_first(self, states, valid, generator):
    rows, length = states.shape[:2]
    real = torch.zeros(length) if valid is None else valid.sum(0).float()
    return torch.arange(rows), real.topk(max(1, length // 2), largest=False).indices.sort().values


def in_place_states(self, states, valid, generator):
    states.mul_(2)
    return torch.arange(states.shape[0]), torch.arange(states.shape[1])


def own_draw(self, states, valid, generator):
    return torch.arange(states.shape[0]), torch.randperm(states.shape[1])[: max(1, states.shape[1] // 2)].sort().values


SELECTORS = [
    ("goes past the last position", "picks positions", picking(lambda s: [s.shape[1]])),
    ("gives a negative position", "picks positions [-1]", picking(lambda s: [-1])),
    (
        "gives positions in descending order",
        "ascending, unique positions",
        picking(lambda s: list(range(s.shape[1]))[::-1]),
    ),
    ("gives a position twice", "ascending, unique positions", picking(lambda s: [0, 0])),
    ("draws from torch's own generator", "differently with the same generator", own_draw),
    ("writes to the states", "changes the states", in_place_states),
    ("prefers padding", "real tokens", padding_first),
]  # fmt: skip

# History mergers


class Mean(MovingAverage):
    """The mean of probe and history."""

    name: Literal["mean_of_both"] = "mean_of_both"
    momentum: float = 0.5

    def merge(self, probe, history, site):
        return (probe + history) / 2


MERGERS = [
    ("merges to negative numbers", "something negative", dict(merge=lambda self, p, h, site: p - 2 * h)),
    (
        "merges to ten times the larger",
        "outside of probe and history",
        dict(merge=lambda self, p, h, site: 10 * torch.maximum(p, h)),
    ),
    (
        "mixes channels",
        "number of a channel",
        dict(merge=lambda self, p, h, site: (p + h + p.roll(1, 1) + h.roll(1, 1)) / 4),
    ),
    ("mixes positions", "another position", dict(merge=lambda self, p, h, site: (p + h.flip(0)) / 2)),
    (
        "updates history by other positions",
        "updates an entry by others",
        dict(update=lambda self, h, o: (h + o.roll(1, 0)) / 2),
    ),
    (
        "updates history by other channels",
        "updates an entry by others",
        dict(update=lambda self, h, o: (h + o.roll(1, 1)) / 2),
    ),
    ("lets history grow with every batch", "outside of history and batch", dict(update=lambda self, h, o: 1.5 * h + o)),
]

# Allocators


class Plain(SparsityAllocator):
    """The same share everywhere."""

    name: Literal["plain"] = "plain"

    def allocate(self, sites, ratio):
        return [shares(each, ratio) for each in sites]


def shares(scores, ratio):
    return max(1, scores.site.units - int(ratio * scores.site.units + 1e-9))


def exact(scores, ratio):
    return (1 - ratio) * scores.site.units if ratio else scores.site.units


class Scored(Plain):
    """Writes to what it is shown."""

    needs_scores: ClassVar[bool] = True

    def allocate(self, sites, ratio):
        for each in sites:
            each.units.neg_()
        return super().allocate(sites, ratio)


def at_random(self, sites, ratio):
    if not ratio:
        return [each.site.units for each in sites]
    counts = [shares(each, ratio) for each in sites]
    return [max(1, count - int(torch.randint(2, ()))) for count in counts]


ALLOCATORS = [
    ("keeps more than there is", "keeps 7 of 6 units", lambda self, sites, r: [each.site.units + 1 for each in sites]),
    ("keeps fractions", "keeps 5.4 of 6 units", lambda self, sites, r: [exact(each, r) for each in sites]),
    ("leaves sites out", "counts for", lambda self, sites, r: [shares(each, r) for each in sites[1:]]),
    ("draws at random", "same sites", at_random),
    ("ignores the ratio", "is to cut", lambda self, sites, r: [each.site.units for each in sites]),
    ("keeps nothing", "is to cut", lambda self, sites, r: [0 if r else each.site.units for each in sites]),
    ("cuts twice the ratio", "is to cut", lambda self, sites, r: [shares(each, min(0.95, 2 * r)) for each in sites]),
]  # fmt: skip

# Mask appliers


class Bias(Slice):
    """Forgets the bias."""

    name: Literal["no_bias"] = "no_bias"

    def producer(self, weight, bias, rows):
        return super().producer(weight, bias, rows)[0], None


APPLIERS = [
    ("leaves the consumer whole", "consumer's weight as float32 (20, 5)", Slice, dict(consumer=lambda self, w, c: w)),
    ("turns the columns around", "something else than", Slice, dict(consumer=lambda self, w, c: w[:, c.flip(0)])),
    ("forgets the bias", "producer's bias", Bias, {}),
    (
        "writes zeroes into the weight",
        "changes the weight",
        Zero,
        dict(consumer=lambda self, w, c: w.mul_(torch.zeros_like(w[0]).index_fill(0, c, 1))),
    ),
]

# Architectures


@cache
def known(kind: str) -> type[Architecture]:
    """prunekit's own architecture of a model type."""
    (found,) = [
        entry.component
        for entry in Catalog.discover(block="").of_role("architectures")
        if kind in entry.component.model_fields["model_types"].default
    ]
    return found


def changed(kind: str, change: Any, **body: Any) -> Component:
    """prunekit's architecture with other sites."""
    base = known(kind)

    def sites(self, model, attention_unit):
        return change(base.sites(self, model, attention_unit))

    return made(base, "lists other sites", sites=sites, **body)


def each(kind: str, change: Any) -> Any:
    """A change of every site of a kind."""
    return lambda sites: [change(site) if site.kind == kind else site for site in sites]


def longer_rows(site):
    first, *others = site.producers
    (rows,) = first.segments
    return replace(site, producers=(Producer(first.path, (Rows(0, rows.per_unit - 1),)), *others))


def next_layer(sites):
    of = {(site.layer, site.kind): site for site in sites}
    return [
        replace(site, producers=of[1 - site.layer, "mlp"].producers) if site.kind == "mlp" else site for site in sites
    ]


def concatenated(site):
    (fused,) = site.producers
    size, whole = site.unit_size, site.channels
    rows = tuple(Rows(part * whole, size) for part in range(3))
    return replace(site, producers=(Producer(fused.path, rows),))


def without_norms(site):
    return replace(site, unit_tensors=(), unit_parameters=site.unit_parameters - 2 * site.unit_size)


def half_heads(site):
    producers = tuple(
        Producer(part.path, tuple(Rows(rows.offset, rows.per_unit // 2) for rows in part.segments))
        for part in site.producers
    )
    return replace(
        site, producers=producers, units=2 * site.units, unit_size=site.unit_size // 2, shape_attributes=(),
        unit_parameters=site.unit_parameters // 2,
    )  # fmt: skip


def other_norm(site):
    return replace(site, norm=site.norm.replace("input_layernorm", "post_attention_layernorm"))


def one_producer(site):
    gate, _ = site.producers
    own = gate.segments[0].per_unit * 32
    return replace(site, producers=(gate,), unit_parameters=site.unit_parameters - own)


ARCHITECTURES = [
    ("says that units own other rows", "not all once", "llama", changed("llama", each("attention", longer_rows))),
    ("leaves out sites", "lists no site", "llama", changed("llama", lambda sites: sites[:-1])),
    ("lists sites twice", "layer by layer", "llama", changed("llama", lambda sites: [sites[0], *sites])),
    (
        "states other parameters of a unit",
        "a unit has",
        "llama",
        changed("llama", each("mlp", lambda site: replace(site, unit_parameters=7))),
    ),
    ("lists sites in another order", "layer by layer", "llama", changed("llama", lambda sites: sites[::-1])),
    ("takes the producers of the next layer", "a pass must call", "llama", changed("llama", next_layer)),
    (
        "takes interleaved rows for concatenated ones",
        "off the zeroed model's",
        "gpt_neox",
        changed("gpt_neox", each("attention", concatenated)),
    ),
    (
        "forgets the norms of each head",
        "off the zeroed model's",
        "stablelm",
        changed("stablelm", each("attention", without_norms)),
    ),
    (
        "takes half a head for a unit",
        "with fewer units",
        "llama",
        changed("llama", each("attention", half_heads), sizes=None),
    ),
    ("names another norm", "a pass must call", "llama", changed("llama", each("attention", other_norm))),
    ("leaves out a producer", "with fewer units", "llama", changed("llama", each("mlp", one_producer))),
    (
        "forgets a size that the forward reads",
        "with fewer units",
        "stablelm",
        changed("stablelm", each("attention", lambda site: replace(site, shape_attributes=()))),
    ),
    (
        "names another module as the entry",
        "a pass must call",
        "llama",
        changed("llama", each("mlp", lambda site: replace(site, entry=site.consumer))),
    ),
    (
        "names the model's last norm",
        "a pass must call",
        "llama",
        changed("llama", each("attention", lambda site: replace(site, norm="model.norm"))),
    ),
]  # fmt: skip

# Evaluators


class One(Evaluator):
    """One."""

    name: Literal["one"] = "one"

    def evaluate(self, subject):
        type(self).act(subject)
        return Measurement({"one": 1}, {"counted": "one"})

    @staticmethod
    def act(subject):
        """What is broken."""


def drop_weight(subject):
    with torch.no_grad():
        subject.model.lm_head.weight.mul_(2)


def leave_hook(subject):
    subject.model.model.norm.register_forward_hook(lambda *call: 2 * call[2])


def drop_buffer(subject):
    subject.model.model.rotary_emb.inv_freq.mul_(2)


EVALUATORS = [
    ("leaves the model in training mode", "leaves the model in training mode", lambda s: s.model.train()),
    ("changes a weight", "changes lm_head.weight", drop_weight),
    ("leaves a hook", "leaves a hook at model.norm", leave_hook),
    ("leaves a part in training mode", "leaves model.layers.1 in training", lambda s: s.model.model.layers[1].train()),
    ("changes a buffer", "changes model.rotary_emb.inv_freq", drop_buffer),
    ("leaves another default dtype", "default dtype", lambda s: torch.set_default_dtype(torch.float64)),
    ("leaves gradients off", "gradient mode", lambda s: torch.set_grad_enabled(False)),
    ("draws from torch's own generator", "random state", lambda s: torch.rand(1)),
    ("raises", "raises ZeroDivisionError", lambda s: 1 / 0),
]  # fmt: skip
MEASURES = [
    ("measures NaN", "not finite", lambda self, subject: Measurement({"one": float("nan")}, {"a": 1})),
    ("measures text", "return a number or None", lambda self, subject: Measurement({"one": "1"}, {"a": 1})),
]

BROKEN = [
    *(Broken("scorer", what, made(Good, what, **body), words) for what, words, body in SCORERS),
    *(Broken("statistic", what, made(Good, what, **body), words) for what, words, body in STATISTICS),
    *(Broken("selector", what, made(Everything, what, select=select), words) for what, words, select in SELECTORS),
    *(Broken("merger", what, made(Mean, what, **body), words) for what, words, body in MERGERS),
    *(Broken("allocator", what, made(Plain, what, allocate=allocate), words) for what, words, allocate in ALLOCATORS),
    Broken("allocator", "writes to the scores it is shown", Scored(), "changes the scores"),
    *(Broken("applier", what, made(base, what, **body), words) for what, words, base, body in APPLIERS),
    *(Broken("architecture", what, component, words, model) for what, words, model, component in ARCHITECTURES),
    *(Broken("evaluator", what, made(One, what, act=staticmethod(act)), words) for what, words, act in EVALUATORS),
    *(Broken("evaluator", what, made(One, what, evaluate=measure), words) for what, words, measure in MEASURES),
]
GOOD = [Good(), Everything(), Mean(), Plain(), Slice(), Zero(), One()]
"""What the broken ones are made of: it passes all checks."""
