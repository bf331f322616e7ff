"""Overlap of kept units: with full-batch probing, from batch to batch, and what chance would give."""

import json
import math
from itertools import combinations

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring, SameCounts
from prunekit.evaluators.overlap import Overlap, jaccard, random_overlap
from prunekit.registry import Catalog, DataError, PlainSubject
from prunekit.registry.checks import check_component, check_evaluation


class Codes:
    bos_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [3 + ord(character) % 90 for character in text]}


TEXT = "".join(chr(33 + int(i)) for i in torch.randint(90, (900,), generator=torch.Generator().manual_seed(2)))
SMALL = Overlap(batch_size=4, length=24, batches=3)
UNITS = {"attention": 4, "mlp": 192}
CATALOG = Catalog.discover(block="")


@pytest.fixture
def measured(make_model, batches):
    def make(use, family="llama-gqa", evaluator=SMALL, ratio=0.5, **options):
        model = make_model(family)
        with prune(model, use, ratio=ratio, calibration=batches, catalog=CATALOG, **options) as pruned:
            measuring = Measuring(Loaded(model, Codes(), {}), pruned, lambda items, *_: items, {})
            subject = measuring
            subject.read = lambda source: [TEXT]
            return evaluator.evaluate(subject), pruned.counts

    return make


def batches_of(rows=4, length=24, batches=3):
    ids = torch.tensor(Codes()(TEXT)["input_ids"][: rows * length * batches])
    return ids.view(batches, rows, length)


def decisions(make_model, calibration, use, **options):
    """Kept units by place, of every batch, from the decisions' own trace."""
    model, found = make_model("llama-gqa"), []
    with prune(model, use, calibration=calibration, trace=True, catalog=CATALOG, **options) as pruned:
        for ids in batches_of():
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        places = {(record["layer"], record["kind"]) for record in pruned.trace}
        for place in places:
            kept = [set(r["kept"]) for r in pruned.trace if (r["layer"], r["kind"]) == place]
            found.append((place, kept))
    return dict(found)


def test_it_is_a_sound_plugin(make_model):
    assert CATALOG.get("evaluators", "overlap") is Overlap
    check_component(Overlap)
    bare = PlainSubject(make_model("llama-gqa"), Codes(), [TEXT])
    check_evaluation(SMALL, bare)
    assert SMALL.evaluate(bare).values == {"full_batch": None, "between_batches": None, "chance": None}


def test_jaccard_of_known_sets():
    assert jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})) == 2 / 5
    assert jaccard(frozenset({1}), frozenset({2})) == 0
    assert jaccard(frozenset(), frozenset()) == 1


@pytest.mark.parametrize(("units", "kept"), [(4, 2), (5, 4), (6, 3), (7, 1), (3, 3)])
def test_chance_is_the_mean_over_all_pairs_of_sets(units, kept):
    sets = [frozenset(chosen) for chosen in combinations(range(units), kept)]
    mean = sum(jaccard(a, b) for a in sets for b in sets) / len(sets) ** 2
    assert random_overlap(units, kept) == pytest.approx(mean, rel=1e-12)


def test_chance_of_large_sites():
    assert random_overlap(11008, 6605) == pytest.approx(6605 / (2 * 11008 - 6605), rel=1e-4)
    assert math.isfinite(random_overlap(200_000, 1))


def test_values_are_those_of_the_decisions(measured, make_model, batches):
    found, counts = measured("pp")
    own = decisions(make_model, batches, "pp", ratio=0.5)
    full = decisions(make_model, batches, "full_batch_probing", ratio=0.5, merger="probe_only")
    for (layer, kind), kept in own.items():
        pairs = list(combinations(kept, 2))
        between = sum(len(a & b) / len(a | b) for a, b in pairs) / 3
        with_full = sum(len(a & b) / len(a | b) for a, b in zip(kept, full[layer, kind], strict=True)) / 3
        assert found.details["between_batches"][kind][layer] == pytest.approx(between)
        assert found.details["full_batch"][kind][layer] == pytest.approx(with_full)
        assert found.details["chance"][kind][layer] == random_overlap(UNITS[kind], counts[layer, kind])
    for name, by_kind in found.details.items():
        values = [value for layers in by_kind.values() for value in layers]
        assert found.values[name] == pytest.approx(sum(values) / 6)
    assert found.values["chance"] < found.values["full_batch"] < 1
    assert found.values["chance"] < found.values["between_batches"] < 1
    assert not found.notes and json.loads(json.dumps(found.details)) == found.details


def test_full_batch_probing_agrees_with_itself(measured):
    found, _ = measured("full_batch_probing", merger="probe_only")
    assert found.values["full_batch"] == 1 and found.values["between_batches"] < 1


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize(
    ("use", "options"),
    [("wanda_sp", {}), ("flap", {}), ("pp", {"attention_unit": "query_head"})],
    ids=["wanda_sp", "flap", "pp heads"],
)
def test_strategies_and_families(measured, family, use, options):
    found, counts = measured(use, family, **options)
    assert found.values["between_batches"] == 1 if use != "pp" else found.values["between_batches"] < 1
    assert 0.2 < found.values["full_batch"] < 1
    assert [place for place, count in counts.items() if count == 4 and use == "flap"] == [
        (layer, "attention") for layer in range(3) if found.details["full_batch"]["attention"][layer] is None
    ]
    assert found.protocol["sites"] == 6 - found.details["full_batch"]["attention"].count(None)
    if use == "flap":
        assert found.details["chance"]["mlp"] == [random_overlap(192, counts[layer, "mlp"]) for layer in range(3)]
        assert len(set(counts.values())) > 2  # each layer keeps its own number
    if options:
        assert found.details["chance"]["attention"] == [random_overlap(8, 4)] * 3


def test_sites_without_a_choice_are_left_out(measured):
    found, _ = measured("pp", skip_layers=(1,), ratio=0.3)
    for by_kind in found.details.values():
        assert all(layers[1] is None for layers in by_kind.values())
        assert all(layers[0] is not None for layers in by_kind.values())
    assert found.protocol["sites"] == 4
    values = [value for layers in found.details["full_batch"].values() for value in layers if value is not None]
    assert found.values["full_batch"] == pytest.approx(sum(values) / 4)
    nothing, _ = measured("pp", ratio=0.0)
    assert set(nothing.values.values()) == {None} and "no choice" in nothing.notes[0]
    assert nothing.details["full_batch"] == {"attention": [None] * 3, "mlp": [None] * 3}
    counts = tuple((layer, kind, (0, units // 2, units)[layer]) for layer in range(3) for kind, units in UNITS.items())
    bare, _ = measured("wanda_sp", ratio=None, allocator=SameCounts(counts=counts))
    assert [value is None for value in bare.details["full_batch"]["mlp"]] == [True, False, True]
    assert [value is None for value in bare.details["between_batches"]["attention"]] == [True, False, True]


def test_one_batch_has_no_other(measured):
    found, _ = measured("pp", evaluator=Overlap(batch_size=4, length=24, batches=1))
    assert found.values["between_batches"] is None and found.values["full_batch"] < 1
    assert found.details["between_batches"] == {"attention": [None] * 3, "mlp": [None] * 3}
    assert "set batches to 2 or more" in found.notes[0]


def test_too_short_a_text_is_named(measured):
    with pytest.raises(DataError, match=r"900 tokens, and 40 batches of 4 x 24 take 3840; lower batches"):
        measured("pp", evaluator=Overlap(batch_size=4, length=24, batches=40))
