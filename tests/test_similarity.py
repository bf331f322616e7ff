"""CKA and SVCCA against their textbook forms, and what the evaluator makes of pruned models."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators import similarity as module
from prunekit.evaluators.similarity import Pair, Similarity, linear_cka, svcca
from prunekit.registry import Catalog, DataError, NonFiniteError, PlainSubject
from prunekit.registry.checks import check_component, check_evaluation


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(x, y, pieces=1):
    pair = Pair()
    for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        pair.add(a, b)
    return pair.products()


def related():
    """300 tokens of 8 and 11 dimensions, far from the origin, with something in common."""
    common = draw(300, 5)
    x = common @ draw(5, 8, seed=1) + 0.5 * draw(300, 8, seed=2) + 40
    return x, common @ draw(5, 11, seed=3) + 0.7 * draw(300, 11, seed=4) - 7


def gram_cka(x, y):
    """HSIC of the centred Gram matrices, as in Kornblith et al."""
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, m = (centre @ (side @ side.T) @ centre for side in (x, y))
    return ((k * m).sum() / (k.square().sum() * m.square().sum()).sqrt()).item()


def direct_svcca(x, y, variance):
    """Singular vectors of the centred data, then canonical correlations by QR."""
    bases = []
    for side in (x, y):
        u, s, _ = torch.linalg.svd(side - side.mean(0), full_matrices=False)
        count = 1 + int((s.square().cumsum(0) < variance * s.square().sum()).sum())
        bases.append(torch.linalg.qr((u * s)[:, :count]).Q)
    return torch.linalg.svdvals(bases[0].T @ bases[1]).mean().item(), tuple(basis.shape[1] for basis in bases)


@pytest.mark.parametrize("pieces", [1, 7])
def test_against_the_textbook(pieces):
    x, y = related()
    products = compare(x, y, pieces)
    assert linear_cka(products) == pytest.approx(gram_cka(x, y), rel=1e-10)
    for variance in (0.6, 0.9, 0.99):
        value, directions = direct_svcca(x, y, variance)
        found = svcca(products, variance)
        assert found.directions == directions and found.value == pytest.approx(value, rel=1e-9)
    assert svcca(products, 1).directions == (8, 11)
    assert 0.3 < linear_cka(products) < 0.95
    torch.testing.assert_close(products.xx / 299, torch.cov(x.T), rtol=1e-10, atol=1e-10)


def test_the_same_is_one():
    x, _ = related()
    products = compare(x, x)
    assert linear_cka(products) == pytest.approx(1, abs=1e-12)
    assert svcca(products, 0.99).value == pytest.approx(1, abs=1e-12)


def test_what_each_is_blind_to():
    x, y = related()
    rotation = torch.linalg.qr(draw(8, 8, seed=5)).Q
    turned, mixed = 3 * x @ rotation + 2, x @ (draw(8, 8, seed=6) + 3 * torch.eye(8)) - 5
    cka = linear_cka(compare(x, y))
    assert linear_cka(compare(turned, y)) == pytest.approx(cka, rel=1e-10)
    assert abs(linear_cka(compare(mixed, y)) - cka) > 0.01
    for variance in (0.9, 1):
        value = svcca(compare(x, y), variance).value
        assert svcca(compare(turned, y), variance).value == pytest.approx(value, rel=1e-9)
    assert svcca(compare(mixed, y), 1).value == pytest.approx(svcca(compare(x, y), 1).value, rel=1e-9)
    assert svcca(compare(mixed, x), 1).value == pytest.approx(1, abs=1e-9)


def test_unrelated_representations_are_unlike():
    products = compare(draw(4000, 10), draw(4000, 12, seed=1))
    assert linear_cka(products) < 0.01
    assert svcca(products, 1).value < 0.1


def test_one_side_that_does_not_vary_has_no_value():
    products = compare(torch.ones(20, 3), draw(20, 4))
    assert linear_cka(products) is None
    assert svcca(products, 0.99) == (None, (0, 4))


class Codes:
    bos_token_id = 1

    def __call__(self, text, **kwargs):
        return {"input_ids": [3 + ord(character) % 90 for character in text]}


TEXT = "".join(chr(33 + int(i)) for i in torch.randint(90, (900,), generator=torch.Generator().manual_seed(2)))
SMALL = Similarity(batch_size=4, length=24, batches=2, variance=0.9)


def measured(model, batches, use, ratio, evaluator=SMALL, **options):
    with prune(model, use, ratio=ratio, calibration=batches, **options) as pruned:
        measuring = Measuring(Loaded(model, Codes(), {}), pruned, lambda items, *_: items, {})
        subject = measuring
        subject.read = lambda source: [TEXT]
        pruned.reset()
        return evaluator.evaluate(subject)


def test_it_is_a_sound_plugin(make_model):
    assert Catalog.discover(block="").get("evaluators", "similarity") is Similarity
    check_component(Similarity)
    bare = PlainSubject(make_model("llama-gqa"), Codes(), [TEXT])
    check_evaluation(SMALL, bare)
    found = SMALL.evaluate(bare)
    assert found.values == pytest.approx({"cka": 1, "svcca": 1}, abs=1e-9)  # dense against dense


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_layers_are_compared_after_each_decoder_layer(make_model, batches, family):
    model = make_model(family)
    found = measured(model, batches, "wanda_sp", 0.5, skip_layers=(0,))
    assert [len(values) for values in found.details.values()] == [3] * 4
    assert found.details["cka"][0] == pytest.approx(1, abs=1e-9) and found.details["cka"][1] < 0.99
    assert found.values["cka"] == pytest.approx(sum(found.details["cka"]) / 3)
    ids = torch.tensor([1, *Codes()(TEXT)["input_ids"]])[: 2 * 4 * 24].view(8, 24)

    def last():
        with torch.no_grad():
            return model.get_decoder()(input_ids=ids).last_hidden_state.double().flatten(0, 1)

    dense = last()
    with prune(model, "wanda_sp", ratio=0.5, calibration=batches, skip_layers=(0,)):
        assert found.details["cka"][-1] == pytest.approx(gram_cka(dense, last()), rel=1e-9)
    assert found.protocol["tokens"] == 192 and found.protocol["batches"] == 2
    json.dumps([found.details, found.protocol], allow_nan=False)


def test_more_is_cut_less_is_alike(make_model, batches):
    model = make_model("llama-gqa")
    values = [measured(model, batches, "pp", ratio).values for ratio in (0.0, 0.25, 0.75)]
    assert values[0] == pytest.approx({"cka": 1, "svcca": 1}, abs=1e-9)
    assert 1 > values[1]["cka"] > values[2]["cka"] and values[1]["svcca"] > values[2]["svcca"]


@pytest.mark.parametrize("together", [1, 2])
def test_passes_over_groups_of_layers_give_the_same(make_model, batches, monkeypatch, together):
    """PP's history moves within a pass: every pass begins where the first did."""
    model = make_model("llama-gqa")
    whole = measured(model, batches, "pp", 0.5)
    monkeypatch.setattr(module, "ROOM", together * 24 * 128**2)
    passes = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    assert measured(model, batches, "pp", 0.5) == whole
    assert len(passes) == len(batches) + math.ceil(3 / together) * 2 * 2  # calibration, then dense and pruned


