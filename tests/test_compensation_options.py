"""Compensation chosen from a file, the command line and Python, and the errors where it cannot work."""

import json

import pytest
import yaml
from prunekit.compress import Pipeline, prune
from prunekit.compress.cli.schema import pipeline_schema
from prunekit.compress.files.reader import build_strategy
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import Catalog, SpecError

LEAST_SQUARES = "compensate: {name: least_squares, "


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


@pytest.fixture
def load(tmp_path):
    """Reads a pipeline file that cuts 40%, with the settings of the command line."""

    def read(section, *settings):
        path = tmp_path / "p.yaml"
        path.write_text(f"prune: {{ratio: 0.4, {section}}}\n")
        return PipelineSpec.load(path, settings)

    return read


def refused(call, *args, **options) -> str:
    with pytest.raises(SpecError) as caught:
        call(*args, **options)
    return str(caught.value)


# Numbers that are none


@pytest.mark.parametrize("option", ["ridge", "memory_gib"])
@pytest.mark.parametrize("name", ["least_squares", "low_rank_least_squares"])
@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_infinity_and_nan_are_refused(load, name, option, value):
    said = refused(load, f"use: flap, compensate: {{name: {name}, {option}: {value}}}")
    found = str(yaml.safe_load(value))
    assert f"prune.compensate.{option}: should be" in said and f"(found {found})" in said


# null


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("use: flap, compensate: null", []),
        ("use: flap", ["prune.compensate=null"]),
        ("use: flap, compensate: {name: least_squares}", ["prune.compensate=null"]),
    ],
)
def test_null_switches_compensation_off(load, tmp_path, section, settings):
    assert load("use: flap").prune.compensate.name == "mean"
    spec = load(section, *settings)
    assert spec.prune.compensate.name == "none"
    resolved = yaml.safe_load(spec.to_yaml())
    assert resolved["prune"]["compensate"] == {"name": "none"}
    (tmp_path / "again.yaml").write_text(spec.to_yaml())
    assert PipelineSpec.load(tmp_path / "again.yaml") == spec


def test_none_switches_compensation_off_from_python(make_model, batches, catalog):
    with prune(make_model("llama-gqa"), "flap", ratio=0.4, calibration=batches, compensate=None) as pruned:
        assert pruned.about_compensation() is None
    flap = catalog.get("strategies", "flap")
    assert flap(ratio=0.4, compensate=None).compensate.name == "none"
    assert build_strategy(catalog, flap(ratio=0.4), {"compensate": None}).compensate.name == "none"


def test_the_schema_allows_null(catalog):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(pipeline_schema(catalog))
    for strategy in catalog.names("strategies"):
        for compensate, valid in ((None, True), ("mean", True), ({"name": "mean"}, True), ("meen", False), (3, False)):
            data = {"prune": {"use": strategy, "ratio": 0.4, "compensate": compensate}}
            assert validator.is_valid(data) == valid, data


# Options in the wrong place


def test_an_option_without_the_component_that_has_it(load):
    assert refused(load, "use: pp, compensate: {ridge: 0.1}").endswith(
        "line 1: prune.compensate.ridge: unknown key; Compensator none has no options, so name the one that is meant, "
        "such as {name: least_squares, ridge: ...}"
    )
    assert refused(load, "use: pp", "prune.compensate.rigde=0.1").endswith(
        "--set prune.compensate.rigde: unknown key; Compensator none has no options, so name the one that is meant "
        "(prunekit list compensators)"
    )
    spec = load("use: pp", "prune.compensate.name=least_squares", "prune.compensate.ridge=0.1")
    assert (spec.prune.compensate.name, spec.prune.compensate.ridge) == ("least_squares", 0.1)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "use: pp, held_out: 2",
            "unknown key; it is an option of least_squares: write compensate: {name: least_squares, held_out: ...}",
        ),
        ("use: reconstruct, ridge: 0.1", "it is an option of compensate least_squares: write compensate: {ridge: ...}"),
        ("use: pp, momentum: 0.9", "it is an option of merger importance_scaled: write merger: {momentum: ...}"),
        (
            "use: wanda_sp, momentum: 0.9",
            "unknown key; it is an option of fixed_ratio: write merger: {name: fixed_ratio, momentum: ...}",
        ),
        (
            "use: wanda_sp, rows: 0.1",
            "unknown key; it is an option of hidden_norm: write selector: {name: hidden_norm, rows: ...}",
        ),
        (
            "use: wanda_sp, probe: 0.3",
            "unknown key; it is an option of fixed_ratio: write merger: {name: fixed_ratio, probe: ...}, or of "
            "least_squares: write compensate: {name: least_squares, probe: ...}",
        ),
    ],
)
def test_an_option_beside_the_component_that_has_it(load, section, said):
    assert refused(load, section).endswith(said)


def test_keys_of_no_component_are_answered_with_those_there_are(load):
    assert "unknown key; there are ratio, skip_layers, " in refused(load, "use: pp, qqq: 0.1")
    assert refused(load, "use: pp, selector: {ridge: 1}").endswith(
        "ridge: unknown key; there are ahead, positions, rows"
    )


def test_a_near_name_and_the_names_there_are_make_one_sentence(load):
    assert " is called 'meen' (did you mean 'mean'?); there are " in refused(load, "use: pp, compensate: meen")


# Sequential calibration


@pytest.mark.parametrize("allocator", ["global_adaptive", "sensitivity"])
def test_sequential_calibration_takes_allocators_that_compare_layers(load, allocator):
    assert load(f"use: wanda_sp, sequential: true, allocator: {allocator}").prune.sequential


# Notes on the ridge


def quick(compensate, use="wanda_sp"):
    return Pipeline(
        {
            "calibration": {"sequences": 2, "length": 32},
            "prune": {"use": use, "ratio": 0.4, "compensate": compensate},
            "evaluate": [{"name": "perplexity", "window": 32, "limit": 1}],
        }
    )


def compensation_line(results):
    lines = (results.folder / "report.md").read_text().split("\n")
    (line,) = [line for line in lines if line.startswith("- **compensation**")]
    return line


def test_a_chosen_ridge_is_reported_as_numbers_and_in_words(tmp_path):
    results = quick("least_squares").run(tmp_path / "r")
    data = json.loads((results.folder / "results.json").read_text())
    least, largest = (data["compensation"]["ridge"][key] for key in ("least", "largest"))
    assert 0 < least < largest
    words = f"{least:.3g} to {largest:.3g} times the mean variance"
    assert [note for note in data["notes"] if f"with a ridge of {words}" in note]
    line = compensation_line(results)
    assert f"ridge {words}" in line and "selector" not in line and "probe 0.0" in line


def test_a_ridge_that_was_asked_for_and_a_probe(tmp_path):
    line = compensation_line(quick({"name": "least_squares", "ridge": 0.1, "probe": 0.5}).run(tmp_path / "r"))
    assert "ridge 0.1 times the mean variance" in line and "selector (name spread" in line
    results = quick("mean").run(tmp_path / "mean")
    assert results.record.compensation.ridge is None
    assert compensation_line(results).startswith("- **compensation**: mean (check False, selector (name spread")
