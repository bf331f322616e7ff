"""Strategies from names and options: the one way, for pipeline files and Python alike."""

import pytest
from prunekit.compress import prune
from prunekit.compress.files.reader import build_strategy
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import Catalog, SpecError

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


def message(call, *args, **options) -> str:
    with pytest.raises(SpecError) as caught:
        call(*args, **options)
    return str(caught.value)


def test_components_by_name_by_options_and_removed(catalog):
    built = build_strategy(catalog, "pp", dict(ratio=0.4, scorer="wanda_sp", selector={"rows": 0.2}))
    assert built.scorer.name == "wanda_sp"
    assert (built.selector.name, built.selector.rows, built.selector.positions) == ("residual_norm", 0.2, 0.5)
    static = build_strategy(catalog, "pp", dict(ratio=0.4, selector=None, merger=None))
    assert not static.dynamic


@pytest.mark.parametrize("scorer", [{"weighted": False}, {"name": "fluctuation", "weighted": False}])
def test_the_strategys_own_component_keeps_its_settings(catalog, scorer):
    built = build_strategy(catalog, "flap", dict(ratio=0.4, scorer=scorer))
    assert built.scorer.square_attention and not built.scorer.weighted
    assert not build_strategy(catalog, "pp", dict(ratio=0.4, scorer={"name": "fluctuation"})).scorer.square_attention


def test_the_strategys_own_history_keeps_its_settings(catalog):
    mine = build_strategy(catalog, "pp", {"ratio": 0.4, "history": {"dtype": "float16"}})
    changed = build_strategy(catalog, mine, {"history": {"pool": 4}})
    assert (changed.history.dtype, changed.history.pool) == ("float16", 4)


def test_old_files_that_write_the_defaults_of_options_that_moved_are_read(catalog):
    old = {"rescale": "exact", "probe_mask": "selected", "pad_handling": "exclude"}
    old |= {"scorer": {"name": "fluctuation", "recurrence": "published", "square_attention": True}}
    old |= {"merger": {"name": "fixed_ratio", "as_shipped": False}}
    built = build_strategy(catalog, "pp", {"ratio": 0.4, **old})
    assert (built.scorer.name, built.scorer.square_attention, built.merger.name) == ("fluctuation", True, "fixed_ratio")
    assert build_strategy(catalog, "pp_reference", dict(ratio=0.4, rescale="off")).rescale == "off"


def test_a_strategy_object_is_changed_not_replaced(catalog):
    first = build_strategy(catalog, "pp", dict(ratio=0.4, seed=3, selector={"rows": 0.5}))
    second = build_strategy(catalog, first, dict(ratio=0.2, selector={"positions": 0.25}))
    assert (second.ratio, second.seed, second.selector.rows, second.selector.positions) == (0.2, 3, 0.5, 0.25)
    assert first.ratio == 0.4
    assert build_strategy(catalog, type(first), dict(ratio=0.1)).seed == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(), ["ratio: is required"]),
        (dict(ratio=1), ["ratio: ", "0 <= ratio < 1", "1"]),
        (dict(ratio="much"), ["ratio: ", "found 'much'"]),
        (dict(ratio=0.4, rows=0.1), ["rows: unknown key", "option of selector", "selector: {rows: ...}"]),
        (dict(ratio=0.4, scorer=None), ["scorer: expected a Scorer", "found None"]),
        (dict(ratio=0.4, scorer=3), ["scorer: expected a Scorer", "found 3"]),
        (dict(ratio=0.4, attention_unit="kv_grop"), ["attention_unit: ", "'kv_grop'", "did you mean 'kv_group'?"]),
        (dict(ratio=0.4, rescale="off"), ["rescale: is no longer an option here (found 'off'); write use: pp_ref"]),
        (dict(ratio=0.4, probe_mask="first"), ["probe_mask: is no longer", "use: pp_reference, whose probe has"]),
        (dict(ratio=0.4, pad_handling="reference"), ["pad_handling: is no longer", "write use: pp_reference"]),
        (
            dict(ratio=0.4, scorer={"name": "fluctuation", "recurrence": "pp_shipped"}),
            ["scorer.recurrence: is no longer", "scorer: pp_reference_flap for pp_shipped"],
        ),
        (
            dict(ratio=0.4, scorer={"name": "wanda_sp", "square_attention": True}),
            ["scorer.square_attention: is no longer", "write scorer: wifn"],
        ),
        (
            dict(ratio=0.4, merger={"name": "fixed_ratio", "as_shipped": True}),
            ["merger.as_shipped: is no longer", "write merger: {name: pp_reference_fixed_ratio, probe: SHARE}"],
        ),
        (
            dict(ratio=0.4, allocator="flap_shipped"),
            ["allocator: SparsityAllocator 'flap_shipped' has another name now; write flap_reference"],
        ),
        (dict(ratio=0.4, merger={"name": "fixed_ratio", "probe": 3}), ["merger.probe: ", "found 3"]),
        (dict(ratio=0.4, allocator="explicit"), ["allocator.attention: is required", "allocator.mlp: is required"]),
        (
            dict(ratio=0.4, allocator={"name": "explicit", "attention": [0.1], "mlp": [0.1]}),
            ["ratio: allocator explicit takes no ratio", "found 0.4"],
        ),
    ],
)
def test_options_that_cannot_work(catalog, options, words):
    text = message(build_strategy, catalog, "pp", options)
    assert all(word in text for word in ["strategy pp", *words]), text


