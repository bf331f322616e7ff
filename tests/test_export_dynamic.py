"""The profile dynamic: a pruned model comes back exactly as calibration left it, and no code with it."""

import json

import pytest
import torch
import yaml
from prunekit.compress import Exporter, PipelineSpec, load, prune
from prunekit.compress.engine.runtime import Runtime
from prunekit.compress.export.dynamic_state import STATE, restore, save_state
from prunekit.registry import Catalog, DataError, ModelError, PluginError, SpecError
from safetensors.torch import load_file, save_file

STRATEGIES = {
    "pp": ("pp", {}),
    "mean": ("pp", {"compensate": "mean"}),
    "probe_mean": ("pp", {"compensate": "probe_mean"}),
    "least squares": ("pp", {"compensate": "least_squares"}),
    "solved": ("pp", {"compensate": {"name": "least_squares", "per_batch": "solve"}}),
    "low rank": ("pp", {"compensate": "low_rank_least_squares"}),
    "checked shares": ("pp", {"compensate": {"name": "least_squares", "check": True}}),
    "held out": ("pp", {"compensate": {"name": "least_squares", "held_out": 2}}),
    "half history": ("pp", {"history": {"dtype": "float16", "pool": 4}}),
    "no history": ("pp", {"merger": "probe_only"}),
    "once": ("flap", {}),
    "once, with a slope": ("wanda_sp", {"compensate": "least_squares"}),
    "reconstruct": ("reconstruct", {}),
    "fluctuation": ("pp", {"scorer": "fluctuation", "compensate": "mean"}),
    "dense outputs": ("obs", {"compensate": {"target": "dense_outputs"}}),
    "dense stream": ("obs", {"compensate": {"target": "dense_stream"}}),
    "skipped layer": ("pp", {"skip_layers": [0]}),
}


@pytest.mark.parametrize("named", STRATEGIES)
def test_what_was_saved_computes_the_same_batch_after_batch(named, make_model, batches, tmp_path):
    name, options = STRATEGIES[named]
    model, catalog = make_model("llama-gqa"), Catalog.discover()
    with prune(model, name, ratio=0.4, calibration=batches, **options) as pruned:
        model(batches[1]["input_ids"])  # a history that has moved on is put back first
        save_state(pruned, tmp_path)
        strategy, about = pruned.strategy, pruned.about_compensation()
        expected = [model(batch["input_ids"]).logits for batch in batches]
    with restore(model, strategy, catalog, tmp_path, Runtime()) as again:
        found = [model(batch["input_ids"]).logits for batch in batches]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert again.about_compensation() == about
        again.reset()
        assert torch.equal(model(batches[0]["input_ids"]).logits, expected[0])


@pytest.fixture
def exported(small_pipeline, tmp_path):
    """Exports a dynamic pruning and returns its folder."""

    def export(**strategy):
        spec = PipelineSpec.of(small_pipeline(**{"use": "pp", **strategy}))
        Exporter(spec, "dynamic", tmp_path / "dynamic").export()
        return tmp_path / "dynamic"

    return export


def test_loading_gives_the_pruned_model(exported, small_pipeline):
    folder = exported()
    found = load(folder)
    assert found.pruned.strategy.name == "pp" and found.pruned.strategy.dynamic
    manifest = json.loads((folder / "prunekit.json").read_text())
    assert manifest["check"]["logits"] == "equal"
    assert manifest["metrics"][0]["exported"]["perplexity"] != manifest["metrics"][0]["dense"]["perplexity"]
    assert not list(folder.glob("model*.safetensors")) and found.tokenizer("w1 w2")["input_ids"] == [4, 5]
    found.pruned.remove()


def test_other_weights_are_refused(exported, tmp_path, save_model):
    folder = exported()
    save_model(tmp_path / "other", "llama-gqa", seed=1)
    with pytest.raises(DataError, match=r"other weights than this was exported from"):
        load(folder, base=str(tmp_path / "other"))
    assert load(folder, base=str(tmp_path / "other"), check=False).pruned is not None


def test_a_base_that_has_moved_is_named(exported, tmp_path):
    folder = exported()
    (tmp_path / "base-llama-gqa").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="does not exist"):
        load(folder)
    assert load(folder, base=str(tmp_path / "elsewhere")).pruned is not None


def test_code_that_a_recipe_names_is_not_run(exported, tmp_path):
    folder = exported()
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "plugins": [str(plugin)]}))
    load(folder, check=False)
    assert not (tmp_path / "ran").exists()
    recipe["prune"]["scorer"] = {"name": "of_the_plugin"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "plugins": [str(plugin)]}))
    with pytest.raises((SpecError, PluginError), match=r"of_the_plugin[\s\S]*run only where they are named.*plugin.py"):
        load(folder, check=False)
    assert not (tmp_path / "ran").exists()
    recipe["model"]["trust_remote_code"] = True
    del recipe["prune"]["scorer"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load(folder, check=False)


def test_damage_is_named(exported):
    folder = exported()
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-1000])
    with pytest.raises(DataError, match=rf"{STATE} has .* bytes, .* were written"):
        load(folder)
    with pytest.raises(DataError, match=rf"{STATE} cannot be read"):
        load(folder, check=False)


def test_a_state_of_other_sites_is_named(exported):
    folder = exported()
    tensors = load_file(folder / STATE)
    from safetensors import safe_open

    with safe_open(folder / STATE, "pt") as file:
        metadata = file.metadata()
    sites = json.loads(metadata["sites"])
    sites["somewhere.else"] = sites.pop(next(iter(sites)))
    save_file(tensors, folder / STATE, {**metadata, "sites": json.dumps(sites)})
    with pytest.raises(DataError, match="other sites"):
        load(folder, check=False)
    save_file({**tensors, "more": torch.zeros(1)}, folder / STATE, metadata)
    with pytest.raises(DataError, match="1 tensors have no place, such as more"):
        load(folder, check=False)
    save_file(tensors, folder / STATE, {**metadata, "format": "of tomorrow"})
    with pytest.raises(DataError, match="of tomorrow"):
        load(folder, check=False)


def test_what_is_not_made_of_tensors_cannot_be_written(make_model, batches, tmp_path):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches, compensate="least_squares") as pruned:
        pruned.cuts[0].compensation.prepared = {"a": 1}
        with pytest.raises(SpecError, match="prepared a dict, and only tensors"):
            save_state(pruned, tmp_path)
    assert not list(tmp_path.iterdir())
