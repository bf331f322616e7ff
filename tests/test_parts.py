"""What a pass spends, part by part: the parts add up, and a cut model costs its floor and its probe."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators.cost import PARTS, Cost
from prunekit.evaluators.parts import Attribution, module_keys
from prunekit.registry import PlainSubject

B, T = 4, 24


def subject_of(model, pruned):
    return Measuring(Loaded(model, None, {}), pruned, no_progress, {})


@pytest.fixture
def cost(make_model, batches):
    """Values of the cost evaluator on a model pruned by a strategy, in operations per batch."""

    def measure(use, family="llama-gqa", attention="sdpa", ratio=0.5, **options):
        model = make_model(family, attention=attention)
        # Two of three layers are cut by ``ratio``.
        options = {"ratio": ratio * 2 / 3, "skip_layers": [0], "calibration": batches, **options}
        with prune(model, use, **options) as pruned:
            values = Cost(batch_size=B, length=T).evaluate(subject_of(model, pruned)).values
            values["counts"] = dict(pruned.counts)
            rows = [
                pruned.counts[site.layer, site.kind] * segment.per_unit
                for site in pruned.sites
                for producer in site.producers
                for segment in producer.segments
            ]
            # Rows of producers that make the 12 tokens of the probe; they read 128 numbers.
            values["spared"] = 2 * 12 * 128 * sum(rows) if use == "pp" else 0
        whole = (*PARTS, "flops", "floor", "reused", *(f"dense_{part}" for part in (*PARTS, "flops")))
        return {key: round(value * B * T) if key in whole else value for key, value in values.items()}

    return measure


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("use", ["wanda_sp", "flap", "pp"])
def test_a_sliced_model_costs_its_floor_and_its_probe(cost, use, family, unit, attention):
    found = cost(use, family, attention, attention_unit=unit)
    assert found["flops"] == found["floor"] + found["probe"] - found["spared"] and found["compensation"] == 0
    assert found["reused"] == found["spared"] < max(1, found["probe"])
    assert found["flops"] == sum(found[part] for part in PARTS)
    assert found["dense_flops"] == sum(found[f"dense_{part}"] for part in PARTS)
    assert found["floor"] < 0.85 * found["dense_flops"]
    assert (found["probe"] > 0) == (use == "pp") and found["dense_probe"] == found["dense_other"] == 0
    assert found["over_floor"] == pytest.approx(found["flops"] / found["floor"])
    assert found["floor_ratio"] == pytest.approx(found["floor"] / found["dense_flops"])


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_parts_are_what_the_formulas_say(cost, unit):
    found = cost("wanda_sp", attention_unit=unit)
    hidden, size, vocabulary, tokens = 128, 16, 97, B * T
    assert found["dense_head"] == found["head"] == 2 * tokens * hidden * vocabulary
    assert found["dense_mlp"] == 3 * tokens * 6 * hidden * 192
    assert found["dense_attention_projections"] == 3 * tokens * 2 * hidden * size * (8 + 4 + 4 + 8)
    assert found["dense_attention_scores"] == 3 * tokens * 4 * T * 8 * size
    kept, width = found["counts"][1, "attention"], found["counts"][1, "mlp"]
    queries, keys = (2 * kept, kept) if unit == "kv_group" else (kept, 4)
    layers = 2  # layer 0 is left whole
    gone = layers * tokens * 2 * hidden * size * (2 * (8 - queries) + 2 * (4 - keys))
    assert found["dense_attention_projections"] - found["attention_projections"] == gone > 0
    assert found["dense_attention_scores"] - found["attention_scores"] == layers * tokens * 4 * T * (8 - queries) * size
    assert found["dense_mlp"] - found["mlp"] == layers * tokens * 6 * hidden * (192 - width)


def test_a_zeroing_cut_is_far_above_its_floor(cost):
    found = cost("pp", applier="zero")
    assert found["flops"] == found["dense_flops"] + found["probe"] and found["reused"] == 0
    assert found["over_floor"] > 1.3


@pytest.mark.parametrize("compensate", ["mean", "least_squares"])
def test_compensation_does_not_move_the_floor(cost, compensate):
    found, plain = cost("wanda_sp", compensate=compensate), cost("wanda_sp", compensate="none")
    assert found["over_floor"] == 1 and found["floor"] == plain["floor"] == found["flops"]


def test_a_runtime_that_reuses_nothing_costs_the_floor_and_the_whole_probe(cost):
    found = cost("pp", runtime={"reuse_probe": False})
    assert found["flops"] == found["floor"] + found["probe"] and found["reused"] == 0


def test_without_sites_there_is_no_split(make_model):
    model = make_model("llama-gqa")
    values = Cost(batch_size=1, length=8).evaluate(PlainSubject(model)).values
    assert "floor" not in values and "mlp" not in values and values["flops_ratio"] == 1


def test_the_modules_of_a_part(make_model, batches):
    """OPT's MLP is not a module of its own; a query-head cut still counts the key and value projections."""
    for family, unit in (("opt", "kv_group"), ("llama-gqa", "query_head")):
        model = make_model(family)
        with prune(model, "magnitude", ratio=0.5, attention_unit=unit) as pruned:
            keys = module_keys(subject_of(model, pruned))
        names = {name.split("layers.1.")[-1]: keys[m] for name, m in model.named_modules() if m in keys}
        wanted = {"self_attn": "attention_scores", "lm_head": "head"}
        wanted |= {f"self_attn.{name}": "attention_projections" for name in ("q_proj", "k_proj", "v_proj")}
        wanted |= dict.fromkeys(("fc1", "fc2", "activation_fn") if family == "opt" else ("mlp", "mlp.up_proj"), "mlp")
        assert {name: names[name] for name in wanted} == {
            name: (part, None if part == "head" else 1) for name, part in wanted.items()
        }


def test_hooks_are_taken_off_again_after_an_error(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.5, calibration=batches) as pruned:
        hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
        broken = subject_of(model, pruned)
        ids = torch.full((B, T), 3)
        Cost(batch_size=B, length=T).evaluate(broken)
        handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Cost(batch_size=B, length=T).evaluate(broken)
        handle.remove()
        assert hooks == {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
        assert model(ids).logits.isfinite().all()


# The attribution


class Meter:
    """A reading that rises when something is spent."""

    def __init__(self):
        self.value = 0

    def __call__(self):
        return self.value


def test_inner_parts_are_not_charged_to_outer_ones():
    meter = Meter()
    attribution = Attribution(meter)
    meter.value += 1
    attribution.enter(("attention_scores", 0))
    meter.value += 10
    attribution.enter(("attention_projections", 0))
    meter.value += 100
    with attribution.step("gather"):
        meter.value += 1000
    meter.value += 200
    attribution.leave()
    meter.value += 20
    attribution.leave()
    meter.value += 2
    attribution.update()
    assert attribution.spent == {
        ("other", None): 3,
        ("attention_scores", 0): 30,
        ("attention_projections", 0): 300,
        ("gather", None): 1000,
    }


def test_what_is_held_keeps_everything_within_it():
    meter = Meter()
    attribution = Attribution(meter)
    with attribution.step("probe"):
        attribution.enter(("mlp", 0))
        meter.value += 5
        with attribution.step("gather"):
            meter.value += 7
        attribution.leave()
    meter.value += 1
    attribution.update()
    assert attribution.spent == {("other", None): 1, ("probe", None): 12}
    with pytest.raises(ZeroDivisionError):
        with attribution.step("probe"):
            meter.value += 1 / 0
    attribution.enter(("mlp", 1))
    meter.value += 3
    attribution.leave()
    assert attribution.spent["mlp", 1] == 3
