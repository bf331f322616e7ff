"""What an exported folder may claim, and what is believed: tasks that bring code, texts that changed, extra files."""

import json

import pytest
import torch
import yaml
from prunekit.compress import Exporter, PipelineSpec, load, prune
from prunekit.compress.export import exporting
from prunekit.compress.export.comparing import check_tokenizer
from prunekit.compress.export.cut_model import layer_shapes, sliced_tensors
from prunekit.registry import DataError, ModelError, SpecError


@pytest.fixture
def exported(small_pipeline, tmp_path):
    Exporter(PipelineSpec.of(small_pipeline(use="wanda_sp")), "hf-hetero", tmp_path / "out").export()
    return tmp_path / "out"


def change(folder, **parts):
    manifest = json.loads((folder / "prunekit.json").read_text())
    (folder / "prunekit.json").write_text(json.dumps({**manifest, **parts}))
    return manifest


def test_tasks_that_a_manifest_names_are_not_run(exported, tmp_path, command):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "helper.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(doc): return ''\n")
    (tasks / "task.yaml").write_text("task: mine\ndoc_to_text: !function helper.f\n")
    metric = {"label": "zero_shot", "dense": {}, "per_batch": None, "exported": {"mine": 1.0}, "protocol": {}}
    change(exported, metrics=[{**metric, "evaluator": {"name": "zero_shot", "task_folder": [str(tasks)]}}])
    code, output = command("verify", exported)
    assert code == 0 and "not checked" in output and "may run code" in output
    assert not (tmp_path / "ran").exists()


def test_numbers_that_are_none_do_not_hold(exported, command):
    metrics = change(exported)["metrics"]
    metrics[0]["exported"]["perplexity"] = "nan"
    change(exported, metrics=metrics)
    code, output = command("verify", exported)
    assert code == 1 and "perplexity fails" in output
    change(exported, metrics=[])
    code, output = command("verify", exported)
    assert code == 0 and "none were recorded" in output


def test_files_that_change_a_model_are_noticed(exported):
    for name in ("chat_template.jinja", "adapter_config.json", "added_tokens.json"):
        (exported / name).write_text("{}")
        with pytest.raises(DataError, match=rf"{name} was not written by the export"):
            load(exported)
        (exported / name).unlink()
    (exported / ".gitattributes").write_text("x")
    load(exported)


def test_files_outside_of_the_folder_are_noticed(exported):
    """Such a file could change unnoticed after the check."""
    outside = exported.parent / "config.json"
    (exported / "config.json").rename(outside)
    (exported / "config.json").symlink_to(outside)
    with pytest.raises(DataError, match=r"config\.json is a link to a file outside of the folder"):
        load(exported)


def test_weights_that_the_index_places_outside_are_not_loaded(exported):
    """The manifest lists the index, and no weights."""
    from prunekit.compress.models.exported.manifest import read_manifest, write_manifest
    from safetensors import safe_open

    outside = exported.parent / "outside.safetensors"
    (exported / "model.safetensors").rename(outside)
    with safe_open(outside, framework="pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "../outside.safetensors")}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(exported, read_manifest(exported))
    with pytest.raises(ModelError, match=r"'\.\./outside\.safetensors', outside of the folder"):
        load(exported)


def test_a_run_on_a_text_that_has_changed_is_not_taken_over(small_pipeline, tmp_path, command):
    content = small_pipeline(use="magnitude")
    file = tmp_path / "pipeline.yaml"
    content["prune"] = {"use": "wanda_sp", "ratio": 0.4}
    file.write_text(yaml.safe_dump(content))
    assert command("run", file, "--out", tmp_path / "run")[0] == 0
    text = tmp_path / "base-llama-gqa" / "text.txt"
    text.write_text(" ".join(reversed(text.read_text().split())))
    code, output = command("export", tmp_path / "run", "--profile", "hf-hetero", "--out", tmp_path / "out")
    assert code == 0 and "of another cut" in output
    manifest = json.loads((tmp_path / "out" / "prunekit.json").read_text())
    run = json.loads((tmp_path / "run" / "results.json").read_text())
    assert manifest["run"] is None
    assert manifest["metrics"][0]["dense"]["perplexity"] != run["metrics"][0]["dense"]["perplexity"]


def test_the_model_itself_is_not_replaced(exported, small_pipeline):
    content = {**small_pipeline(use="pp"), "model": {"name": str(exported)}}
    with pytest.raises(SpecError, match="names the model that is to be pruned"):
        Exporter(PipelineSpec.of(content), "dynamic", exported, overwrite=True).export()
    load(exported)


def test_an_uneven_model_gets_equal_counts_that_every_layer_can_have(exported, small_pipeline, tmp_path):
    uneven = {"name": "explicit", "attention": [0, 0.5, 0.25], "mlp": [0.5, 0, 0.25]}
    content = small_pipeline(use="magnitude")
    content["prune"] = {"use": "magnitude", "allocator": uneven}
    Exporter(PipelineSpec.of(content), "hf-hetero", tmp_path / "uneven").export()
    again = {**content, "model": {"name": str(tmp_path / "uneven")}, "prune": {"use": "magnitude", "ratio": 0.1}}
    manifest = Exporter(PipelineSpec.of(again), "hf-uniform", tmp_path / "even").export()
    assert len({layer.mlp.kept for layer in manifest.layers}) == 1


def test_unequal_query_heads_are_refused(make_model):
    model = make_model("llama-gqa")
    with prune(model, "random", ratio=0.5, attention_unit="query_head") as pruned:
        for cut in pruned.cuts:
            if cut.site.kind == "attention":
                cut.state.fix(torch.tensor([2, 3, 6, 7]))
        with pytest.raises(SpecError, match=r"0, 2, 0, 2 of them are left for the 4 key/value heads"):
            layer_shapes(pruned, sliced_tensors(pruned))


def test_a_tokenizer_that_comes_back_different_is_noticed(small_pipeline, tmp_path, make_tokenizer, monkeypatch):
    one, other = make_tokenizer(), make_tokenizer()
    check_tokenizer(one, other)
    with pytest.raises(ModelError, match="splits text otherwise"):
        check_tokenizer(one, lambda text: {"input_ids": [1]})

    def differs(before, after):
        raise ModelError("splits text otherwise")

    monkeypatch.setattr(exporting, "check_tokenizer", differs)
    with pytest.raises(ModelError, match="splits text otherwise"):
        Exporter(PipelineSpec.of(small_pipeline(use="magnitude")), "padded", tmp_path / "out").export()
    assert not (tmp_path / "out").exists()
