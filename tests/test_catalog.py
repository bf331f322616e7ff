"""The catalog finds built-in and third-party components alike, and reports what is wrong with those it cannot use."""

import importlib
import itertools
import re
import sys
import textwrap

import pytest
from prunekit import registry
from prunekit.registry import PLUGIN_API, ROLES, Catalog, PluginError, Scorer
from prunekit.registry.catalog import PARTS, named, singular

pytestmark = pytest.mark.smoke

BUILT_IN = {
    "export_formats": set(),  # prunekit's own are profiles
    "strategies": {
        "pp",
        "full_batch_probing",
        "flap",
        "wanda_sp",
        "magnitude",
        "random",
        "reconstruct",
        "pp_ls",
        "llm_pruner",
        "lora_prune",
        "gisp",
    },
    "scorers": {"ppsp", "wanda_sp", "fluctuation", "magnitude", "random", "llm_pruner", "lora_prune", "gisp"},
    "probe_selectors": {"residual_norm", "hidden_norm", "random", "spread", "whole_batch"},
    "history_mergers": {"importance_scaled", "fixed_ratio", "probe_only", "history_only"},
    "mask_appliers": {"slice", "zero"},
    "allocators": {
        "uniform",
        "explicit",
        "global_adaptive",
        "global_ranking",
        "sensitivity",
        "greedy",
        "flap_reference",
        "pp_reference_flap",
    },
    "compensators": {"none", "mean", "probe_mean", "least_squares", "low_rank_least_squares"},
    "groupings": {"batch", "row", "cluster"},
    "policies": {"per_prompt", "prefill_only", "decode_only", "every_n", "drift"},
    "architectures": {"llama", "opt"},
    "evaluators": {
        *("perplexity", "zero_shot", "cost", "latency", "memory", "prr", "similarity", "overlap"),
        *("continuation", "decode_latency"),
    },
}

