"""Pages for new readers: methods with their formulas, published values, tutorials whose code works."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from prunekit.compress.ablation.study import Study
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import Catalog, PlainSubject
from prunekit.registry.checks import check_component, check_evaluation, check_sites

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = (DOCS / "methods.md").read_text(encoding="utf-8")
REPRODUCE = (DOCS / "reproduce.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", METHODS, re.MULTILINE | re.DOTALL))
COMMANDS = {"alpha", "argmin", "bar", "beta", "cdot", "ell", "frac", "in", "lVert", "lambda", "left", "leftarrow"}
COMMANDS |= {"lvert", "mathrm", "max", "mu", "rVert", "right", "rvert", "sigma", "sqrt", "sum", "top"}
"""What formulas may use: GitHub and the site show these alike."""


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


@pytest.fixture
def tutorial(tmp_path):
    """The catalog with the module of a tutorial, its components, and the tutorial's YAML blocks."""

    def read(name: str):
        page, file = (DOCS / f"{name}.md").read_text(encoding="utf-8"), tmp_path / "example.py"
        (source,) = blocks(page, "python")
        file.write_text(source)
        found = Catalog.discover(files=[file], block="")
        ours = [entry.component for entry in found.entries if entry.provider == f"file {file}"]
        for component in ours:
            check_component(component)
        return found, ours, blocks(page, "yaml")

    return read


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_every_strategy_has_a_section(catalog):
    ours = {e.name for e in catalog.entries if e.role == "strategies" and e.provider.startswith("prunekit ")}
    assert set(SECTIONS) == ours and METHODS.count("\n### ") == len(ours)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_a_formula_a_line_of_yaml_and_the_papers_number(catalog, name):
    (line,) = blocks(SECTIONS[name], "yaml")
    prune = PipelineSpec.of(yaml.safe_load(line), catalog=catalog).prune
    assert prune.name == name and len(line.splitlines()) == 1
    assert "$" in SECTIONS[name] or name.startswith("pp_reference")
    paper = re.search(r"\d{4}\.\d{5}", getattr(prune, "paper", ""))
    assert not paper or paper[0] in SECTIONS[name] or name in ("pp_reference", "full_batch_probing", "expert_frequency")


def test_formulas_are_simple():
    """On one line, with commands that the site can write as MathML too, and nothing that Markdown reads itself."""
    shown = re.findall(r"^\$\$(.*)\$\$$", METHODS, re.MULTILINE)
    lines = re.sub(r"^(\$\$.*\$\$|```.*?^```)$", "", METHODS, flags=re.MULTILINE | re.DOTALL).splitlines()
    assert len(shown) > 30 and all(line.count("$") % 2 == 0 for line in lines)
    for formula in [*shown, *(found for line in lines for found in re.findall(r"\$([^$]*)\$", line))]:
        assert set(re.findall(r"\\([a-zA-Z]+|.)", formula)) <= COMMANDS, formula
        assert formula.count("{") == formula.count("}") and not re.search(r"[|<>&*]|^\s|\s$", formula), formula


@pytest.mark.parametrize("file", ["main", "fine-tuned", "flap", "tyr"])
def test_published_values_are_those_of_the_study(file):
    (row,) = re.findall(rf"^\|.*\[{file}\]\(studies/{file}\.yaml\).*\| ([^|]*) \|$", REPRODUCE, re.MULTILINE)
    model, ratio, listed = re.fullmatch(r"(\S+) at (\d+)%: (.*)", row).groups()
    entries = yaml.safe_load((DOCS / "studies" / f"{file}.yaml").read_text(encoding="utf-8"))["published"]
    known = {}
    for entry in entries:
        where = entry["where"]
        fits = where.get("model", model.lower()) == model.lower() and entry["metric"] == "perplexity.perplexity"
        if fits and (entry.get("dense") or where["prune.ratio"] == int(ratio) / 100):
            known[re.sub(r"\W|_", "", where.get("strategy", "dense"))] = entry["value"]
    told = {re.sub(r"\W", "", name).lower(): float(value) for name, value in re.findall(r"([\w -]+) ([\d.]+)", listed)}
    assert told == known


def test_a_score_of_ones_own(tutorial, tmp_path, make_model, batches):
    from prunekit.compress import prune

    found, ours, (study,) = tutorial("write-a-strategy")
    (tmp_path / "compare.yaml").write_text(study.replace("\nbase:\n", "\nbase:\n  plugins: [example.py]\n"))
    assert len(Study.load(tmp_path / "compare.yaml").trials) == 6
    scorer = next(each for each in ours if hasattr(each, "score"))()
    weight, statistic = torch.randn(5, 8), torch.rand(8)
    energy = torch.stack([sum(weight[o, c] ** 2 for o in range(5)) * statistic[c] for c in range(8)])
    torch.testing.assert_close(scorer.score(scorer.prepare(weight, None), statistic), energy)
    model = make_model("llama-gqa")
    with prune(model, "keep_energy", ratio=0.5, calibration=batches, catalog=found) as pruned:
        assert set(pruned.counts.values()) == {2, 96} and model(**batches[0]).logits.isfinite().all()


def test_an_evaluator_of_ones_own(tutorial, tmp_path, make_model):
    found, (evaluator,), (pipeline,) = tutorial("write-an-evaluator")
    assert len(PipelineSpec.of(yaml.safe_load(pipeline), tmp_path, catalog=found).evaluate) == 3

    def letters(text, **kwargs):
        return {"input_ids": [3 + ord(character) % 90 for character in text]}

    subject = PlainSubject(make_model("llama-gqa"), letters, ["abcdef" * 20])
    check_evaluation(evaluator(tokens=64), subject)
    assert evaluator(tokens=64).evaluate(subject).values == {"same_choice": 1.0}


def test_an_architecture_of_ones_own(tutorial, tmp_path):
    _, (architecture,), (pipeline,) = tutorial("write-an-architecture")
    assert PipelineSpec.of(yaml.safe_load(pipeline), tmp_path).architecture.like == "opt"
    config = transformers.BioGptConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BioGptForCausalLM(config).eval()
    for unit in ("kv_group", "query_head"):
        check_sites(architecture(), model, unit)
