"""What a pruning says of itself: how much was removed, and where a ratio rounds to nothing."""

import warnings

import pytest
import torch
from prunekit.compress import calibration_batches, prune
from prunekit.compress.output.formatting import achieved
from prunekit.compress.output.records import Ratio
from prunekit.compress.pruning.notes import notes_on_blocks
from prunekit.registry import DataError, PruneWarning, SpecError
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.allocation import Uniform
from transformers import AutoModelForCausalLM

DOWN = Uniform(rounding="down")
GROUPS = (
    "20% of 2 key/value groups rounds to none, so all are kept in 3 layers; use attention_unit: query_head or a ratio "
    "of at least 0.5"
)


@pytest.fixture
def few_groups(make_model):
    return make_model("llama-gqa", num_key_value_heads=2)


def test_a_ratio_that_rounds_to_nothing_is_noted_with_the_remedy(few_groups, batches):
    with pytest.warns(PruneWarning) as found:
        pruned = prune(few_groups, "wanda_sp", ratio=0.2, calibration=batches, allocator=DOWN)
    cut = achieved(pruned.ratio)
    assert pruned.notes == (GROUPS, cut) == tuple(str(warning.message) for warning in found)
    assert all(warning.filename == __file__ for warning in found)
    assert cut.startswith("requested 20%; removed ") and pruned.ratio.units_cut == pytest.approx(0.099, abs=1e-3)
    assert repr(pruned) == f"<Pruned LlamaForCausalLM by wanda_sp: {cut}; 3 of 3 layers>"
    pruned.remove()
    assert " by wanda_sp (removed): " in repr(pruned)
    pruned.forget()
    assert repr(pruned) == "<Pruned: removed and forgotten>"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": 0.5}, []),
        ({"ratio": 0.2}, []),
        ({"ratio": 0.2, "allocator": DOWN, "attention_unit": "query_head"}, []),
        ({"ratio": 0.2, "allocator": DOWN, "skip_layers": [1]}, [
            "30% of 2 key/value groups rounds to none, so all are kept in 2 layers; use attention_unit: query_head or "
            "a ratio of at least 0.34"
        ]),
        ({"ratio": 0.05}, [
            "5% of 2 key/value groups rounds to none, so all are kept in 3 layers; use attention_unit: query_head or "
            "a ratio of at least 0.09"
        ]),
        ({"ratio": 0.5, "allocator": Uniform(mlp_multiple=192)}, [
            "50% of 192 MLP channels rounds to none, so all are kept in 3 layers; use a smaller multiple"
        ]),
    ],
)  # fmt: skip
def test_the_remedy_removes_the_note(few_groups, options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruneWarning)
        with prune(few_groups, "magnitude", **options) as pruned:
            notes = [note for note in pruned.notes if not note.startswith("requested")]
    assert notes == expected


def test_the_least_ratio_is_the_least(few_groups):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruneWarning)
        for allocator, least in ((DOWN, 0.34), (Uniform(), 0.09)):
            for ratio, whole in ((least - 0.01, True), (least, False)):
                options = {"skip_layers": [1]} if allocator is DOWN else {}
                with prune(few_groups, "magnitude", ratio=ratio, allocator=allocator, **options) as pruned:
                    heads = [count for (_, kind), count in pruned.counts.items() if kind == "attention"]
                    assert all(count == 2 for count in heads) == whole


def test_ratios_that_count_parameters_are_not_noted(few_groups, batches):
    """FLAP's ratio is one of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruneWarning)
        with prune(few_groups, "flap", ratio=0.2, calibration=batches) as pruned:
            assert pruned.notes == ()


def test_what_is_gone_is_named(make_model):
    model = make_model("llama-gqa")
    shares = {"attention": [1, 0, 1], "mlp": [0, 1, 1]}
    with pytest.warns(PruneWarning, match="^gone: "):
        pruned = prune(model, "magnitude", allocator={"name": "explicit", **shares})
    with pruned:
        assert pruned.notes == ("gone: 1 of 3 layers (layer 2), 1 of 3 attentions (layer 0), 1 of 3 MLPs (layer 1)",)
    shares = {"attention": [0, 0, 1], "mlp": [0.5, 0, 1]}
    with prune(model, "magnitude", allocator={"name": "explicit", **shares}, skip_layers=[1]) as pruned:
        assert pruned.notes == ("gone: 1 of 3 layers (layer 2)",)


def test_a_long_list_of_what_is_gone_is_shortened():
    sites = [some_site(kind, layer) for layer in range(80) for kind in ("attention", "mlp")]
    layers = {*range(0, 60, 3), 7, 8, 70}
    (note,) = notes_on_blocks(sites, {(layer, "mlp"): 0 for layer in layers})
    listed = "0, 3, 6 to 9, 12, 15, 18, 21, 24, 27, 30, and 10 more"
    assert note == f"gone: 23 of 80 MLPs (layers {listed})"
    assert notes_on_blocks(sites, {}) == []


def test_the_achieved_cut_is_one_sentence():
    ratio = Ratio(asked=0.2, units_cut=0.1, prunable_parameters_cut=0.15)
    assert achieved(ratio) == "requested 20%; removed 15.0% of the prunable parameters (10.0% of units)"
    assert achieved(ratio.model_copy(update={"asked": None})).startswith("removed 15.0%")


@pytest.mark.parametrize("profile", ["hf-hetero", "hf-uniform", "padded"])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_save_writes_the_pruned_model(make_model, batches, make_tokenizer, tmp_path, profile, tokenizer):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    options = {"compensate": "none", "allocator": DOWN} if profile == "hf-uniform" else {}
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, **options) as pruned, torch.no_grad():
        model(ids)
        model.lm_head.weight.data.mul_(0.5)
        model.model.layers[1].mlp.up_proj.weight.data.mul_(0.5)
        folder = pruned.save(tmp_path / "made", profile=profile, tokenizer=make_tokenizer() if tokenizer else None)
        expected = model(ids).logits
        with pytest.raises(SpecError, match="exists; name a folder that does not exist yet"):
            pruned.save(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())) == (
        profile != "padded"
    )
    assert (folder / "tokenizer.json").is_file() == tokenizer


def test_save_refuses_what_has_no_single_cut(make_model, batches, tmp_path):
    with prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=batches) as pruned:
        with pytest.raises(SpecError, match=r"pp decides per batch.*pruned\.freeze"):
            pruned.save(tmp_path / "made")
        pruned.freeze("calibration")
        with pruned.dense(), pytest.raises(SpecError, match="outside of dense"):
            pruned.save(tmp_path / "made")
        for profile in ("gguf", "dynamic", "hf-heterogeneous"):
            with pytest.raises(SpecError, match=r"prunekit export|profile"):
                pruned.save(tmp_path / "made", profile=profile)
        assert not list(tmp_path.iterdir())
        pruned.save(tmp_path / "made")


def test_calibration_batches_of_text(make_tokenizer):
    text = " ".join(f"w{number % 90}" for number in range(200))
    (first, *others) = calibration_batches(make_tokenizer(), [text], sequences=6, length=16, batch_size=4)
    assert first["input_ids"].shape == (4, 16) and others[0]["attention_mask"].shape == (2, 16) and len(others) == 1
    (same, _) = calibration_batches(make_tokenizer(), text, sequences=6, length=16, batch_size=4)
    assert torch.equal(first["input_ids"], same["input_ids"])
    with pytest.raises(DataError, match="gives 12 sequences of 16 tokens"):
        calibration_batches(make_tokenizer(), text, length=16)
