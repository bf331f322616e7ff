"""YAML: words that YAML 1.1 and 1.2 read differently are refused; size, depth and aliases have bounds."""

import os
import time

import pytest
import yaml
from prunekit.compress.files.reader import build_strategy
from prunekit.compress.files.spec import PipelineSpec
from prunekit.compress.files.yaml_file import parse_place, read_yaml
from prunekit.compress.files.yaml_plain import Dumper, plain_data
from prunekit.registry import Catalog, SpecError
from prunekit.strategies.magnitude import Magnitude


def refusal(call, *arguments):
    began = time.process_time()
    with pytest.raises(SpecError) as caught:
        call(*arguments)
    assert time.process_time() - began < 20  # a bound: without it these take minutes
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("prune.ratio", "no"),
        ("prune.skip_layers.0", "yes"),
        ("seed", "010"),
        ("seed", "on"),
        ("seed", "1_000"),
        ("seed", "0b11"),
        ("calibration.length", "1:30"),
        ("calibration.subset", "no"),
        ("model.revision", "0012345"),
        ("model.revision", "08123"),
    ],
)
def test_words_that_are_read_in_two_ways(place, word):
    *sections, key = place.split(".")
    text = f"[{word}]" if key == "0" else f"{{{key}: {word}}}"
    for section in reversed(sections):
        text = f"{{{section}: {text}}}"
    said = refusal(plain_data, text, "x.yaml")
    assert f"x.yaml line 1: {place}: {word} is read in two ways" in said and "quotes" in said


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("12", 12),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("0.0", 0.0),
        ("0", 0),
        ("-.inf", -float("inf")),
        ("2020-01-01", "2020-01-01"),
        ("y", "y"),
        ("'no'", "no"),
        ('"010"', "010"),
        ("!!str 010", "010"),
        ("a:b", "a:b"),
    ],
)
def test_words_of_the_core_rules(word, value):
    found = plain_data(f"a: {word}", "x")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("word", ["no", "010", "1e5", "0012348", "1:30", "true", "12", "", "0x1F", "1_0", "2020-01-01"])
def test_texts_are_written_so_that_both_versions_read_them(word):
    text = yaml.dump({"a": word}, Dumper=Dumper)
    assert yaml.safe_load(text) == plain_data(text, "x") == {"a": word}


def bomb(first, item):
    return f"a0: &a0 {first}\n" + "".join(f"a{i}: &a{i} {item(f'*a{i - 1}')}\n" for i in range(1, 10))


LISTS = bomb("[1]", lambda alias: f"[{', '.join([alias] * 9)}]")
MAPS = bomb("{k: v}", lambda alias: f"{{{', '.join(f'k{number}: {alias}' for number in range(9))}}}")
MERGES = bomb("{k: v}", lambda alias: f"{{<<: [{', '.join([alias] * 9)}]}}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LISTS, "holds more than 100,000 values"),
        (MAPS, "holds more than 100,000 values"),
        (MERGES, "holds more than 100,000 values"),
        ("a: &a {<<: *a}", "nested more than 32 levels"),
        ("a: [" + "1," * 1_000_000 + "1]", "has 2,000,006 characters"),
        ("a: [" + "1," * 101_000 + "1]", "holds more than 100,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 32 levels"),
        ("[" * 100_000, "nested more than 32 levels"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "nested more than 32 levels"),
        ("a: 0x" + "f" * 5000, "larger number"),
        ("a: " + "9" * 5000, "larger number"),
        ("a: 1" + "0" * 30, "larger number"),
        ("a: 1e400", "larger number"),
        ("a: !!binary aGk=", "is not plain data"),
        ("a: 'x\0y'", "not valid YAML"),
        ('a: "\\U99999999"', "not valid YAML"),
        ("x" * 5000 + ": [}", "not valid YAML"),
    ],
    ids=range(17),
)
def test_bounds(text, words):
    assert words in refusal(plain_data, text, "x.yaml")


def test_merges_keep_their_order():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}"
    assert plain_data(text, "x")["c"] == {"x": 1, "y": 1, "z": 3}


def test_a_place_in_other_digits_is_a_name():
    assert parse_place("evaluate.\u00b2") == ("evaluate", "\u00b2")
    assert parse_place("evaluate.1.window") == ("evaluate", 1, "window")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('calibration: {file: "a\\0b"}', "calibration.file: a path has no NUL byte"),
        ('calibration: {statistics: "a\\0b"}', "calibration.statistics: a path has no NUL byte"),
        ('output: {dir: "a\\0b"}', "output.dir: a path has no NUL byte"),
        ('model: {name: "a\\0b"}', "model.name: a path has no NUL byte"),
        ('model: {revision: "a\\0b"}', "model.revision: has a NUL byte"),
        ('model: {revision: "\\ud800"}', "model.revision: has a NUL byte or half of a surrogate pair"),
        ('plugins: ["a\\0b"]', "plugins: a path has no NUL byte"),
        (f"calibration: {{file: {'a' * 5000}}}", "calibration.file: the name is too long"),
        (f"model: {{name: {'a' * 256}}}", "model.name: the name is too long"),
        ("calibration: {file: ~nobody-of-that-name/x}", "calibration.file: there is no home folder ~nobody-of-that"),
        ("seed: true", "seed: should be a whole number (found True)"),
        ("seed: '3'", "seed: should be a whole number, not text (found '3')"),
        ("seed: 3.0", "seed: should be a whole number (found 3.0)"),
        ("model: {trust_remote_code: 1}", "model.trust_remote_code: should be true or false (found 1)"),
        ("model: {revision: 12345}", "model.revision: should be a valid string (found 12345); put quotes around text"),
        ("prune: {use: magnitude, ratio: 0.2, skip_layers: [true]}", "prune.skip_layers: should be a whole number"),
    ],
)
def test_values_that_no_option_takes(tmp_path, section, words):
    path = tmp_path / "p.yaml"
    path.write_text("" if section.startswith("prune") else "prune: {use: magnitude, ratio: 0.2}\n")
    path.write_text(f"{path.read_text()}{section}\n")
    assert words in refusal(PipelineSpec.load, path)


@pytest.mark.parametrize("value", [True, "0.2"])
def test_no_conversions_in_python(value):
    assert "ratio: should be a number" in refusal(build_strategy, Catalog.discover(), "magnitude", {"ratio": value})
    with pytest.raises(ValueError, match="ratio: should be a number"):
        Magnitude(ratio=value)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "p.yaml")
    assert "it is not a regular file" in refusal(read_yaml, tmp_path / "p.yaml")
