"""Scorers that fit something with the model: what they get, what they give, and the model as before afterwards."""

import copy
from typing import ClassVar, Literal

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.compress.export.dynamic_state import restore, save_state
from prunekit.compress.pruning.checking import randomise
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog, DataError, FittedScorer, MeanSquare, NonFiniteError, PluginError, linear_at
from prunekit.registry.checks import check_component
from prunekit.registry.checks.toy import toy_batches
from prunekit.strategies.pp.scorer import PPsp
from prunekit.strategies.wanda_sp import WandaSp
from torch.nn.functional import cross_entropy

CATALOG = Catalog.discover(block="")
TEXT = toy_batches()


def tiny():
    """A Llama of two layers with grouped-query attention, all weights random."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return randomise(transformers.LlamaForCausalLM(config).eval())


MODEL = tiny()


def loss_of(model, batch):
    """The sum of the losses of the next tokens except at padding."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    targets = batch["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class Gates(FittedScorer):
    """The gradient of a gate at every channel that enters a consumer."""

    name: Literal["gates"] = "gates"
    factor: float = 1.0
    losses: ClassVar[list] = []

    def fit(self, model, sites, batches):
        self.losses.clear()
        assert torch.is_grad_enabled() and not any(p.requires_grad for p in model.parameters()) and not model.training
        assert {type(linear_at(model, site.consumer)) for site in sites} == {torch.nn.Linear}  # the plain model
        gates = [torch.ones(site.channels, requires_grad=True) for site in sites]
        hooks = [
            linear_at(model, site.consumer).register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate,))
            for site, gate in zip(sites, gates, strict=True)
        ]
        for batch in batches:
            loss = loss_of(model, batch)
            loss.backward()
            self.losses.append(loss.item())
        for hook in hooks:
            hook.remove()
        return [self.factor * gate.grad.abs() for gate in gates]


def pruned_by(scorer, use="wanda_sp", **options):
    options = dict(ratio=0.5, calibration=TEXT, catalog=CATALOG, scorer=scorer) | options
    return prune(MODEL, use, **options)


def test_what_is_fitted_decides():
    """A gate at a channel has the gradient of the sum over its column of weight times gradient."""
    model = copy.deepcopy(MODEL).requires_grad_(True)
    sum(loss_of(model, batch) for batch in TEXT).backward()
    with pruned_by(Gates()) as pruned:
        for cut in pruned.cuts:
            weight = model.get_submodule(cut.site.consumer).weight
            channels = (weight * weight.grad).sum(0).abs()
            units = channels.view(cut.site.units, -1).sum(1)
            torch.testing.assert_close(pruned.calibrated_scores(cut).units, units, rtol=1e-3, atol=1e-5)
            expected = units.topk(cut.site.units // 2).indices.sort().values
            assert pruned.sites_kept[cut.site.layer, cut.site.kind] == tuple(expected.tolist())


class OfUnits(FittedScorer):
    """Numbers of the units, drawn at random, in one tensor for each site."""

    name: Literal["of_units"] = "of_units"

    def fit(self, model, sites, batches):
        return [torch.rand(site.units) for site in sites]


def test_scores_of_units_stay_what_they_are_and_random_numbers_repeat():
    torch.manual_seed(0)
    expected = None
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with pruned_by(OfUnits()) as pruned:
            assert torch.equal(torch.get_rng_state(), before)
            found = [pruned.calibrated_scores(cut).units for cut in pruned.cuts]
        expected = expected or found
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    torch.manual_seed(0)
    torch.testing.assert_close(found, [torch.rand(cut.site.units) for cut in pruned.cuts])


class Careless(Gates):
    """Leaves flags, gradients, modes and the gradient mode otherwise; maybe breaks what must stay."""

    name: Literal["careless"] = "careless"
    breaks: str = ""

    def fit(self, model, sites, batches):
        found = super().fit(model, sites, batches)
        model.requires_grad_(True).train()
        loss_of(model, batches[0]).backward()
        torch.set_grad_enabled(False)
        torch.manual_seed(5)
        weight = model.model.norm.weight
        if self.breaks == "weight":
            weight.mul_(2)
        elif self.breaks == "data":
            weight.data.mul_(2)
        elif self.breaks == "parameter":
            model.model.norm.weight = torch.nn.Parameter(weight.detach().clone())
        elif self.breaks == "buffer":
            model.model.counts.add_(1)
        elif self.breaks == "hook":
            model.model.norm.register_forward_hook(lambda *call: None)
        elif self.breaks == "forward":
            model.model.norm.forward = model.model.norm.forward
        elif self.breaks == "raises":
            raise RuntimeError("no luck")
        elif self.breaks == "interrupted":
            model.model.norm.register_forward_hook(lambda *call: None)
            raise KeyboardInterrupt
        elif self.breaks == "few":
            return found[1:]
        elif self.breaks == "none":
            return None
        elif self.breaks == "nan":
            return [tensor * float("nan") for tensor in found]
        return found


def state_of(model):
    return (
        {name: (tensor.clone(), id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())},
        [(each.training, type(each), vars(each).get("forward"), len(each._forward_hooks)) for each in model.modules()],
        [(each.requires_grad, each.grad) for each in model.parameters()],
        (torch.is_grad_enabled(), torch.get_rng_state().tolist()),
    )


def same(one, other):
    tensors = all(
        torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(one[0].values(), other[0].values(), strict=True)
    )
    return tensors and one[0].keys() == other[0].keys() and one[1:] == other[1:]


@pytest.mark.parametrize("breaks", ["", "raises", "interrupted", "few", "none", "nan"])
def test_the_model_is_as_before(breaks):
    MODEL.requires_grad_(False).model.layers[1].train()
    MODEL.lm_head.requires_grad_(True)
    before = state_of(MODEL)
    words = {
        "raises": (PluginError, r"scorer 'careless' of plugin tests raised RuntimeError: no luck"),
        "interrupted": (KeyboardInterrupt, None),
        "few": (PluginError, r"careless.*fit returned 3 parts; it must return a list of 4 tensors"),
        "none": (PluginError, r"careless.*fit returned a NoneType; it must return"),
        "nan": (NonFiniteError, r"layer 0 attention: scorer careless has fitted NaN or infinity"),
    }
    try:
        if breaks:
            error, message = words[breaks]
            with pytest.raises(error, match=message):
                pruned_by(Careless(breaks=breaks))
        else:
            pruned_by(Careless()).remove()
        assert same(state_of(MODEL), before)
    finally:
        MODEL.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ("weight", "has written to model.norm.weight"),
        ("data", "has written to model.norm.weight"),
        ("parameter", "has written to model.norm.weight"),
        ("buffer", "has written to model.counts"),
        ("hook", "leaves a hook at model.norm"),
        ("forward", "leaves another forward at model.norm"),
    ],
)
def test_what_breaks_the_model_is_named(breaks, words):
    model = copy.deepcopy(MODEL)
    model.model.register_buffer("counts", torch.zeros(1))
    with pytest.raises(PluginError) as caught:
        prune(model, "wanda_sp", ratio=0.5, calibration=TEXT, catalog=CATALOG, scorer=Careless(breaks=breaks))
    assert f"scorer 'careless' of plugin tests: its fit {words}; the model must be left as it was" in str(caught.value)
    assert not model.model.norm._forward_hooks and not model.lm_head.weight.requires_grad


