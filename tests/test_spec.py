"""Pipeline files: defaults, overrides, and every mistake reported with its place, the value and the remedy."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from prunekit.compress.cli.schema import pipeline_schema
from prunekit.compress.files.reader import build_strategy
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import Catalog, PluginError, SpecError, Strategy
from pydantic import Field

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "docs" / "examples").glob("*.yaml"))

PLUGIN = '''
from typing import Literal
from pydantic import Field
from prunekit.registry import HistoryMerger, Scorer, hookimpl

class MaxWeight(Scorer):
    """Largest weight times mean square activation."""
    name: Literal["max_weight"] = "max_weight"
    power: int = Field(1, ge=1)
    def prepare(self, weight, site): return weight.abs().amax(0)
    def score(self, prepared, statistic): return prepared * statistic

@hookimpl
def scorers(): return [MaxWeight]
'''

STRATEGY = '''
from typing import Literal
from prunekit.registry import ProbeSelector, Strategy, hookimpl
from prunekit.strategies.pp import PP

class Few(ProbeSelector):
    """Probes a few rows."""
    name: Literal["few"] = "few"
    n: int = 2
    def select(self, states, valid, generator): ...

class Mine(PP):
    """PP with few rows."""
    name: Literal["mine"] = "mine"
    selector: ProbeSelector | None = Few(n=3)

@hookimpl
def probe_selectors(): return [Few]

@hookimpl
def strategies(): return [Mine]
'''


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


@pytest.fixture
def write(tmp_path):
    """Writes a pipeline file and returns its path."""

    def file(text: str) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return file


def message(call, *args, **options) -> str:
    with pytest.raises(SpecError) as caught:
        call(*args, **options)
    return str(caught.value)


def test_the_smallest_file_has_every_default(write):
    spec = PipelineSpec.load(write("prune: {use: pp, ratio: 0.4}"))
    assert (spec.prune.name, spec.prune.ratio) == ("pp", 0.4)
    assert spec.model.name is None
    assert spec.calibration.bundled == "reference-calibration"
    assert [evaluator.name for evaluator in spec.evaluate] == ["perplexity", "cost"]


def test_sections_left_empty_take_their_defaults(write):
    spec = PipelineSpec.load(write("prune: {use: pp, ratio: 0.4}\nmodel:\ncalibration:\nevaluate:\nplugins:\n"))
    assert spec == PipelineSpec.load(write("prune: {use: pp, ratio: 0.4}"))


# Files with mistakes.

BAD = """\
modle: {name: x}
model: {dtype: float17}
calibration:
  bundled: reference-calibratoin
  sequences: 0
prune:
  use: pp
  ratio: 40
  scorer: wanda-sp
  merger: {name: fixed_ratio, probe: 3}
evaluate:
  - perplexty
  - {name: cost, lenght: 3}
  - {name: perplexity, text: {file: nope.txt}}
