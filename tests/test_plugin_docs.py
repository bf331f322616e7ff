"""The page about plugins is complete, and its examples prune and measure."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Literal

import pytest
import torch
from prunekit.compress import check_architecture, prune
from prunekit.registry import (
    ROLES,
    Catalog,
    ChannelHistory,
    Measurement,
    PlainSubject,
    PluginError,
    Scorer,
    Site,
    Subject,
)
from prunekit.registry.checks import ALL_ROLE_CHECKS, COMMON, check_evaluation, check_sites

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "plugins.md").read_text()
EXAMPLE = DOCS / "examples" / "plugin" / "prunekit_max_weight.py"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


class EveryOther(Scorer):
    """Channels with even numbers before those with odd ones."""

    name: Literal["every_other"] = "every_other"

    def prepare(self, weight, site):
        return 1.0 - torch.arange(weight.shape[1]) % 2

    def score(self, prepared, statistic):
        return prepared


@pytest.fixture
def load(tmp_path):
    """The catalog with one of the page's examples, and the entries that the example brought."""

    def catalog(source: str):
        file = tmp_path / "example.py"
        file.write_text(source)
        found = Catalog.discover(files=[file], block="")
        assert not [problem for problem in found.problems if str(file) in problem]
        return found, [entry for entry in found.entries if entry.provider == f"file {file}"]

    return catalog


def example_of(role: str) -> str:
    """The first example with a hook."""
    return next(source for source in EXAMPLES if f"\ndef {role}():" in source)


@pytest.mark.parametrize("role", ROLES)
def test_every_hook_has_a_section_and_an_example(role):
    assert f"\n### `{role}`\n" in PAGE
    section = PAGE.split(f"\n### `{role}`\n")[1].split("\n### ")[0]
    assert f"\ndef {role}():" in section or f"\ndef {role}():" in EXAMPLES[0]


def test_every_check_is_listed():
    checks = [*COMMON, *(check for each in ALL_ROLE_CHECKS.values() for check in each)]
    checks += [check_sites, check_architecture, check_evaluation]
    listed = re.findall(r"^\| `(check_\w+)", PAGE, re.MULTILINE)
    assert listed == list(dict.fromkeys(listed))
    assert set(listed) == {check.__name__ for check in checks}


def test_the_page_shows_the_package_as_it_is():
    assert EXAMPLES[0] == EXAMPLE.read_text()
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 30
    assert f"{len(lines)} lines of code" in PAGE


@pytest.mark.parametrize("role", ["scorers", "probe_selectors", "history_mergers", "allocators", "compensators"])
def test_examples_prune(load, make_model, batches, role):
    catalog, entries = load(example_of(role))
    (name,) = [entry.name for entry in entries if entry.role == role]
    others = {"probe_selectors": "selector", "history_mergers": "merger", "compensators": "compensate"}
    option = others.get(role, role[:-1])
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.5, calibration=batches, catalog=catalog, **{option: name}) as pruned:
        assert getattr(pruned.strategy, option).name == name
        cut = model(**batches[0]).logits
        assert cut.isfinite().all()
        with pruned.dense():
            assert not torch.equal(cut, model(**batches[0]).logits)


@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
def test_the_statistic_example(load, make_model, batches, strategy):
    (source,) = [source for source in EXAMPLES if "(Statistic):" in source]
    catalog, (entry,) = load(source)
    statistic, history = entry.component().statistic, ChannelHistory(3, torch.device("cpu"))
    x, valid = torch.randn(4, 5, 3), torch.arange(5) >= torch.tensor([0, 2, 1, 0])[:, None]
    statistic.observe(history, x[:1], valid[:1])
    statistic.observe(history, x[1:], valid[1:])
    expected = torch.stack([x[valid[:, position], position].abs().mean(0) for position in range(5)])
    torch.testing.assert_close(history.table, expected)
    torch.testing.assert_close(statistic.measure(x, valid, None), expected)
    model = make_model("llama-gqa")
    with prune(model, strategy, ratio=0.5, calibration=batches, catalog=catalog, scorer=entry.name) as pruned:
        assert set(pruned.counts.values()) == {2, 96} and model(**batches[0]).logits.isfinite().all()


