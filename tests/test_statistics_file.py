"""Calibration statistics in a file: gathered once, read again, and refused where they are of something else."""

import json
import os

import pytest
import torch
from prunekit.compress import Pipeline, prune
from prunekit.compress.calibration import statistics_file
from prunekit.compress.calibration.statistics_file import StatisticsFile
from prunekit.compress.runs import pipeline
from prunekit.registry import DataError, SpecError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(make_counting):
    return make_counting()


def outcome(model, calibration, use="pp", **options):
    """What a pruning shows: decisions, logits of a batch, bytes held; and how many passes calibration took."""
    model.passes = 0
    ids = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(3))
    with prune(model, use, ratio=0.4, calibration=calibration, trace=True, **options) as pruned, torch.no_grad():
        passes, logits = model.passes, model(ids, use_cache=False).logits
        return (pruned.trace, pruned.counts, pruned.held_bytes(), logits.tolist()), passes


def left_in(folder):
    """What is in a folder, but for the lock."""
    return [entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock")]


RUNS = [
    ("pp", {}),
    ("pp", {"compensate": "mean"}),
    ("flap", {}),
    ("flap", {"compensate": "none"}),
    ("wanda_sp", {"skip_layers": (1,)}),
    ("pp", {"attention_unit": "query_head"}),
    ("flap_reference", {}),
    ("magnitude", {"compensate": "mean", "allocator": "uniform"}),
    ("pp", {"history": {"pool": 4}}),
]


@pytest.mark.parametrize(("use", "statistic"), [("pp", "MeanSquare"), ("flap", "Fluctuation")])
def test_a_file_of_version_0_1_is_read(model, batches, tmp_path, use, statistic):
    """It names statistics by the module that they were in, and says how padding was treated."""
    path = tmp_path / "statistics.safetensors"
    outcome(model, batches, use, statistics=path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def old(name):
        place, _, rest = name.partition(":")
        return f"{place}:prunekit.registry.statistics.{statistic}:{rest.partition(':')[2]}" if rest else name

    renamed = {old(name): value for name, value in metadata.items()}
    save_file({old(name): t for name, t in load_file(path).items()}, path, {**renamed, "pad_handling": "exclude"})
    file = StatisticsFile(path)
    assert outcome(model, batches, use, statistics=file)[1] == 0
    assert file.used == "read"


def test_one_file_serves_every_strategy(model, batches, tmp_path):
    """And each decides as without it, whether it gathered its statistics, or found them."""
    path, gathered = tmp_path / "statistics.safetensors", []
    for _ in range(2):
        for use, options in RUNS:
            expected, _ = outcome(model, batches, use, **options)
            file = StatisticsFile(path)
            found, passes = outcome(model, batches, use, statistics=file, **options)
            assert found == expected, (use, options)
            assert file.used == ("written" if passes else "read")
            gathered.append(passes)
    # Mean squares, fluctuations, those of FLAP's own code, and the means of a scorer without a statistic.
    assert gathered == [4, 0, 4, 0, 0, 0, 4, 4, 0] + [0] * 9
    assert left_in(tmp_path) == ["statistics.safetensors"]


def test_others_may_read_it_as_any_new_file(model, batches, tmp_path):
    path, plain = tmp_path / "s.safetensors", tmp_path / "plain"
    plain.touch()
    outcome(model, batches, statistics=path)
    assert path.stat().st_mode == plain.stat().st_mode


def test_sites_that_were_skipped_are_added(model, batches, tmp_path):
    path = tmp_path / "s.safetensors"
    assert outcome(model, batches, skip_layers=(0,), statistics=path)[1] == 4
    before = set(load_file(path))
    assert outcome(model, batches, statistics=str(path))[1] == 4
    assert before < set(load_file(path))
    assert outcome(model, batches, statistics=path)[1] == 0


def parts_of(path):
    """The tensors of a file, its metadata, and the name of one MLP's table."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    return tensors, metadata, next(name for name in tensors if "layers.1.mlp" in name and name.endswith(".table"))


def test_what_is_in_it(model, batches, tmp_path):
    path = tmp_path / "s.safetensors"
    outcome(model, batches, statistics=path)
    tensors, metadata, table = parts_of(path)
    assert metadata["format"] == "prunekit statistics 1"
    assert len(metadata["model"]) == len(metadata["text"]) == 64
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "layers.1.mlp.down_proj" in table and tensors[table].shape == (24, 192)
    assert float(next(v for k, v in metadata.items() if k.endswith(".tokens"))) == 4 * 4 * 24


# What is refused


def refused(model, batches, path, said, use="pp", error=DataError, **options):
    before = path.read_bytes() if path.is_file() else None
    model.passes = 0
    with pytest.raises(error, match=said):
        prune(model, use, ratio=0.4, calibration=batches, statistics=path, **options)
    assert model.passes == 0, "it must be refused before anything is gathered"
    assert before == (path.read_bytes() if path.is_file() else None)


def test_a_file_of_something_else_is_refused_with_the_reason(model, make_counting, batches, tmp_path):
    path = tmp_path / "s.safetensors"
    outcome(model, batches, statistics=path)
    other = make_counting(seed=1)
    refused(other, batches, path, r"s\.safetensors: these statistics are of another model, .*\(model \w{12}\.\.\.")
    refused(
        make_counting().to(torch.bfloat16),
        batches,
        path,
        "another model, or the same one with other weights or another dtype",
    )
    refused(model, batches[:3], path, r"other calibration text: .*name another file, or delete this one")
    masked = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    refused(model, masked, path, "other calibration text")
    turned = make_counting(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    refused(turned, batches, path, r"another configuration of this model, such as its rotary embeddings")
    assert outcome(model, batches, statistics=path)[1] == 0, "and serves whom it is for as before"


def test_what_is_no_statistics_file_is_refused(model, batches, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_text("hello")
    refused(model, batches, path, r"s\.safetensors cannot be read as statistics .*delete this one")
    save_file({"a": torch.zeros(1)}, path)
    refused(
        model, batches, path, r"holds no statistics of this version \(format None, expected 'prunekit statistics 1'\)"
    )
    save_file({"a": torch.zeros(1)}, path, {"format": "prunekit statistics 0"})
    refused(model, batches, path, r"format 'prunekit statistics 0'")
    refused(model, batches, tmp_path / "nowhere" / "s.safetensors", r"cannot be written: .*nowhere is not a folder")
    (tmp_path / "folder").mkdir()
    refused(model, batches, tmp_path / "folder", "cannot be read|is a folder")


def test_what_another_run_wrote_in_between_is_read_too(model, make_counting, batches, tmp_path):
    """Both find no file; the slower one adds to a file of its own kind, and refuses one of another model."""
    path, same, other = tmp_path / "s.safetensors", make_counting(), make_counting(seed=1)

    def writing(who):
        def progress(items, label, total):
            yield from items
            if not path.exists():
                prune(who, "pp", ratio=0.4, calibration=batches, statistics=path).remove()

        return progress

    prune(model, "flap", ratio=0.4, calibration=batches, statistics=path, progress=writing(same)).remove()
    assert outcome(model, batches, statistics=path)[1] == outcome(model, batches, "flap", statistics=path)[1] == 0
    path.unlink()
    with pytest.raises(DataError, match="these statistics are of another model"):
        prune(model, "flap", ratio=0.4, calibration=batches, statistics=path, progress=writing(other))
    assert outcome(other, batches, statistics=path)[1] == 0, "it is still the other's"


def test_parts_that_are_missing_or_do_not_fit_are_named(model, batches, tmp_path):
    path = tmp_path / "s.safetensors"
    outcome(model, batches, statistics=path)
    tensors, metadata, table = parts_of(path)
    rows, tokens = table.replace(".table", ".rows"), table.replace(".table", ".tokens")
    save_file({name: tensor for name, tensor in tensors.items() if name != table}, path, metadata)
    refused(model, batches, path, r"layers\.1\.mlp.*table is damaged: is not there; delete the file")
    save_file({**tensors, rows: tensors[rows][:7].clone()}, path, metadata)
    refused(model, batches, path, r"layers\.1\.mlp.*rows is damaged: float32 \(7,\)")
    save_file(tensors, path, {**metadata, tokens: "many"})
    refused(model, batches, path, r"layers\.1\.mlp.*tokens is damaged: 'many' is not a number of tokens")


@pytest.mark.parametrize("damage", ["nan", "shape", "dtype"])
def test_damage_is_named(model, batches, tmp_path, damage):
    path = tmp_path / "s.safetensors"
    outcome(model, batches, statistics=path)
    tensors, metadata, name = parts_of(path)
    broken = {"nan": tensors[name] * torch.nan, "shape": tensors[name][:, :5].clone(), "dtype": tensors[name].double()}
    save_file({**tensors, name: broken[damage]}, path, metadata)
    refused(model, batches, path, r"layers\.1\.mlp\.down_proj.*table is damaged: .* 192 finite float32 channels belong")


def test_sequential_calibration_has_none_to_share(model, batches, tmp_path):
    path = tmp_path / "s.safetensors"
    said = r"strategy reconstruct calibrates layer after layer, .*leave .*s\.safetensors out, or set sequential: false"
    refused(model, batches, path, said, use="reconstruct", error=SpecError)
    assert outcome(model, None, "magnitude", statistics=path)[1] == 0 and not path.exists()


def test_an_interruption_leaves_no_file(model, batches, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"

    def stop(items, label, total):
        yield from items[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, "pp", ratio=0.4, calibration=batches, statistics=path, progress=stop)
    assert not list(tmp_path.iterdir())
    # safetensors has an error of its own for a full disk.
    for place, error in ((os, OSError("no space left")), (statistics_file, SafetensorError("no space left"))):
        with monkeypatch.context() as patched:
            patched.setattr(place, "replace" if place is os else "save_file", failing(error))
            with pytest.raises(DataError, match=r"s\.safetensors: the statistics cannot be written: no space left"):
                prune(model, "pp", ratio=0.4, calibration=batches, statistics=path)
        assert not left_in(tmp_path)


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_a_pipeline_file_names_it_from_its_own_folder(tmp_path, monkeypatch):
    file = tmp_path / "p.yaml"
    file.write_text(
        "prune: {use: pp, ratio: 0.4}\n"
        "calibration: {sequences: 4, length: 64, statistics: s.safetensors}\n"
        "evaluate: [{name: perplexity, window: 64, limit: 4}]\n"
    )
    from prunekit.compress import PipelineSpec

    found = []
    for expected in ("written", "read"):
        results = Pipeline(PipelineSpec.load(file)).run(tmp_path / expected)
        data = json.loads((tmp_path / expected / "results.json").read_text())
        assert data["calibration"]["statistics"] == expected
        found.append(results.metrics["perplexity.perplexity"])
    assert found[0] == found[1] and (tmp_path / "s.safetensors").is_file()
    with pytest.raises(DataError, match="other calibration text"):
        Pipeline(PipelineSpec.load(file, ["calibration.seed=1"])).run(tmp_path / "stale")
    assert not (tmp_path / "stale").exists()
    # A place that cannot be written to is refused before a model is loaded.
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "load", failing(AssertionError("loaded")))
        with pytest.raises(DataError, match=r"nowhere is not a folder that can be written to"):
            Pipeline(PipelineSpec.load(file, ["calibration.statistics=nowhere/s.safetensors"])).measure()
    # Runs without a file say nothing of one.
    plain = Pipeline(PipelineSpec.load(file, ["calibration.statistics=null"])).measure()
    assert "statistics" not in plain.record.as_json()["calibration"]