@pytest.fixture
def counted(monkeypatch):
    """The number of fits so far."""
    calls, fit = [], Gates.fit

    def count(self, *given):
        calls.append(self)
        return fit(self, *given)

    monkeypatch.setattr(Gates, "fit", count)
    return calls


@pytest.mark.parametrize("kind", ["shared", "file"])
def test_a_study_and_a_file_fit_once(counted, tmp_path, kind):
    shared, kept = SharedStatistics(), []

    def run(scorer, **options):
        before = len(counted)
        where = shared if kind == "shared" else tmp_path / "statistics"
        with pruned_by(scorer, statistics=where, **options) as pruned:
            kept.append(pruned.sites_kept)
        return len(counted) - before

    assert [run(Gates()), run(Gates(), ratio=0.3), run(Gates(), compensate="mean")] == [1, 0, 0]
    assert kept[0] == kept[2] != kept[1]
    assert [run(Gates(factor=2.0)), *(run(Gates(), skip_layers=[0], ratio=0.2) for _ in "ab")] == [1, 1, 0]
    if kind == "shared":
        assert run(Gates(), calibration=TEXT[:1]) == 1
    else:
        with pytest.raises(DataError, match="other calibration text"):
            run(Gates(), calibration=TEXT[:1])
    assert run(Gates(), allocator="lowest_influence") == 0  # whole blocks need no scores


class Weighted(FittedScorer):
    """PPsp's score, weighted by what was fitted."""

    statistic: ClassVar[MeanSquare] = MeanSquare()
    name: Literal["weighted"] = "weighted"

    def fit(self, model, sites, batches):
        return [linear_at(model, site.consumer).weight.square().sum(0) for site in sites]

    def prepare(self, weight, site, fitted=None):
        return fitted * PPsp().prepare(weight, site)

    def score(self, prepared, statistic):
        return PPsp().score(prepared, statistic)

    def unit_scores(self, scores, unit_size):
        return PPsp().unit_scores(scores, unit_size)


class Outside(PPsp):
    """The same without a fit."""

    name: Literal["outside"] = "outside"

    def prepare(self, weight, site):
        return weight.square().sum(0) * super().prepare(weight, site)


