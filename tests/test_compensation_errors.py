"""Compensation that cannot work is refused by name and place, and what it lacked is noted in words."""

import json
from typing import ClassVar, Literal

import pytest
import torch
from prunekit.compress import Pipeline, prune
from prunekit.compress.cli import main
from prunekit.registry import Compensator, DataError, NonFiniteError, SingularError, SpecError
from typer.testing import CliRunner

SOLVING = ["least_squares", "low_rank_least_squares"]
STATIC_AND_PER_BATCH = ["wanda_sp", "pp"]


def on_compensation(pruned):
    """The notes without that on the achieved cut."""
    return tuple(note for note in pruned.notes if not note.startswith("requested"))


def as_before(model, dense, ids):
    """Whether nothing is left on the model: neither hooks, adopted layers nor changed numbers."""
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or hasattr(m, "site_cut")]
    return not hooked and torch.equal(model(ids).logits, dense)


def never_varies(model, layer=1):
    """Have the MLP of a layer see and make zeros only: all its channels are constant."""
    model.model.layers[layer].mlp.gate_proj.weight.zero_()
    return model


# Too little text


@pytest.mark.parametrize("use", STATIC_AND_PER_BATCH)
def test_fewer_tokens_than_channels_are_one_note(make_model, batches, use):
    model = make_model("llama-gqa")
    compensate = {"name": "least_squares", "ridge": 0.01}
    with prune(model, use, ratio=0.4, calibration=batches[:1], compensate=compensate) as pruned:
        assert on_compensation(pruned) == (
            "compensator least_squares: the covariance was computed from 96 tokens, fewer than 2 for each channel at "
            "layers 0 to 2 attention (128 channels) and layers 0 to 2 mlp (192 channels); it was solved with "
            "a ridge of 0.01 times the mean variance; calibrate with more text",
        )


def test_only_sites_that_lack_tokens_are_named(make_model, batches):
    options = dict(ratio=0.4, calibration=batches[:1], compensate={"name": "least_squares", "ridge": 0.05})
    with prune(make_model("llama-gqa", intermediate_size=48), "wanda_sp", skip_layers=[1], **options) as pruned:
        (note,) = on_compensation(pruned)
    assert "layers 0, 2 attention (128 channels);" in note and "mlp" not in note and "ridge of 0.05" in note


def test_padding_counts_for_nothing(make_model, batches):
    mask = torch.ones(4, 24, dtype=torch.long)
    calibration = [{**batch, "attention_mask": mask} for batch in batches]
    with prune(make_model("llama-gqa"), "flap", ratio=0.4, calibration=calibration, compensate=SOLVING[0]) as pruned:
        assert on_compensation(pruned) == ()  # two for each channel of the widest site
        assert pruned.about_compensation()["tokens"] == 384
    mask[:, 23:] = 0
    with prune(make_model("llama-gqa"), "flap", ratio=0.4, calibration=calibration, compensate=SOLVING[0]) as pruned:
        assert (
            "from 368 tokens, fewer than 2 for each channel at layers 0 to 2 mlp (192 channels)"
            in on_compensation(pruned)[0]
        )


@pytest.mark.parametrize("compensate", ["none", "mean", "probe_mean"])
def test_without_covariance_there_is_nothing_to_note(make_model, batches, compensate):
    with prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=batches[:1], compensate=compensate) as pruned:
        assert on_compensation(pruned) == ()
        assert (pruned.about_compensation() is None) == (compensate == "none")


# A covariance that cannot be solved


@pytest.mark.parametrize("use", STATIC_AND_PER_BATCH)
@pytest.mark.parametrize("compensate", SOLVING)
def test_constant_channels_are_refused_by_site(make_model, batches, use, compensate):
    model, ids = never_varies(make_model("llama-gqa")), batches[0]["input_ids"]
    dense = model(ids).logits
    with pytest.raises(SingularError, match=rf"layer 1 mlp: compensator {compensate} .* singular: mean") as error:
        prune(model, use, ratio=0.4, calibration=batches, compensate=compensate)
    assert "\n" not in str(error.value) and "model.layers.1.mlp.down_proj" in str(error.value)
    assert as_before(model, dense, ids)


