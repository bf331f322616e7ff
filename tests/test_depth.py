"""Depth strategies: the layers with the lowest influence, and the blocks without which the loss is smallest."""

import json
import math
import re
from typing import ClassVar

import pytest
import torch
import yaml
from prunekit.compress import prune
from prunekit.compress.pruning.matching import Match
from prunekit.registry import NonFiniteError, SpecError
from prunekit.registry.checks import check_component
from prunekit.strategies.depth import BlockByBlock, LowestInfluence, Sleb
from torch.nn import functional

from tests.toy_sites import places

LAYERS = 6


@pytest.fixture
def model(make_model):
    return make_model("llama-gqa", num_hidden_layers=LAYERS)


def gone(pruned):
    return {place for place, count in pruned.counts.items() if not count}


@torch.no_grad()
def loss_without(model, batches, blocks):
    shares = {kind: [float((layer, kind) in blocks) for layer in range(LAYERS)] for kind in ("attention", "mlp")}
    with prune(model, "magnitude", allocator={"name": "explicit", **shares}):
        ids = torch.cat([batch["input_ids"] for batch in batches])
        logits = model(ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).item()


@torch.no_grad()
def test_shortgpt_removes_the_layers_that_turn_the_stream_least(model, batches):
    seen = {}

    def see(number):
        def hook(_, args, output):
            cosine = functional.cosine_similarity(args[0], output, dim=-1)
            seen.setdefault(number, []).append(1 - cosine)

        return hook

    handles = [layer.register_forward_hook(see(number)) for number, layer in enumerate(model.model.layers)]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    influence = {number: float(torch.stack(found).mean()) for number, found in seen.items()}
    lowest = sorted(influence, key=influence.get)
    with prune(model, "shortgpt", ratio=0.4, calibration=batches) as pruned:  # 2.4 of 6 layers
        assert gone(pruned) == {(layer, kind) for layer in lowest[:2] for kind in ("attention", "mlp")}
        assert pruned.ratio.prunable_parameters_cut == pytest.approx(1 / 3)
    with prune(model, "shortgpt", ratio=0.45, calibration=batches) as pruned:
        assert len(gone(pruned)) == 6  # 2.7 layers


