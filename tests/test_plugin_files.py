"""Plugins in a plain Python file, and how the catalog builds components from names and options."""

import pytest
from prunekit.registry import Catalog, PluginError


def scorer(name: str) -> str:
    """The source of a plugin with one scorer."""
    return f'''
from typing import Literal
from prunekit.registry import Scorer, hookimpl

class Mine(Scorer):
    """A scorer."""
    name: Literal["{name}"] = "{name}"
    def prepare(self, weight, site): return weight.abs().amax(0)
    def score(self, prepared, statistic): return prepared * statistic

@hookimpl
def scorers(): return [Mine]
'''


def problems_of(catalog: Catalog, file) -> list[str]:
    return [problem for problem in catalog.problems if str(file) in problem]


@pytest.fixture(autouse=True)
def nothing_blocked(monkeypatch):
    monkeypatch.delenv("PRUNEKIT_BLOCK", raising=False)


def test_a_plugin_file(tmp_path):
    file = tmp_path / "my_ideas.py"
    file.write_text(scorer("from_file"))
    catalog = Catalog.discover(files=[file, str(file)])  # named twice, as by a pipeline file and the command line
    (entry,) = [entry for entry in catalog.of_role("scorers") if entry.name == "from_file"]
    assert (entry.plugin, entry.provider) == ("my_ideas", f"file {file}")
    assert not problems_of(catalog, file)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, ["does not exist"]),
        ("import a_module_that_is_not_there", ["cannot be imported", "ModuleNotFoundError"]),
        ("raise SystemExit(0)", ["cannot be imported", "SystemExit"]),
        ("x = 1", ["implements no hook"]),
        ("\nx = 1 / 0", ["cannot be imported: line 2: ZeroDivisionError"]),
        (
            scorer("x").replace('name: Literal["x"]', "name"),
            ["cannot be imported: line", 'Write name: Literal["mine"]'],
        ),
        (scorer("x") + "def strategies(): return []", ["its function strategies is not a hook", "@hookimpl"]),
        (scorer("x").replace("def scorers", "def scorer"), ["no hook 'scorer'", "did you mean 'scorers'?"]),
        (scorer("x").replace("[Mine]", "[Mine()]"), ["expected a class derived from Scorer"]),
        ("PLUGIN_API = 2" + scorer("x"), ["is written for plugin API 2, and this prunekit has 1"]),
        (scorer("x") + "@hookimpl\ndef evaluators(): return 1 / 0", ["hook evaluators", "raised ZeroDivisionError"]),
    ],
)
def test_a_broken_plugin_file_stops_because_it_was_asked_for(tmp_path, source, words):
    file = tmp_path / "ideas.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(PluginError) as caught:
        Catalog.discover(files=[file])
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value


def test_a_plugin_file_that_is_not_python(tmp_path):
    file = tmp_path / "ideas.txt"
    file.write_text(scorer("x"))
    with pytest.raises(PluginError, match=r"ideas\.txt is not a Python file"):
        Catalog.discover(files=[file])


def test_a_plugin_file_does_not_shadow_silently(tmp_path):
    file = tmp_path / "ideas.py"
    file.write_text(scorer("ppsp"))
    catalog = Catalog.discover(files=[file])
    (problem,) = problems_of(catalog, file)
    assert "'ppsp' is provided twice" in problem and "plugin pp of prunekit" in problem