@pytest.mark.parametrize("use", STATIC_AND_PER_BATCH)
@pytest.mark.parametrize("compensate", SOLVING)
def test_told_to_fall_back_such_sites_get_the_mean_and_a_note(make_model, batches, use, compensate):
    model, ids = never_varies(make_model("llama-gqa")), batches[0]["input_ids"]
    options = dict(ratio=0.4, calibration=batches, compensate={"name": compensate, "singular": "mean"})
    with prune(model, use, **options) as pruned:
        assert model(ids).logits.isfinite().all()
        assert pruned.about_compensation()["fell_back"] == ["layer 1 mlp"]
        assert pruned.notes[-1] == (
            f"compensator {compensate}: the covariance could not be solved at layer 1 mlp, where the mean alone is "
            "compensated"
        )


@pytest.mark.parametrize("singular", ["error", "mean"])
def test_a_batch_that_cannot_be_solved(make_model, batches, monkeypatch, singular):
    from prunekit.strategies.compensation import least_squares

    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    options = dict(skip_layers=[0], ratio=0.4, compensate={"name": "least_squares", "singular": singular})
    with prune(model, "pp", calibration=batches, **options) as pruned:

        def unsolvable(*args):
            raise torch.linalg.LinAlgError("singular")

        monkeypatch.setattr(least_squares, "regression_on", unsolvable)
        if singular == "error":
            with pytest.raises(SingularError, match="layer 1 attention"):
                model(ids)
        else:
            assert model(ids).logits.isfinite().all()
            assert pruned.notes[-1].count("layers 1 to 2 attention and layers 1 to 2 mlp, where the mean alone") == 1
        assert model.model.layers[1].mlp.down_proj.weight.shape == (128, 192)


# NaN and infinity