output: {trce: true}
seed: abc
"""


def test_all_mistakes_at_once_with_their_lines(write, tmp_path):
    text = message(PipelineSpec.load, write(BAD))
    expected = [
        "12 mistakes",
        "line 1: modle: unknown key (did you mean 'model'?",
        "line 2: model.dtype: ",
        "line 4: calibration.bundled: no bundled text is called 'reference-calibratoin' (did you mean",
        "line 5: calibration.sequences: should be greater than or equal to 1 (found 0)",
        "line 8: prune.ratio: ",
        "line 9: prune.scorer: no Scorer is called 'wanda-sp' (did you mean 'wanda_sp'?",
        "line 10: prune.merger.probe: should be less than or equal to 1 (found 3)",
        "line 12: evaluate.0: no Evaluator is called 'perplexty' (did you mean 'perplexity'?",
        "line 13: evaluate.1.lenght: unknown key (did you mean 'length'?",
        f"line 14: evaluate.2.text.file: there is no file {tmp_path / 'nope.txt'}",
        "line 15: output.trce: unknown key (did you mean 'trace'?",
        "line 16: seed: ",
    ]
    for line in expected:
        assert line in text, f"{line}\nis not in\n{text}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty", "prune: {use: pp, ratio: 0.4}"]),
        ("# nothing\n", ["is empty"]),
        ("- pp", ["must be a mapping", "['pp']"]),
        ("pp", ["must be a mapping", "'pp'"]),
        ("prune: {use: pp", ["line 1", "not valid YAML"]),
        ("\tprune: 3", ["line 1 column 1", "not valid YAML"]),
        ("a: 1\n---\nb: 2", ["not valid YAML", "another document"]),
        ("model: !!python/object:os.system {}", ["line 1", "not valid YAML", "os.system"]),
        ("seed: !!python/name:os.system 3", ["line 1", "not valid YAML", "os.system"]),
        ("prune: {use: pp, ratio: 0.1}\nprune: {use: pp, ratio: 0.2}", ["line 2", "prune is given twice", "line 1"]),
        ("prune: {use: pp, ratio: 0.1, ratio: 0.2}", ["prune.ratio is given twice"]),
        ("prune: &again {use: pp, ratio: *again}", ["nested more than 32 levels"]),
        ("prune: {[a]: 3}", ["a key must be a word"]),
        (
            "prune:\n  use: pp\n  ratio: 2024-13-45",
            ["line 3: prune.ratio: should be a number, not text (found '2024-13-45')"],
        ),
        ("seed: !!int abc", ["line 1: seed: 'abc' is not valid YAML"]),
        ("seed: !!timestamp soon", ["line 1: not valid YAML: the tag", "timestamp is not plain data"]),
        ("!!int abc: 3", ["line 1", "'abc' is not valid YAML"]),
        (
            "prune: {use: pp, ratio: 0.4}\nseed: 99999999999999999999999",
            ["line 2: seed: 9999", "is a larger number than"],
        ),
        ("prune: {use: pp, ratio: 0.4}\nseed: -1", ["line 2: seed: should be greater than or equal to 0"]),
        ("prune: {use: pp, ratio: 0.4}\ncalibration: {seed: -1}", ["calibration.seed: should be greater than or"]),
        ("prune: {use: pp, ratio: 0.4}\nevaluate: [{name: cost, seed: -1}]", ["evaluate.0.seed: should be greater"]),
        ("prune: {use: pp, ratio: 0.4}\nevaluate: [{name: latency, seed: -1}]", ["evaluate.0.seed: should be greater"]),
        ("prune: {use: pp, ratio: 0.4}\nevaluate: []", ["line 2: evaluate: name at least one evaluator"]),
        (
            "prune: {use: pp, ratio: 0.4}\ncalibration: {file: .}",
            ["line 2: calibration.file", "is a folder, but not one of"],
        ),
        ("seed: 3", ["prune: is required", "use: pp"]),
        ("prune: pp", ["prune.ratio: is required"]),
        ("prune: {ratio: 0.4}", ["prune.use: name the Strategy", "wanda_sp"]),
        ("prune: {use: ppp, ratio: 0.4, scorr: x}", ["2 mistakes", "did you mean 'pp'?", "did you mean 'scorer'?"]),
        ("prune: {use: pp, name: pp, ratio: 0.4}", ["prune.name: unknown key"]),
        ("prune: {use: pp, ratio: 0.4}\nevaluate: cost", ["evaluate: expected a list", "'cost'"]),
        ("prune: {use: pp, ratio: 0.4}\nevaluate: [{window: 3}]", ["evaluate.0.name: name the Evaluator"]),
        ("prune: {use: pp, ratio: 0.4}\nmodel: 5", ["model: expected a mapping", "5"]),
        ("prune: {use: pp, ratio: 0.4}\nplugins: x.py", ["plugins: expected a list", "'x.py'"]),
        (
            "prune: {use: pp, ratio: 0.4}\ncalibration: {bundled: reference-calibration, file: x.txt}",
            ["calibration", "bundled and file"],
        ),
    ],
)
def test_a_file_that_cannot_be_used(write, text, words):
    path = write(text)
    found = message(PipelineSpec.load, path)
    assert all(word in found for word in [str(path), *words]), found


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no pipeline file" in message(PipelineSpec.load, tmp_path / "none.yaml")
    assert "cannot be read" in message(PipelineSpec.load, tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in message(PipelineSpec.load, binary)


# --set


def test_settings_change_the_file(write):
    path = write("prune: {use: pp, ratio: 0.4, merger: fixed_ratio}")
    changes = [
        "prune.ratio=0.2",
        "prune.merger.probe=0.3",
        "prune.skip_layers=[0, 1]",
        "evaluate.0.window=256",
        "evaluate.2=latency",
        "calibration.sequences=3",
    ]
    spec = PipelineSpec.load(path, changes)
    assert (spec.prune.ratio, spec.prune.skip_layers, spec.calibration.sequences) == (0.2, (0, 1), 3)
    assert (spec.prune.merger.name, spec.prune.merger.probe) == ("fixed_ratio", 0.3)
    assert [evaluator.name for evaluator in spec.evaluate] == ["perplexity", "cost", "latency"]
    assert spec.evaluate[0].window == 256
    first = PipelineSpec.load(path, ["prune.skip_layers.0=2", "prune.skip_layers.1=4"])
    assert first.prune.skip_layers == (2, 4)
    assert PipelineSpec.load(path, ["prune=null", "prune.use=flap", "prune.ratio=0.1"]).prune.name == "flap"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("prune.ratio", "write a path, an equals sign and a value"),
        ("=3", "write a path"),
        ("prune..ratio=3", "write a path"),
        ("prune.ratio={", "not valid YAML"),
        ("prune.ratio=2024-13-45", "--set prune.ratio: should be a number, not text (found '2024-13-45')"),
        ("prune.skip_layers.1=1", "prune.skip_layers is a list of 0"),
        ("evaluate.5=cost", "evaluate is a list of 2"),
        ("evaluate.first=cost", "evaluate is a list of 2"),
        ("prune.ratio.x=1", "prune.ratio is 0.4, which has no 'x'"),
        ("prune.ratio=1.2", "--set prune.ratio: the ratio is the share that is cut"),
        ("prune.scorr=x", "--set prune.scorr: unknown key (did you mean 'scorer'?"),
    ],
)
def test_settings_that_cannot_work(write, setting, words):
    text = message(PipelineSpec.load, write("prune: {use: pp, ratio: 0.4}"), [setting])
    assert words in text, text


# Plugins, paths, seeds, schema


def test_plugins_and_texts_are_found_from_the_files_folder(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "tiny").mkdir(parents=True)
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "text.txt").write_text("words")
    path = folder / "pipeline.yaml"
    path.write_text(
        "plugins: [mine.py]\nmodel: {name: tiny}\ncalibration: {file: text.txt}\n"
        "prune: {use: pp, ratio: 0.4, scorer: {name: max_weight, power: 2}}\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = PipelineSpec.load(path)
    assert spec.prune.scorer.power == 2
    assert spec.plugins == (folder / "mine.py",)
    assert spec.calibration.file == folder / "text.txt"
    assert spec.model.name == str(folder / "tiny")
    assert "max_weight" in spec.catalog.names("scorers")
    moved = tmp_path / "resolved.yaml"
    moved.write_text(spec.to_yaml())
    assert PipelineSpec.load(moved).prune.scorer.power == 2


def test_options_of_a_plugin_strategys_components_are_resolved(write, tmp_path):
    (tmp_path / "mine.py").write_text(STRATEGY)
    spec = PipelineSpec.load(write("plugins: [mine.py]\nprune: {use: mine, ratio: 0.4, selector: {n: 1}}"))
    assert spec.prune.selector.n == 1
    again = PipelineSpec.load(write(spec.to_yaml()))
    assert (again.prune.selector.name, again.prune.selector.n) == ("few", 1)


def test_a_plugin_of_the_command_line_and_a_missing_one(write, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    path = write("prune: {use: pp, ratio: 0.4, scorer: max_weight}")
    assert PipelineSpec.load(path, plugins=[file]).prune.scorer.name == "max_weight"
    assert "no Scorer is called 'max_weight'" in message(PipelineSpec.load, path)
    with pytest.raises(PluginError, match=r"gone\.py does not exist; paths of --plugin start here"):
        PipelineSpec.load(path, plugins=["gone.py"])


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("[mine.py,\n  gone.py]", ["line 3: plugins.1: plugin file", "gone.py does not exist; name a Python file"]),
        ("[a_folder]", ["line 2: plugins.0: plugin file", "a_folder is a folder; name a Python file"]),
        ('["gone\\0.py"]', ["line 2: plugins: a path has no NUL byte"]),
    ],
)
def test_a_plugin_file_that_is_missing_is_a_mistake_with_its_line(write, tmp_path, listed, words):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "a_folder").mkdir()
    path = write(f"prune: {{use: pp, ratio: 0.4}}\nplugins: {listed}")
    said = message(PipelineSpec.load, path)
    assert said.startswith(f"{path}: ") and all(word in said for word in words), said
    if "gone.py" in listed:
        assert said.endswith(f"by a path that starts at {tmp_path}")
        said = message(PipelineSpec.of, {"prune": {"use": "pp", "ratio": 0.4}, "plugins": ["gone.py"]}, tmp_path)
        assert said.startswith(f"pipeline: plugins.0: plugin file {tmp_path}")


def test_a_strategy_class_with_an_option_that_has_no_default():
    class Needy(Strategy):
        """One."""

        name: Literal["needy"] = "needy"
        shape: int = Field(description="a shape")

    with pytest.raises(SpecError, match=r"^strategy Needy: .*; option shape is required: a shape; pass an object"):
        build_strategy(Catalog(), Needy, {})


def test_the_schema_knows_what_the_reader_knows(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    schema = pipeline_schema(Catalog.discover([file]))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in EXAMPLES:
        validator.validate(yaml.safe_load(path.read_text()))
        validator.validate(yaml.safe_load(PipelineSpec.load(path).to_yaml()))
    good = {"use": "pp", "ratio": 0.4, "scorer": "max_weight", "selector": {"rows": 0.1}, "merger": {"momentum": 0.9}}
    assert validator.is_valid({"prune": good})
    for bad in (
        {"scorer": "max_wieght"},
        {"scorer": {"name": "max_weight", "powr": 2}},
        {"merger": {"name": "fixed_ratio", "probe": 3}},
        {"use": "ppp"},
        {"scorr": "max_weight"},
        {"allocator": "explicit"},
    ):
        assert not validator.is_valid({"prune": {**good, **bad}}), bad
    assert not validator.is_valid({"prune": good, "modle": {}})
    assert not validator.is_valid({})
    assert not validator.is_valid({"prune": good, "evaluate": [{"window": 3}]})


def test_a_folder_of_the_name_of_a_known_model_is_not_that_model(tmp_path):
    for name in ("smollm2-135m", "bundled", "None", "mine"):
        (tmp_path / name).mkdir()

    def name_of(model):
        return PipelineSpec.of({"model": model, "prune": {"use": "random", "ratio": 0.1}}, folder=tmp_path).model.name

    assert name_of("smollm2-135m") == "smollm2-135m" and name_of({"name": "bundled"}) is None
    assert name_of("./smollm2-135m") == str(tmp_path / "smollm2-135m") and name_of("mine") == str(tmp_path / "mine")
    assert name_of({"dtype": "float32"}) is None