SCORER = '''
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


class Site:
    """A folder on sys.path that looks like site-packages: modules and the dist-info of their distributions."""

    numbers = itertools.count()

    def __init__(self, folder):
        self.folder = folder
        self.modules = []
        self.others = Catalog.discover().problems  # of whatever else is installed here

    def problems(self, catalog: Catalog) -> list[str]:
        return [problem for problem in catalog.problems if problem not in self.others]

    def only_problem(self, catalog: Catalog, *words: str) -> None:
        """There is one problem, and it contains ``words``."""
        problems = self.problems(catalog)
        assert len(problems) == 1, problems
        assert all(word in problems[0] for word in words), problems[0]

    def module(self, source: str) -> str:
        name = f"prunekit_test_plugin_{next(self.numbers)}"
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
        self.modules.append(name)
        return name

    def install(self, distribution: str, version: str = "1.0", **plugins: str) -> None:
        """Install ``distribution`` with one module per plugin; a plugin's value is its source."""
        points = "".join(f"{name} = {self.module(source)}\n" for name, source in plugins.items())
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[prunekit]\n{points}")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNEKIT_BLOCK", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    site = Site(tmp_path)
    yield site
    for name in site.modules:
        sys.modules.pop(name, None)


def rest_works(catalog: Catalog) -> bool:
    return set(catalog.names("strategies")) >= BUILT_IN["strategies"] and catalog.get("scorers", "ppsp") is not None


@pytest.mark.parametrize("role", ROLES)
def test_built_ins_come_through_the_entry_points(site, role):
    catalog = Catalog.discover()
    assert set(catalog.names(role)) >= BUILT_IN[role]
    assert not [problem for problem in catalog.problems if " of prunekit " in problem]
    mine = [entry for entry in catalog.of_role(role) if entry.name in BUILT_IN[role]]
    assert all(entry.provider.startswith("prunekit ") for entry in mine), mine
    # Nothing else hands them out: with our distribution blocked there are none.
    blocked = Catalog.discover(block="prunekit")
    assert not set(blocked.names(role)) & BUILT_IN[role]


def test_an_installed_plugin_is_found_with_its_distribution(site):
    site.install("sharp-scores", "2.3", sharp=SCORER.format(name="sharp"))
    catalog = Catalog.discover()
    assert issubclass(catalog.get("scorers", "sharp"), Scorer)
    (entry,) = [entry for entry in catalog.of_role("scorers") if entry.name == "sharp"]
    assert (entry.plugin, entry.provider) == ("sharp", "sharp-scores 2.3")
    assert site.problems(catalog) == []


def test_two_plugins_with_one_name(site):
    site.install("first-dist", "1.0", one=SCORER.format(name="twin"))
    site.install("second-dist", "2.0", two=SCORER.format(name="twin"), other=SCORER.format(name="lone"))
    catalog = Catalog.discover()
    both = ("plugin one of first-dist 1.0", "plugin two of second-dist 2.0")
    site.only_problem(catalog, "'twin'", *both, "PRUNEKIT_BLOCK")
    with pytest.raises(PluginError, match=r"first-dist 1\.0 and .*second-dist 2\.0"):
        catalog.get("scorers", "twin")
    assert "twin" not in [entry.name for entry in catalog.of_role("scorers")]
    assert catalog.get("scorers", "lone") and rest_works(catalog)


def test_a_name_of_ours_taken_by_a_stranger(site):
    site.install("copycat", impostor=SCORER.format(name="wanda_sp"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "'wanda_sp'", "plugin impostor of copycat 1.0", "plugin wanda_sp of prunekit")
    assert Catalog.discover(block="copycat").get("scorers", "wanda_sp").__module__ == "prunekit.strategies.wanda_sp"


def test_one_name_in_two_roles_is_no_conflict(site):
    site.install("ok", ok=SCORER.format(name="whole_batch"))
    catalog = Catalog.discover()
    assert site.problems(catalog) == []
    assert issubclass(catalog.get("scorers", "whole_batch"), Scorer)


def test_a_distribution_that_two_paths_show_counts_once(site, tmp_path_factory, monkeypatch):
    site.install("sharp-scores", sharp=SCORER.format(name="sharp"))
    again = tmp_path_factory.mktemp("again")
    (info,) = site.folder.glob("*.dist-info")
    (again / info.name).symlink_to(info)
    monkeypatch.syspath_prepend(again)
    catalog = Catalog.discover()
    assert site.problems(catalog) == []
    assert catalog.names("scorers").count("sharp") == 1


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_plugin_that_cannot_be_imported(site, source, error):
    site.install("broken-dist", "0.2", broken=source, well=SCORER.format(name="well"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin broken of broken-dist 0.2", "cannot be imported", error)
    assert catalog.get("scorers", "well") and rest_works(catalog)


@pytest.mark.parametrize(("misspelt", "meant"), [("scorer", "scorers"), ("alocators", "allocators")])
def test_a_misspelt_hook(site, misspelt, meant):
    site.install("typo-dist", typo=SCORER.format(name="typo").replace("def scorers", f"def {misspelt}"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin typo of typo-dist 1.0", f"no hook {misspelt!r}", f"did you mean {meant!r}?")
    assert rest_works(catalog)


def test_a_hook_without_its_decorator(site):
    site.install("bare-dist", bare=SCORER.format(name="bare").replace("@hookimpl", ""))
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin bare of bare-dist 1.0", "implements no hook", "hookimpl")
    assert rest_works(catalog)


def test_one_module_named_twice(site):
    site.install("again-dist", again=SCORER.format(name="again"))
    points = next(site.folder.glob("again_dist*")) / "entry_points.txt"
    points.write_text(points.read_text() + f"twice = {site.modules[-1]}\n")
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin twice of again-dist 1.0", "another plugin has already brought")
    assert catalog.get("scorers", "again")


def test_a_hook_that_takes_an_argument(site):
    site.install("greedy-dist", greedy=SCORER.format(name="greedy").replace("scorers()", "scorers(model)"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin greedy of greedy-dist 1.0", "not usable", "model")
    assert "\n" not in site.problems(catalog)[0]
    assert rest_works(catalog)


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ("return Mine", "must return a list of classes"),
        ("return None", "must return a list of classes, found None"),
        ("return [Mine()]", "expected a class derived from Scorer"),
        ("return ['mine']", "expected a class derived from Scorer, found 'mine'"),
        ("return [dict]", "expected a class derived from Scorer, found <class 'dict'>"),
        ("return [Merger]", "expected a class derived from Scorer"),
        ("return [Half]", "Half does not implement score"),
        ("return [Nameless]", 'Nameless must declare its name: name: Literal["..."] = "..."'),
        ("return [Plain]", "Plain must declare its name"),
        ("return [Old]", "Old.prepare takes (self, weight); a Scorer must have def prepare(self, weight, site)"),
        ("return [Other]", "Other must declare its name"),
        ("return [Listed]", "Listed has an option that cannot be hashed, sizes: list[int]; use tuple[...]"),
        ("raise RuntimeError('not today')", "raised RuntimeError: not today"),
        ("raise SystemExit(1)", "raised SystemExit"),
    ],
)
def test_a_hook_that_returns_the_wrong_thing(site, returned, complaint):
    source = SCORER.format(name="mine").replace("return [Mine]", returned)
    source += """
from prunekit.registry import HistoryMerger
class Merger(HistoryMerger):
    name: Literal["merger"] = "merger"
    def merge(self, probe, history, site): return probe
class Half(Scorer):
    name: Literal["half"] = "half"
    def prepare(self, weight, site): return weight
class Old(Scorer):
    name: Literal["old"] = "old"
    def prepare(self, weight): return weight
    def score(self, prepared, statistic): return statistic
class Nameless(Scorer):
    def prepare(self, weight, site): return weight
    def score(self, prepared, statistic): return statistic
class Plain(Nameless):
    name: str = "plain"
class Other(Nameless):
    name: Literal["other", "another"] = "other"
class Listed(Mine):
    name: Literal["listed"] = "listed"
    sizes: list[int] = [1]
"""
    site.install("wrong-dist", wrong=source, well=SCORER.format(name="well"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "hook scorers of plugin wrong (wrong-dist 1.0)", complaint)
    assert not {"mine", "half", "old", "plain", "other", "listed", "merger"} & set(catalog.names("scorers"))
    assert catalog.get("scorers", "well") and rest_works(catalog)


def test_a_plugin_for_another_api_is_named_and_left_out(site):
    site.install("later-dist", later="PLUGIN_API = 2" + SCORER.format(name="later"), now=SCORER.format(name="now"))
    site.install("stated-dist", stated=f"PLUGIN_API = {PLUGIN_API}" + SCORER.format(name="stated"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin later of later-dist 1.0 is written for plugin API 2, and this prunekit has 1")
    assert "later" not in catalog.names("scorers")
    assert catalog.get("scorers", "now") and catalog.get("scorers", "stated") and rest_works(catalog)


def test_a_plugin_that_fails_half_way_keeps_its_other_hooks(site):
    site.install("half-dist", half=SCORER.format(name="whole") + "\n@hookimpl\ndef evaluators(): return 1 / 0\n")
    catalog = Catalog.discover()
    site.only_problem(catalog, "hook evaluators of plugin half (half-dist 1.0) raised ZeroDivisionError")
    assert catalog.get("scorers", "whole") and rest_works(catalog)


def test_one_wrong_class_leaves_its_neighbours(site):
    site.install("mixed-dist", mixed=SCORER.format(name="mine").replace("return [Mine]", "return [dict, Mine]"))
    catalog = Catalog.discover()
    site.only_problem(catalog, "found <class 'dict'>")
    assert catalog.get("scorers", "mine")


@pytest.mark.parametrize("block", ["loud", "loud-dist", "Loud_Dist", " quiet-dist , loud "])
def test_block_by_plugin_or_distribution(site, monkeypatch, block):
    site.install("loud-dist", loud="raise RuntimeError('imported although it is blocked')")
    site.install("quiet-dist", quiet=SCORER.format(name="quiet"))
    site.only_problem(Catalog.discover(), "loud-dist")
    monkeypatch.setenv("PRUNEKIT_BLOCK", block)
    catalog = Catalog.discover()
    assert site.problems(catalog) == []
    assert "loud (loud-dist 1.0)" in catalog.blocked
    assert ("quiet" in catalog.names("scorers")) is ("quiet" not in block)
    assert rest_works(catalog)


def test_block_names_a_built_in(site, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_BLOCK", "flap")
    catalog = Catalog.discover()
    assert set(catalog.names("strategies")) >= BUILT_IN["strategies"] - {"flap"}
    with pytest.raises(PluginError, match=r"(?s)no Strategy is called 'flap'.*PRUNEKIT_BLOCK switches off plugin flap"):
        catalog.get("strategies", "flap")


def test_a_distribution_without_metadata(site):
    """As an interrupted installation leaves it: the plugin works, and so does everything else."""
    site.install("half-dist", half=SCORER.format(name="half"), broken="1 / 0")
    (next(site.folder.glob("half_dist*")) / "METADATA").unlink()
    catalog = Catalog.discover()
    site.only_problem(catalog, "plugin broken of unknown distribution cannot be imported")
    (entry,) = [entry for entry in catalog.of_role("scorers") if entry.name == "half"]
    assert entry.provider == "unknown distribution" and rest_works(catalog)


def test_block_of_something_unknown_is_said(site, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_BLOCK", "wnada_sp")
    catalog = Catalog.discover()
    site.only_problem(catalog, "PRUNEKIT_BLOCK", "wnada-sp", "did you mean 'wanda-sp'?")
    assert rest_works(catalog)


def test_an_unknown_component(site):
    site.install("broken-dist", broken="1 / 0")
    catalog = Catalog.discover()
    with pytest.raises(PluginError) as caught:
        catalog.get("scorers", "wandasp")
    message = str(caught.value)
    assert "no Scorer is called 'wandasp' (did you mean 'wanda_sp'?" in message
    assert all(name in message for name in BUILT_IN["scorers"])
    assert "plugin broken of broken-dist" in message  # it may be the one that was meant


@pytest.mark.parametrize("missing", [("applier",), ("scorer", "allocator")])
def test_a_strategy_without_a_part_is_refused_when_it_is_found(tmp_path, missing):
    parts = {
        "scorer": "scorer: Scorer = MagnitudeScorer()",
        "allocator": "allocator: SparsityAllocator = Uniform()",
        "applier": "applier: MaskApplier = Slice()",
    }
    file = tmp_path / "edgy.py"
    file.write_text(f"""
from typing import Literal
from prunekit.registry import MaskApplier, Scorer, SparsityAllocator, Strategy, hookimpl
from prunekit.strategies.allocation import Uniform
from prunekit.strategies.application import Slice
from prunekit.strategies.magnitude import MagnitudeScorer

class Edgy(Strategy):
    name: Literal["edgy"] = "edgy"
    {"; ".join(line for part, line in parts.items() if part not in missing)}

@hookimpl
def strategies():
    return [Edgy]
""")
    with pytest.raises(PluginError) as caught:
        Catalog.discover(files=[file], block="")
    message = str(caught.value)
    assert f"file {file}" in message and f"Edgy has no {', '.join(missing)}; add to the class" in message
    assert all(f"{part}: {PARTS[part]}" in message for part in missing)


def test_the_examples_of_parts_can_be_imported():
    for example in PARTS.values():
        role, made, home = re.fullmatch(r"(\w+) = (\w+)\(\), from ([\w.]+)", example).groups()
        assert isinstance(getattr(importlib.import_module(home), made)(), getattr(registry, role))


def test_a_component_is_named_by_its_role_and_plugin():
    assert named(registry.PerPrompt()) == "policy 'per_prompt' of plugin prunekit"
    assert list(map(singular, ("strategies", "probe_selectors", "scorers"))) == ["strategy", "probe_selector", "scorer"]


def test_the_name_of_another_part_is_called_so():
    with pytest.raises(PluginError, match=r"no Strategy is called 'residual_norm'.*part: probe selector; there are"):
        Catalog.discover().get("strategies", "residual_norm")