@pytest.mark.parametrize("use", ["magnitude", "wanda_sp", "pp"])
def test_activations_that_are_not_finite(make_model, batches, use):
    model = make_model("llama-gqa")
    model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 mlp"):
        prune(model, use, ratio=0.4, calibration=batches, compensate="least_squares")
    assert not any(hasattr(m, "site_cut") or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("sequential", [False, True])
def test_squares_that_overflow(make_model, batches, sequential):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight.mul_(1e25)
    mlp.down_proj.weight.mul_(1e-25)  # the model itself runs
    dense = model(ids).logits
    assert dense.isfinite().all()
    options = dict(ratio=0.4, calibration=batches, sequential=sequential)
    with pytest.raises(NonFiniteError, match=r"layer 1 mlp: the covariance of what enters .* singular: mean"):
        prune(model, "magnitude", compensate="least_squares", **options)
    assert as_before(model, dense, ids)
    with prune(model, "magnitude", compensate={"name": "least_squares", "singular": "mean"}, **options) as pruned:
        assert model(ids).logits.isfinite().all()
        assert pruned.about_compensation()["fell_back"] == ["layer 1 mlp"]


@pytest.mark.parametrize("sequential", [False, True])
def test_a_folded_weight_that_overflows(make_model, batches, sequential):
    model, ids = make_model("llama-gqa").half(), batches[0]["input_ids"]
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight[:] = mlp.gate_proj.weight[:1] / 256  # all channels are one: the kept ones take all the weight
    mlp.up_proj.weight[:] = mlp.up_proj.weight[:1] / 256
    mlp.down_proj.weight.fill_(3e4)
    dense = model(ids).logits
    assert dense.isfinite().all()
    options = dict(ratio=0.8, calibration=batches, sequential=sequential)
    with pytest.raises(NonFiniteError, match=r"layer 1 mlp: the weight of .*down_proj overflows float16 .* bfloat16"):
        prune(model, "magnitude", compensate="least_squares", **options)
    assert as_before(model, dense, ids)


# What was asked cannot be given


@pytest.mark.parametrize("use", ["magnitude", "random"])
def test_no_calibration(make_model, use):
    with pytest.raises(DataError, match="compensator mean looks at activations: give it calibration batches"):
        prune(make_model("llama-gqa"), use, ratio=0.4, compensate="mean")


def test_a_probe_where_nothing_says_what_to_probe(make_model, batches):
    class Looks(Compensator):
        name: Literal["looks"] = "looks"
        uses_probe: ClassVar[bool] = True

        def mean(self, calibrated, probe):
            return calibrated if probe is None else probe

    with pytest.raises(SpecError, match=r"compensator looks reads a probe .*selector: spread"):
        prune(make_model("llama-gqa"), "wanda_sp", ratio=0.4, calibration=batches, compensate=Looks())
    with prune(
        make_model("llama-gqa"), "wanda_sp", ratio=0.4, calibration=batches, compensate=Looks(), selector="spread"
    ) as pruned:
        assert pruned.model(batches[0]["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("per_batch", ["pivot", "solve", "usual"])
def test_without_history_calibration_still_says_what_is_usual(make_model, batches, per_batch):
    options = dict(merger="probe_only", compensate={"name": "least_squares", "per_batch": per_batch})
    with prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=batches, **options) as pruned:
        assert pruned.model(batches[0]["input_ids"]).logits.isfinite().all()


# What the command says


@pytest.mark.parametrize(
    ("prune_section", "said"),
    [
        ("use: pp, compensate: meen", ["prune.compensate", "'meen'", "did you mean 'mean'"]),
        ("use: pp, compensate: least_sqares", ["did you mean 'least_squares'"]),
        (
            "use: pp, compensate: {name: mean, rige: 1}",
            ["prune.compensate.rige", "unknown key"],
        ),
        ("use: pp, compensate: {name: least_squares, rige: 1}", ["did you mean 'ridge'"]),
        ("use: pp, compensate: {name: least_squares, ridge: 0}", ["prune.compensate.ridge", "greater than 0"]),
        ("use: pp, compensate: {name: least_squares, ridge: -1}", ["prune.compensate.ridge", "greater than 0"]),
        ("use: pp, compensate: {name: probe_mean, probe: 1.5}", ["prune.compensate.probe", "less than or equal to 1"]),
        ("use: pp, compensate: {name: probe_mean, probe: 0}", ["prune.compensate.probe", "greater than 0"]),
        ("use: pp, compensate: {name: low_rank_least_squares, rank: 0}", ["prune.compensate.rank", "equal to 1"]),
        ("use: pp, compensate: {name: least_squares, memory_gib: 0}", ["memory_gib", "greater than 0"]),
        ("use: pp, merger: null, compensate: mean", ["a selector needs a merger", "probe_mean"]),
        ("use: pp, selector: null, compensate: mean", ["both a selector and a merger"]),
        ("use: pp, sequential: true, compensate: mean", ["sequential calibration is for strategies that decide once"]),
    ],
)
def test_a_mistake_in_the_file(tmp_path, monkeypatch, prune_section, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(f"prune: {{ratio: 0.4, {prune_section}}}\n")
    result = CliRunner().invoke(main.app, ["run", "p.yaml", "--out", "r"])
    text = " ".join(result.stderr.split())
    assert result.exit_code == 2 and result.stdout == "" and text.count("error:") == 1
    assert "p.yaml: line 1: prune" in text
    for words in said:
        assert words in text
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]


def quick(**section):
    return {
        "calibration": {"sequences": 2, "length": 32},
        "prune": {"ratio": 0.4, **section},
        "evaluate": [{"name": "perplexity", "window": 32, "limit": 1}],
    }


def test_a_site_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = "{use: flap, ratio: 0.4, compensate: {name: least_squares, memory_gib: 0.00001}}"
    calibration = "{sequences: 2, length: 32}"
    (tmp_path / "p.yaml").write_text(f"calibration: {calibration}\nprune: {section}\n")
    result = CliRunner().invoke(main.app, ["run", "p.yaml", "--out", "r"])
    assert result.exit_code == 2 and "nothing was taken" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]


def test_results_and_report_say_how_it_was_compensated(tmp_path):
    results = Pipeline(quick(use="flap", compensate={"name": "least_squares", "ridge": 0.1})).run(tmp_path / "r")
    data = json.loads((results.folder / "results.json").read_text())
    about = data["compensation"]
    assert about["compensator"]["name"] == "least_squares" and about["compensator"]["ridge"] == 0.1
    assert about["tokens"] == 64 and about["fell_back"] == []
    assert [note for note in data["notes"] if "from 64 tokens, fewer than 2 for each channel" in note]
    report = (results.folder / "report.md").read_text()
    assert "- **compensation**: least_squares (" in report and "; covariance of 64 tokens" in report
    assert "a ridge of 0.1 times the mean variance" in report


def test_the_bundled_text_serves_compensation_where_none_is_named():
    results = Pipeline(quick(use="magnitude", compensate="mean")).measure()
    assert results.record.calibration.text == "bundled reference-calibration"
    assert results.record.compensation.tokens is None
    assert Pipeline(quick(use="magnitude")).measure().record.compensation is None