def test_blocks_go_one_by_one_where_the_loss_is_smallest(model, batches):
    every = [(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp")]
    options = dict(ratio=0.34, calibration=batches)
    for use, allowed in (
        ("sleb", [{(layer, "attention"), (layer, "mlp")} for layer in range(1, LAYERS - 1)]),
        ("block_pruner", [{place} for place in every]),
    ):
        found = set()
        with prune(model, use, **options, allocator={"tokens": 10_000}) as pruned:
            removed, steps = gone(pruned), pruned.search
        order = [step["gone"].split(", ") for step in steps]
        assert {label for labels in order for label in labels} == {f"layer {layer} {kind}" for layer, kind in removed}
        while found < removed:
            losses = {i: loss_without(model, batches, found | block) for i, block in enumerate(allowed)}
            best = min(losses, key=losses.get)
            found |= allowed.pop(best)
            assert steps.pop(0)["best"] == pytest.approx(losses[best], rel=1e-5)
        assert found == removed and removed, use


def test_no_site_is_calibrated_and_a_loss_is_measured_once(make_counting, batches):
    model = make_counting(num_hidden_layers=LAYERS)
    with prune(model, "shortgpt", ratio=0.4, calibration=batches):
        assert model.passes == len(batches)
    model.passes = 0
    with prune(model, "wanda_sp", allocator="lowest_influence", ratio=0.4, calibration=batches) as pruned:
        assert model.passes == len(batches) and gone(pruned)


def test_a_match_says_how_near_it_came(model, batches):
    with prune(model, "shortgpt", ratio=0.4, calibration=batches, match=Match("parameters")) as pruned:
        assert pruned.matched.cost == pytest.approx(2 / 3, abs=1e-3)


def test_a_ratio_out_of_reach_is_refused(model, batches):
    with pytest.raises(SpecError, match="out of reach with keep_first: 1 and keep_last: 1"):
        prune(model, "sleb", ratio=0.9, calibration=batches)
    for keep in ({"keep_first": LAYERS + 2}, {"keep_last": LAYERS + 2}):
        with pytest.raises(SpecError, match="out of reach"):
            prune(model, "shortgpt", ratio=0.3, calibration=batches, allocator={"name": "lowest_influence", **keep})


def test_an_infinite_loss_is_the_last_choice_and_alone_refused():
    sites = places(4)

    def evaluate(candidates, tokens, **how):
        return [math.inf if not counts[0] or counts.count(0) > 4 else 3.0 for counts in candidates]

    evaluate.record = lambda **step: None
    assert BlockByBlock().allocate(sites, 0.5, evaluate) == [6, 24, 0, 0, 0, 0, 6, 24]
    with pytest.raises(
        NonFiniteError, match=r"block_by_block: no cut that it measured .* has a finite objective .loss."
    ):
        BlockByBlock().allocate(sites, 0.75, evaluate)


def test_blocks_are_measured_on_as_many_tokens_of_a_row_as_asked(model, batches):
    widths = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for length, longest in ((256, batches[0]["input_ids"].shape[1]), (5, 5)):
        widths.clear()
        allocator = {"name": "block_by_block", "length": length}
        prune(model, "sleb", ratio=0.3, calibration=batches, allocator=allocator).remove()
        assert max(widths) == longest


@pytest.mark.parametrize("use", ["shortgpt", "block_pruner"])
def test_a_run_names_what_is_gone(small_pipeline, tmp_path, command, use):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(small_pipeline(use=use, ratio=0.3)))
    code, said = command("run", file, "--out", tmp_path / "out")
    cut = json.loads((tmp_path / "out" / "results.json").read_text())["layers"]
    gone = {kind: [layer["layer"] for layer in cut if not layer[kind]["kept"]] for kind in ("attention", "mlp")}
    whole = [layer for layer in gone["attention"] if layer in gone["mlp"]]
    assert code == 0 and (whole if use == "shortgpt" else gone["attention"] != gone["mlp"])
    (note,) = re.findall(r"gone: [^)]*\)(?:, [^)]*\))*", said)
    for what, layers in (("layers", whole), ("attentions", gone["attention"]), ("MLPs", gone["mlp"])):
        alone = [layer for layer in layers if what == "layers" or layer not in whole]
        assert (f"{len(alone)} of 3 {what} (layer" in note) == bool(alone)
    assert f"- {note}" in (tmp_path / "out" / "report.md").read_text()


def test_scores_of_units_are_not_gathered_for_whole_blocks(make_counting, batches):
    model = make_counting(num_hidden_layers=LAYERS)
    with prune(model, "llm_pruner", allocator="lowest_influence", ratio=0.4, calibration=batches) as pruned:
        assert model.passes == len(batches) and len(gone(pruned)) == 4


class InPart(LowestInfluence):
    """Keeps half of a block."""

    def allocate(self, sites, ratio):
        return [max(1, count // 2) if ratio else count for count in super().allocate(sites, 0)]


class OtherEnd(LowestInfluence):
    """Begins at the other end where more is to go."""

    def allocate(self, sites, ratio):
        counts = super().allocate(sites, ratio)
        turned = [count for layer in zip(counts[-2::-2], counts[::-2], strict=True) for count in layer]
        return counts if ratio < 0.3 else turned


class WithScores(LowestInfluence):
    """Asks for scores."""

    needs_scores: ClassVar[bool] = True


def test_the_contract():
    for allocator in (LowestInfluence(), BlockByBlock(), BlockByBlock(blocks="sites"), Sleb().allocator):
        check_component(allocator)
    for broken, message in (
        (InPart(), "has whole_blocks true, and keeps"),
        (OtherEnd(), "has nested true, and keeps more of"),
        (WithScores(), "needs_scores and uses_scores must be false"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_component(broken)