def test_the_strategy_example_prunes(load, make_model, batches):
    (source,) = [source for source in EXAMPLES if "(Strategy):" in source]
    catalog, (entry,) = load(source)
    model = make_model("llama-gqa")
    with prune(model, entry.name, ratio=0.5, calibration=batches, catalog=catalog) as pruned:
        assert set(pruned.counts.values()) == {2, 96} and model(**batches[0]).logits.isfinite().all()
    more = dict(selector="residual_norm", merger="importance_scaled")  # as the page says
    with prune(model, entry.name, ratio=0.5, calibration=batches, catalog=catalog, **more) as pruned:
        assert pruned.strategy.dynamic


def test_every_field_of_a_site_is_described():
    section = PAGE.split("\n### `architectures`\n")[1].split("\n### ")[0]
    assert not [
        field.name for field in fields(Site) if not re.search(rf"^\|[^|]*`{field.name}`", section, re.MULTILINE)
    ]


def test_a_plugin_file_cannot_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_example.py").write_text("x = 1")
    file = tmp_path / "example.py"
    file.write_text("import neighbour_of_example\n" + EXAMPLES[0])
    with pytest.raises(PluginError, match="No module named 'neighbour_of_example'"):
        Catalog.discover(files=[file])


def test_the_applier_example_equals_slicing(load, make_model, batches):
    catalog, _ = load(example_of("mask_appliers"))
    model, logits = make_model("llama-gqa"), []
    for applier in ("slice", "zero_both"):
        with prune(model, "wanda_sp", ratio=0.5, calibration=batches, catalog=catalog, applier=applier):
            logits.append(model(**batches[0]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_compensator_example_gives_back(load, make_model, batches):
    """Where dropped channels are multiples of kept ones, a neighbour restores the dense output; the mean does not."""
    catalog, (entry,) = load(example_of("compensators"))
    errors = {}
    for name in ("none", "mean", entry.name):
        model = make_model("llama-gqa")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate_proj.weight[1::2] = layer.mlp.gate_proj.weight[::2]
                layer.mlp.up_proj.weight[1::2] = -0.5 * layer.mlp.up_proj.weight[::2]
            dense = model(**batches[0]).logits
        option = {"name": name, "ridge": 1e-6} if name == entry.name else name
        allocator = {"name": "explicit", "attention": [0, 0, 0], "mlp": [0.5, 0.5, 0.5]}
        options = dict(allocator=allocator, compensate=option, calibration=batches, catalog=catalog)
        with prune(model, "wanda_sp", scorer=EveryOther(), **options), torch.no_grad():
            errors[name] = float((model(**batches[0]).logits - dense).abs().max())
    assert errors[entry.name] < 1e-3 < 0.1 < min(errors["none"], errors["mean"])


def test_the_architecture_example_fits_its_model(load, batches):
    import transformers

    config = transformers.BioGptConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    catalog, (entry,) = load(example_of("architectures"))
    logits = []
    for unit in ("kv_group", "query_head"):
        check_sites(entry.component(), model, unit)
    for applier in ("slice", "zero"):
        with prune(model, "wanda_sp", ratio=0.5, calibration=batches, catalog=catalog, applier=applier):
            logits.append(model(**batches[0]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], model(**batches[0]).logits, atol=1e-3)


def test_the_evaluator_example_measures(load, make_model):
    class Letters:
        def __call__(self, text, **kwargs):
            return {"input_ids": [3 + ord(character) % 90 for character in text]}

    _, (entry,) = load(example_of("evaluators"))
    subject = PlainSubject(make_model("llama-gqa"), Letters(), ["abcdef" * 20])
    check_evaluation(entry.component(tokens=64), subject)


@pytest.mark.parametrize(
    "names",
    [
        ["model", "tokenizer", *(name for name in vars(Subject) if not name.startswith("_"))],
        [field.name for field in fields(Measurement)],
    ],
)
def test_all_that_evaluators_get_and_give_is_described(names):
    section = PAGE.split("\n### `evaluators`\n")[1].split("\n### ")[0]
    missing = [name for name in names if not re.search(rf"`{name}[`(]", section)]
    assert not missing
