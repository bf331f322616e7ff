"""The checks of components can fail: each broken rule is named, and what keeps the rules passes."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from prunekit.compress.models.architectures import Llama
from prunekit.registry import (
    Component,
    Evaluator,
    ExportFormat,
    FittedScorer,
    HistoryMerger,
    Measurement,
    PlainSubject,
    ProbeSelector,
    Producer,
    Rows,
    Scorer,
    ShapeAttribute,
    SparsityAllocator,
    SpecError,
    Statistic,
)
from prunekit.registry.checks import check_component, check_evaluation, check_sites
from prunekit.registry.checks.exporting import check_export
from prunekit.registry.checks.fitting import check_fit_returns_model
from prunekit.strategies.application import Slice
from prunekit.strategies.pp import PP
from prunekit.strategies.pp.scorer import PPsp
from pydantic import ConfigDict, Field, field_serializer

pytestmark = pytest.mark.smoke


class Good(Scorer):
    """A scorer that keeps all rules."""

    name: Literal["good"] = "good"

    def prepare(self, weight, site):
        return weight.abs().amax(0)

    def score(self, prepared, statistic):
        return prepared * statistic


class Select(ProbeSelector):
    """Everything."""

    name: Literal["select"] = "select"

    def select(self, states, valid, generator):
        return torch.arange(states.shape[0]), torch.arange(states.shape[1])


class Merge(HistoryMerger):
    """The probe."""

    name: Literal["merge"] = "merge"

    def merge(self, probe, history, site):
        return probe


class Allocate(SparsityAllocator):
    """The same share of every site."""

    name: Literal["allocate"] = "allocate"

    def allocate(self, sites, ratio):
        return [max(1, scores.site.units - int(ratio * scores.site.units)) for scores in sites]


class Measure(Evaluator):
    """One."""

    name: Literal["measure"] = "measure"

    def evaluate(self, subject):
        return Measurement({"one": 1}, {"counted": "one"})


class Padded(Statistic):
    """A statistic that looks at padding."""

    name: Literal["padded"] = "padded"

    def observe(self, history, x, valid):
        history.grow(x.shape[1])

    def measure(self, x, valid, mean):
        return x.float().square().mean(0)


def variant(base: type[Component], doc: str | None = "Broken.", annotations: dict | None = None, **body: Any):
    """A subclass of ``base`` with another body."""
    body = {"__annotations__": annotations or {}, "__module__": __name__, "__doc__": doc, **body}
    return type(f"Broken{base.__name__}", (base,), body)


def in_place(self, prepared, statistic):
    return statistic.mul_(prepared)


def drawing(self, states, valid, generator):
    return torch.randperm(states.shape[0])[:1], torch.arange(states.shape[1])


def refusing(self, sites, ratio):
    if ratio:
        raise SpecError("out of reach")
    return [scores.site.units for scores in sites]


class Unwritten(Good):
    """An option of it is left out when it is written."""

    size: int = Field(default=1, exclude=True)


DEVICE = {"device": torch.device("cpu"), "model_config": ConfigDict(arbitrary_types_allowed=True)}

BROKEN = [
    (variant(Good, annotations={"name": str}, name="good"), "must declare its name"),
    (variant(Good, doc=None), "no docstring"),
    (variant(Good, annotations={"name": Literal["good"], "size": int}, size=Field(...)), "size has no default"),
    (variant(Good, model_config=ConfigDict(frozen=False)), "can be changed after it is made"),
    (variant(Good, annotations={"sizes": Any}, sizes=[1]), "is not hashable"),
    (variant(Good, annotations={"sizes": list[int]}, sizes=[1]), "sizes: list[int]; use tuple[...]"),
    (variant(Good, annotations={"sizes": tuple[dict, ...] | None}, sizes=None), "cannot be hashed, sizes"),
    (variant(PP, annotations={"scorer": Unwritten}, scorer=Unwritten(size=2)), "Unwritten does not write its options"),
    (variant(PP, write_scorer=field_serializer("scorer")(lambda self, part: part.name)), "PPsp does not write its"),
    (variant(Good, annotations={"device": torch.device}, **DEVICE), "cannot be written to JSON"),
    (variant(Good, model_config=ConfigDict(extra="ignore")), "options it does not have"),
    (variant(Good, annotations={"sizes": Any}, sizes=(1, 2)), "from what it writes"),
    (variant(Good, prepare=lambda self, w: w.sum(0)), "a Scorer must have def prepare(self, weight, site)"),
    (variant(Merge, merge=lambda self, probe, h: probe), "must have def merge(self, probe, history, site)"),
    (
        variant(PP, annotations={"merger": Any}, merger=variant(Merge, merge=lambda self, p, h: p)()),
        "merge(self, probe",
    ),
    (
        variant(Good, prepare=lambda self, w, _: w, score=lambda self, w, s: w.abs().amax(0) * s),
        "as large as the weight",
    ),
    (variant(Good, score=lambda self, prepared, statistic: (prepared * statistic).double()), "found float64 (24,)"),
    (variant(Good, score=lambda self, prepared, statistic: (prepared * statistic)[:5]), "found float32 (5,)"),
    (variant(Good, score=lambda self, prepared, statistic: prepared / statistic), "NaN or infinity"),
    (variant(Good, score=lambda self, prepared, statistic: torch.rand(24)), "scores the same input differently"),
    (variant(Good, score=in_place), "changes the statistic"),
    (variant(Good, unit_scores=lambda self, scores, size: scores.mean()), "unit scores as float32 (6,)"),
    (variant(Good, statistic=Padded(), annotations={"statistic": ClassVar[Statistic]}), "looks at padded tokens"),
    (variant(Select, select=lambda self, s, v, g: (torch.tensor([0]), torch.tensor([1, 0]))), "positions"),
    (variant(Select, select=lambda self, s, v, g: (torch.tensor([0]), torch.tensor([0, 0]))), "ascending, unique"),
    (variant(Select, select=lambda self, s, v, g: (torch.arange(s.shape[0]) + 1, torch.tensor([0]))), "picks rows [1]"),
    (variant(Select, select=lambda self, s, v, g: (torch.tensor([0]), torch.tensor([0]).int())), "found int32"),
    (variant(Select, select=lambda self, s, v, g: (torch.tensor([0]), torch.tensor([]).long())), "picks positions []"),
    (variant(Select, select=lambda self, s, v, g: torch.tensor([0])), "must return (rows, positions)"),
    (variant(Select, select=drawing), "differently with the same generator"),
    (variant(Merge, merge=lambda self, probe, history, site: probe.sum(0)), "merged statistic as float32 (5, 24)"),
    (variant(Merge, merge=lambda self, probe, history, site: probe / history), "NaN or infinity"),
    (variant(Merge, merge=lambda self, probe, history, site: probe - history), "something negative"),
    (variant(Merge, merge=lambda self, probe, history, site: probe.add_(history)), "changes the probe"),
    (variant(Merge, update=lambda self, history, observed: observed), "property updates is false"),
    (variant(Merge, updates=property(lambda self: True), update=lambda self, h, o: h), "leaves history as it was"),
    (variant(Slice, consumer=lambda self, weight, columns: weight), "consumer's weight as float32 (20, 5)"),
    (variant(Slice, consumer=lambda self, weight, columns: weight[:, columns.flip(0)]), "something else than"),
    (variant(Allocate, allocate=lambda self, sites, ratio: [1]), "gives 1 counts for 4 sites"),
    (variant(Allocate, allocate=lambda self, sites, ratio: [s.site.units + 1 for s in sites]), "keeps 7 of 6 units"),
    (variant(Allocate, allocate=lambda self, sites, ratio: [s.site.units * 0.5 for s in sites]), "keeps 3.0 of 6"),
    (variant(Allocate, allocate=lambda self, sites, ratio: [1 for s in sites]), "where nothing is to be cut"),
    (
        variant(Allocate, allocate=lambda self, sites, r: [int(s.site.units * (r if r else 1)) for s in sites]),
        "keeps more at ratio 0.2",
    ),
    (variant(Allocate, allocate=refusing), "refuses ratio 0.1"),
    (variant(PP, annotations={"scorer": Scorer}, scorer=variant(Good, doc=None)()), "BrokenGood has no docstring"),
]


@pytest.mark.parametrize("component", [Good, Select, Merge, Allocate, Measure, PPsp, PP])
def test_what_keeps_the_rules_passes(component):
    check_component(component)


@pytest.mark.parametrize(("component", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_broken_rule_is_named(component, words):
    with pytest.raises((AssertionError, ValueError)) as caught:
        check_component(component)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sites: sites[::-1], "attention before MLP"),
        (lambda sites: [replace(sites[0], outputs=1), *sites[1:]], "the site says (1, 128)"),
        (lambda sites: [replace(sites[0], unit_parameters=1), *sites[1:]], "the site says 1"),
        (
            lambda sites: [replace(sites[0], producers=(Producer("lm_head", (Rows(0, 1),)),)), *sites[1:]],
            "not all once",
        ),
        (
            lambda sites: [replace(sites[0], shape_attributes=(ShapeAttribute("lm_head", "in_features"),)), *sites[1:]],
            "not 4",
        ),
    ],
)
def test_sites_that_do_not_fit_are_named(make_model, change, words):
    class Wrong(Llama):
        """Wrong somewhere."""

        def sites(self, model, attention_unit):
            return change(super().sites(model, attention_unit))

    with pytest.raises(AssertionError) as caught:
        check_sites(Wrong(), make_model("llama-gqa"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (lambda self, subject: 3.0, "returned float, expected a Measurement"),
        (lambda self, subject: Measurement({"one": 1}, {}), "the protocol behind them"),
        (lambda self, subject: Measurement({"one": "1"}, {"a": 1}), "value one is '1' (str); return a number or None"),
        (lambda self, subject: Measurement({"one": float("nan")}, {"a": 1}), "which is not finite"),
        (lambda self, subject: Measurement({"one": 1}, {"a": torch.float32}), "JSON cannot hold"),
        (
            lambda self, subject: subject.model.train() and Measurement({"one": 1}, {"a": 1}),
            "leaves the model in training mode",
        ),
    ],
)
def test_evaluations_that_break_a_rule_are_named(make_model, evaluate, words):
    subject = PlainSubject(make_model("llama-gqa"))
    check_evaluation(Measure(), subject)
    with pytest.raises(AssertionError) as caught:
        check_evaluation(variant(Measure, evaluate=evaluate)(), subject)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (RuntimeError("no luck"), "raises RuntimeError: no luck"),
        (SpecError("no luck"), "no luck"),
        (3.0, "returned float, expected a Measurement"),
        (Measurement({"one": 1}, {"a": 1}), "leaves a hook at model.norm"),
    ],
)
def test_an_evaluation_leaves_the_model_as_it_was_however_it_ends(make_model, found, words):
    def evaluate(self, subject):
        subject.model.train().model.norm.register_forward_hook(lambda *call: None)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        if isinstance(found, Exception):
            raise found
        return found

    subject, before = PlainSubject(make_model("llama-gqa")), (torch.get_default_dtype(), torch.is_grad_enabled())
    try:
        with pytest.raises((AssertionError, SpecError), match=words):
            check_evaluation(variant(Measure, evaluate=evaluate)(), subject)
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
        assert not any(each.training for each in subject.model.modules())
        assert not subject.model.model.norm._forward_hooks
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])


class Unsettled(Good):
    """Sets another default dtype, and raises."""

    name: Literal["unsettled"] = "unsettled"

    def prepare(self, weight, site):
        raise unsettled()


class UnsettledFormat(ExportFormat):
    """Sets another default dtype, and raises."""

    name: Literal["unsettled"] = "unsettled"

    def write(self, model, tokenizer, folder):
        raise unsettled()


class UnsettledFit(FittedScorer):
    """Sets another default dtype, and fits nothing."""

    name: Literal["unsettled"] = "unsettled"

    def fit(self, model, sites, batches):
        unsettled()
        return []

    def score(self, weight, statistic, site, prepared):
        return weight.sum(0)


def unsettled():
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return RuntimeError("no luck")


@pytest.mark.parametrize(
    "fails",
    [
        lambda: check_component(Unsettled),
        lambda: check_export(UnsettledFormat()),
        lambda: check_fit_returns_model(UnsettledFit()),
    ],
)
def test_a_check_that_fails_puts_torchs_settings_back(fails):
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with pytest.raises((AssertionError, RuntimeError), match=r"no luck|must return a list of 4 tensors from fit"):
            fails()
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])


def test_rows_that_are_longer_than_stated_are_named(make_model):
    long = Measurement({"one": 1}, {"a": 1})

    def evaluate(self, subject):
        subject.model(input_ids=torch.ones(1, 9, dtype=torch.int64))
        return long

    stated = variant(Measure, evaluate=evaluate, longest_row=lambda self, context: 8)
    with pytest.raises(AssertionError, match="runs rows of 9 tokens, and its longest_row is 8"):
        check_evaluation(stated(), PlainSubject(make_model("llama-gqa")))
    with pytest.raises(AssertionError, match="has row_option 'lenght', which is none of its options"):
        check_component(variant(Measure, row_option="lenght"))
    with pytest.raises(AssertionError, match="has a longest row of 8 tokens on a model of 1 positions"):
        check_component(stated)