def test_few_tokens_are_noted(make_model, batches):
    model = make_model("llama-gqa")
    few = measured(model, batches, "pp", 0.5, Similarity(batch_size=2, length=24, batches=1, variance=1))
    assert few.values["svcca"] is None and few.values["cka"] < 1 and few.details["svcca"] == [None] * 3
    (note,) = few.notes
    assert "SVCCA of 3 layers is left out" in note and "48 tokens" in note
    more = measured(model, batches, "pp", 0.5, SMALL)
    most = max(more.details["dense_directions"] + more.details["pruned_directions"])
    assert f"compares up to {most} directions on 192 tokens" in more.notes[0]
    assert f"about {math.sqrt(most / 191):.2f}" in more.notes[0]
    assert not measured(model, batches, "pp", 0.5, SMALL.model_copy(update={"variance": 0.1})).notes


def test_bad_input_is_named(make_model, batches):
    model = make_model("llama-gqa")
    with pytest.raises(DataError, match=r"901 tokens, and 9 batches of 4 x 256 take 9216; lower batches"):
        measured(model, batches, "wanda_sp", 0.5, Similarity(batch_size=4, length=999, batches=9))
    with prune(model, "magnitude", ratio=0.5) as pruned:

        @contextmanager
        def broken_dense():
            with pruned.dense(), torch.no_grad():
                weight = model.model.layers[1].mlp.down_proj.weight
                weight[0, 0] = float("inf")
                yield

        subject = PlainSubject(model, Codes(), [TEXT])
        subject.dense = broken_dense
        with pytest.raises(NonFiniteError, match="the dense model's output of layer 1 has NaN or infinity in batch 0"):
            SMALL.evaluate(subject)