def test_no_spurious_mistakes_follow_from_the_first(catalog):
    text = message(build_strategy, catalog, "pp", dict(ratio=0.4, merger={"name": "fixed_ratio", "probe": 3}))
    assert "mistakes" not in text
    text = message(build_strategy, catalog, "pp", dict(allocator={"name": "explicit", "attention": [0], "mlp": [2]}))
    assert "ratio: is required" not in text


def test_seeds_draw_differently_from_python(make_model):
    kept = []
    for seed in (0, 7, 7):
        with prune(make_model("llama-mha"), "random", ratio=0.5, seed=seed, trace=True) as pruned:
            kept.append([record["kept"] for record in pruned.trace])
    assert kept[0] != kept[1] == kept[2]


def test_the_strategys_seed_reaches_the_parts_that_draw_and_name_none(catalog):
    seven = build_strategy(catalog, "random", dict(ratio=0.4, seed=7))
    assert (seven.seed, seven.scorer.seed) == (7, 7)
    assert build_strategy(catalog, seven, dict(ratio=0.2)).scorer.seed == 7
    assert build_strategy(catalog, seven, dict(seed=8)).scorer.seed == 8
    own = build_strategy(catalog, "random", dict(ratio=0.4, seed=7, scorer={"seed": 1}))
    assert own.scorer.seed == 1 and build_strategy(catalog, own, dict(seed=8)).scorer.seed == 1
    assert type(seven)(ratio=0.1).scorer.seed == 0


@pytest.mark.parametrize("key", ["use", "name"])
def test_the_strategys_name_is_no_option(catalog, key):
    for strategy in ("pp", catalog.get("strategies", "pp")(ratio=0.4)):
        assert f"{key}: is not an option (found 'flap')" in message(build_strategy, catalog, strategy, {key: "flap"})


def test_plugins_come_with_the_catalog(catalog):
    text = message(build_strategy, catalog, "pp", dict(ratio=0.4, plugins=["mine.py"]))
    assert "plugins: is a key of pipeline files (found ['mine.py'])" in text and "catalog=Catalog.discover([" in text


def test_lists_are_called_lists(catalog):
    text = message(build_strategy, catalog, "pp", dict(ratio=0.4, skip_layers="first"))
    assert "skip_layers: should be a valid list (found 'first')" in text


def test_what_is_no_strategy(catalog):
    assert "did you mean 'flap'?" in message(build_strategy, catalog, "flapp", dict(ratio=0.4))
    assert "found 3" in message(build_strategy, catalog, 3, {})


def test_one_seed_reaches_every_part_that_names_none(tmp_path):
    def write(text):
        (tmp_path / "pipeline.yaml").write_text(text)
        return tmp_path / "pipeline.yaml"

    spec = PipelineSpec.load(write("seed: 7\nprune: {use: random, ratio: 0.4}\ncalibration: {seed: 2}"))
    assert (spec.prune.seed, spec.prune.scorer.seed, spec.calibration.seed, spec.evaluate[1].seed) == (7, 7, 2, 7)
    assert PipelineSpec.load(write(spec.to_yaml())) == spec
    spec = PipelineSpec.load(write("seed: 7\nprune: {use: random, ratio: 0.4, seed: 3}"))
    assert (spec.prune.seed, spec.prune.scorer.seed) == (3, 3)
    spec = PipelineSpec.load(write("prune: {use: random, ratio: 0.4, seed: 3}"))
    assert (spec.prune.scorer.seed, spec.calibration.seed) == (3, 0)
    spec = PipelineSpec.load(write("seed: 7\nprune: {use: random, ratio: 0.4, scorer: {seed: 1}}"))
    assert (spec.prune.seed, spec.prune.scorer.seed, spec.calibration.seed) == (7, 1, 7)


def test_the_default_seed_gives_the_same_written_or_left_out(catalog):
    data = {"prune": {"use": "random", "ratio": 0.4}, "evaluate": ["zero_shot", "cost"]}
    left_out = PipelineSpec.of(data, catalog=catalog)
    for seeds in ({"seed": 0}, {"prune": {**data["prune"], "seed": 0}}):
        written = PipelineSpec.of({**data, **seeds}, catalog=catalog)
        assert written.to_yaml() == left_out.to_yaml()
    assert left_out.evaluate[0].seed == 1234
    assert PipelineSpec.of({**data, "seed": 5}, catalog=catalog).evaluate[0].seed == 5
    five = build_strategy(catalog, "random", dict(ratio=0.4, seed=5))
    assert build_strategy(catalog, five, dict(seed=0)).scorer.seed == 0


def test_options_of_a_part_that_a_strategy_has_not_are_refused_as_such(catalog):
    said = message(build_strategy, catalog, "flap", dict(ratio=0.4, selector={"rows": 0.1}))
    assert "selector: this strategy has no selector whose options could be set: leave it out, or name" in said
    assert "should be a number, not text (found '20%'); write 0.2" in message(
        build_strategy, catalog, "flap", dict(ratio="20%")
    )
