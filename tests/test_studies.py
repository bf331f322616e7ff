"""The studies under docs/studies: valid, complete, in the paper's settings, and each with a small variant."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from prunekit.compress.ablation.study import Study
from prunekit.compress.bundled import TEXTS
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import Catalog

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "studies"
OWN = [
    FOLDER / "compare.yaml",
    FOLDER / "allocation.yaml",
    FOLDER / "generation.yaml",
    FOLDER / "mixed.yaml",
    *sorted(FOLDER.glob("compensation*.yaml")),
    *sorted(FOLDER.glob("speed-*.yaml")),
]
LARGE = sorted(set(FOLDER.glob("*.yaml")) - set(OWN))
SMALL = sorted((FOLDER / "small").glob("*.yaml"))
OFFLINE = [*SMALL, *OWN]
README = (FOLDER / "README.md").read_text(encoding="utf-8")
REAL = (FOLDER / "real" / "README.md").read_text(encoding="utf-8")
WRITTEN = yaml.safe_load((ROOT / "docs" / "examples" / "paper-settings.yaml").read_text(encoding="utf-8"))
PAPER = WRITTEN | {
    "prune": PipelineSpec.of(WRITTEN, catalog=Catalog.discover(block="")).model_dump(serialize_as_any=True)["prune"]
}
FLAP, TYR, FINE_TUNED = "flap.yaml", "tyr.yaml", "fine-tuned.yaml"
"""These have settings of their own."""
OWN_CALIBRATION = {FLAP, FINE_TUNED, "calibration-text.yaml"}


def names(paths):
    return [path.relative_to(FOLDER).as_posix() for path in paths]


@pytest.fixture(scope="module")
def load():
    loaded = {}

    def get(path):
        if path not in loaded:
            loaded[path] = Study.load(path)
        return loaded[path]

    return get


def belongs(entry, planned):
    return all(planned.settings.get(name) == value for name, value in entry.where.items())


@pytest.mark.parametrize("path", [*LARGE, *OFFLINE], ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_study_is_valid_and_says_what_it_is(load, path):
    study = load(path)
    assert study.trials
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert study.title != path.stem


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.name)
def test_every_published_value_is_measured_and_has_its_source(load, path):
    study = load(path)
    for entry in study.published:
        trials = [planned for planned in study.trials if belongs(entry, planned)]
        assert trials, entry
        measured = {evaluator.name for planned in trials for evaluator in planned.spec.evaluate}
        assert entry.metric.split(".")[0] in measured
        assert re.match(r"(PP|FLAP|Tyr), .", entry.source), entry
        if not entry.dense:
            assert len(trials) == 1, "a published value is one trial's"


def test_the_same_published_value_is_the_same_in_every_file(load):
    """Trials of one pipeline in several files must not have different published values of the same measurement."""
    values = {}
    for path in LARGE:
        study = load(path)
        for entry in study.published:
            for planned in study.trials:
                if belongs(entry, planned):
                    spec = planned.spec.model_dump(mode="json", serialize_as_any=True)
                    windows = [evaluator.get("window") for evaluator in spec["evaluate"]]
                    decides = json.dumps(windows if entry.dense else [spec["prune"], spec["calibration"]])
                    key = (spec["model"]["name"], decides, entry.metric)
                    assert values.setdefault(key, entry.value) == entry.value, (path.name, entry)


def test_every_study_has_a_small_variant_of_the_same_axes(load):
    assert [path.name for path in SMALL] == [path.name for path in LARGE]
    for large, small in zip(LARGE, SMALL, strict=True):
        assert list(load(small).axes) == list(load(large).axes), small.name


@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_small_study_runs_offline_on_what_comes_with_the_package(load, path):
    for planned in load(path).trials:
        spec = planned.spec
        assert spec.model.name is None
        assert spec.calibration.bundled in TEXTS
        texts = [getattr(evaluator, "text", None) for evaluator in spec.evaluate]
        texts += [text for evaluator in spec.evaluate for text in getattr(evaluator, "mixture", None) or ()]
        assert all(text.bundled in TEXTS for text in texts if text is not None)


@pytest.mark.parametrize(
    "path", [path for path in LARGE if path.name not in (FLAP, TYR, FINE_TUNED)], ids=lambda path: path.name
)
def test_a_large_study_has_the_papers_settings(load, path):
    """The settings stand in every file, so that each can be read and changed alone; they must not drift apart."""
    varied = set(load(path).axes)
    for planned in load(path).trials:
        data = planned.spec.model_dump(serialize_as_any=True)
        assert data["model"]["dtype"] == PAPER["model"]["dtype"]
        if path.name not in OWN_CALIBRATION:
            assert {key: data["calibration"][key] for key in PAPER["calibration"]} == PAPER["calibration"]
        settings = {"rescale", "attention_unit", "skip_layers"}
        for key in settings - {name.removeprefix("prune.") for name in varied}:
            assert data["prune"][key] == PAPER["prune"][key], (planned.label, key)
        if data["prune"]["allocator"]["name"] == "uniform":
            assert data["prune"]["allocator"] == PAPER["prune"]["allocator"]
        for evaluator in data["evaluate"]:
            if evaluator["name"] == "perplexity":
                wanted = PAPER["evaluate"][0]
                assert {key: evaluator["text"][key] for key in wanted["text"]} == wanted["text"]
                assert (evaluator["window"], evaluator["batch_size"]) == (wanted["window"], wanted["batch_size"])
            elif evaluator["name"] in ("latency", "cost", "memory", "overlap"):
                assert (evaluator["length"], evaluator["batch_size"]) == (1024, 20)


@pytest.mark.parametrize("path", sorted((FOLDER / "real").glob("*.yaml")), ids=lambda path: path.name)
def test_studies_of_a_real_model_are_valid_once_their_texts_are_there(path, tmp_path):
    texts = re.findall(r"texts/([\w.-]+)", path.read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "docs" / "examples" / "tasks", tmp_path / "tasks")
    (tmp_path / "texts").mkdir()
    for name in texts:
        (tmp_path / "texts" / name).write_text("a text", encoding="utf-8")
    study = Study.load(Path(shutil.copy(path, tmp_path)))
    listed = {name: trials for name, trials in re.findall(r"\]\(([\w-]+\.yaml)\) .*\| (\d+) \|", REAL)}
    assert len(study.trials) == int(listed[path.name])
    assert all(f"`{name}`" in REAL for name in texts)


GRADIENTS = {"llm_pruner", "lora_prune", "gisp"}
DEPTH = {"shortgpt", "sleb", "block_pruner"}
"""They are compared in docs/results/methods."""
GENERATION = {"griffin", "bwap", "glass"}
"""They are compared in docs/studies/real/generation.yaml."""
EXPERTS = {"reap", "expert_frequency"}
"""They need a model with routed experts."""


def test_compare_is_every_strategy_at_both_ratios(load):
    study = load(FOLDER / "compare.yaml")
    # What differs from another strategy by its compensation has studies of its own, and so have published codes.
    own = {name for name in study.catalog.names("strategies") if "reference" not in name}
    others = {"reconstruct", "pp_ls", "cfsp", "two_ssp", "obs"} | GRADIENTS | DEPTH | EXPERTS | GENERATION
    assert set(study.axes["prune.use"]) == own - others
    assert study.axes["prune.ratio"] == [0.2, 0.4]


def test_the_readme_lists_every_file_and_no_other(load):
    listed = set(re.findall(r"\]\(((?:small/)?[\w-]+\.yaml)\)", README))
    assert listed == {*names(LARGE), *names(OFFLINE)}


def test_the_readme_says_which_studies_have_published_values(load):
    rows = dict(re.findall(r"^\| \[[\w-]+\]\(([\w-]+\.yaml)\) \|.*\| (\d+|none) \|$", README, re.MULTILINE))
    assert rows == {path.name: str(len(load(path).published) or "none") for path in LARGE}


def test_allocations_run_on_the_real_model_too():
    study = Study.load(FOLDER / "allocation.yaml", ["model=smollm2-135m"])
    assert {planned.spec.model.name for planned in study.trials} == {"smollm2-135m"} and len(study.trials) == 66
    built_in = {name for name in study.catalog.names("allocators") if "reference" not in name}
    used = {planned.spec.prune.allocator.name for planned in study.trials}
    assert used == built_in - {"explicit", "mlp_only"} - {"lowest_influence", "block_by_block"}  # of whole layers
    assert len({planned.spec.prune.scorer.identity for planned in study.trials}) == 1