def test_a_strategy_that_decides_per_batch_and_its_export(tmp_path):
    """What was fitted weights every decision, also after loading again."""
    batch = TEXT[1]
    with pruned_by(Outside(), "pp"):
        expected = MODEL(**batch).logits
    with pruned_by(PPsp(), "pp"):
        assert not torch.equal(MODEL(**batch).logits, expected)
    with pruned_by(Weighted(), "pp") as pruned:
        assert torch.equal(MODEL(**batch).logits, expected)
        save_state(pruned, tmp_path)
        strategy, runtime = pruned.strategy, pruned._engine.shared.runtime
    with restore(MODEL, strategy, CATALOG, tmp_path, runtime):
        assert torch.equal(MODEL(**batch).logits, expected)


class Twice(WandaSp):
    """Half of the ratio, then the rest."""

    name: Literal["twice"] = "twice"

    def schedule(self, ratio):
        return [ratio / 2, ratio]


def test_in_steps_it_is_fitted_again_with_zeroes(counted):
    def losses(strategy, ratio):
        with pruned_by(Gates(), strategy, ratio=ratio) as pruned:
            return list(Gates.losses), pruned.sites_kept

    dense, kept = losses("wanda_sp", 0.25)
    found, _ = losses(Twice(), 0.5)
    assert len(counted) == 3
    model = copy.deepcopy(MODEL)
    for site in find_sites(model, CATALOG, "kv_group")[1]:
        gone = [unit for unit in range(site.units) if unit not in kept[site.layer, site.kind]]
        assert gone or site.kind == "attention"
        model.get_submodule(site.consumer).weight.data[:, site.columns(torch.tensor(gone, dtype=torch.int64))] = 0
    with torch.no_grad():
        expected = [loss_of(model, batch).item() for batch in TEXT]
    assert found == pytest.approx(expected, rel=1e-5) and found != pytest.approx(dense, rel=1e-3)


def test_it_needs_text():
    with pytest.raises(DataError, match="strategy wanda_sp fits something with the model: give it calibration"):
        pruned_by(Gates(), calibration=None)


# Checks.


class Named(Gates):
    """One of several broken ones."""

    name: Literal["named"] = "named"
    breaks: str = ""

    def fit(self, model, sites, batches):
        found = super().fit(model, sites, batches)
        if self.breaks == "short":
            return found[1:]
        if self.breaks == "not a list":
            return dict(zip(sites, found, strict=True))
        if self.breaks == "draws":
            return [tensor + torch.rand(1, generator=torch.Generator().manual_seed(id(tensor))) for tensor in found]
        if self.breaks == "infinite":
            return [tensor / 0 for tensor in found]
        if self.breaks == "data":
            model.lm_head.weight.data.add_(1)
        if self.breaks == "hook":
            model.lm_head.register_forward_hook(lambda *call: None)
        if self.breaks == "text":
            batches[0]["input_ids"].fill_(3)
        if self.breaks == "order":
            return [tensor * torch.arange(len(tensor)) for tensor in found]
        if self.breaks == "sites":
            return [*found[2:], *found[:2]]
        return found

    def prepare(self, weight, site, fitted=None):
        return fitted[1:] if self.breaks == "shape" else super().prepare(weight, site, fitted)


class Forgetful(Gates):
    """Takes no argument for what was fitted."""

    name: Literal["forgetful"] = "forgetful"

    def prepare(self, weight, site):
        return weight.abs().sum(0)


@pytest.mark.parametrize("component", [Gates(), OfUnits, Weighted, Named()], ids=repr)
def test_good_ones_pass(component):
    if component is OfUnits:
        with pytest.raises(AssertionError, match="OfUnits fits by the number of a unit"):
            check_component(component)
    else:
        check_component(component() if isinstance(component, type) else component)


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ("short", "must return a list of 4 tensors from fit"),
        ("not a list", "must return a list of 4 tensors from fit"),
        ("draws", "fits something else the second time"),
        ("infinite", "returns channel scores with NaN or infinity"),
        ("data", "changes lm_head.weight in fit"),
        ("hook", "leaves a hook at lm_head in fit"),
        ("text", "changes the text it is given"),
        ("order", "fits by the number of a unit, or for another site: where units of layer 0 attention"),
        ("sites", "fits by the number of a unit, or for another site"),
        ("shape", "must return channel scores as float32 (24,), found float32 (23,)"),
    ],
)
def test_broken_ones_are_caught(breaks, words):
    with pytest.raises(AssertionError) as caught:
        check_component(Named(breaks=breaks))
    assert f"Named {words}" in str(caught.value)


def test_the_argument_is_asked_for():
    with pytest.raises(AssertionError, match=r"Forgetful.prepare takes \(self, weight, site\); a FittedScorer must"):
        check_component(Forgetful())
