"""Deciding ahead: each block is probed while the one before it runs, from the residual stream that that one reads."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine.ahead import SideStreams, following_sites
from prunekit.registry import ModelError
from prunekit.strategies.pp.selectors import HiddenNorm, ResidualNorm

FAMILIES = ["llama-mha", "llama-gqa", "mistral", "qwen3", "opt"]
AHEAD = {"selector": {"ahead": True}}


def run(model, batches, mask=None, **options):
    """The trace and logits of two batches."""
    options = {"ratio": 0.4, "calibration": batches, "trace": True, **options}
    with prune(model, "pp", **options) as pruned, torch.no_grad():
        logits = [model(b["input_ids"], attention_mask=mask, use_cache=False).logits for b in batches[:2]]
    return pruned.trace, logits


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_blocks_add_next_to_nothing_it_decides_as_in_place(make_model, batches, family, padding):
    """Scores do not depend on the consumers' scale; with a tiny one every residual is the one before."""
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[2, :9] = 0
    mask = mask if padding else None

    def both(scale):
        model = make_model(family)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2")):
                parameter.data.mul_(scale)
        return run(model, batches, mask), run(model, batches, mask, **AHEAD)

    (trace, logits), (ahead, theirs) = both(1e-6)
    assert trace == ahead
    for one, other in zip(logits, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    (trace, _), (ahead, _) = both(1)
    first = [record for record in ahead if (record["layer"], record["kind"]) == (0, "attention")]
    assert first == [record for record in trace if (record["layer"], record["kind"]) == (0, "attention")]
    assert trace != ahead, "old residuals must matter, or the check proves nothing"


@pytest.mark.parametrize(("name", "selector"), [("residual_norm", ResidualNorm()), ("hidden_norm", HiddenNorm())])
def test_what_is_probed_is_chosen_by_the_residual_one_block_earlier(make_model, batches, name, selector):
    model, seen = make_model("llama-gqa"), {}
    options = dict(ratio=0.4, calibration=batches, trace=True, selector={"name": name, "ahead": True})
    with prune(model, "pp", **options) as pruned, torch.no_grad():
        handles = [
            cut.binding.norm.register_forward_pre_hook(lambda _, args, cut=cut: seen.__setitem__(cut, args[0].clone()))
            for cut in pruned._engine.cuts
        ]
        model(batches[0]["input_ids"], use_cache=False)
        for handle in handles:
            handle.remove()
        cuts = pruned._engine.cuts
        records = pruned.trace
        for before, cut, record in zip(cuts[:-1], cuts[1:], records[1:], strict=True):
            states = seen[before] if name == "residual_norm" else cut.binding.norm.forward(seen[before])
            rows, positions = selector.select(states, None, torch.Generator())
            assert (record["layer"], record["kind"]) == (cut.site.layer, cut.site.kind)
            assert (record["rows"], record["positions"]) == (rows.tolist(), positions.tolist())


def test_a_site_behind_one_that_is_not_cut_is_decided_for_in_its_place(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.3, skip_layers=[1], calibration=batches, **AHEAD) as pruned:
        cuts = pruned._engine.cuts
        pairs = [(cut, after) for cut, after in zip(cuts, following_sites(cuts), strict=True) if after is not None]
    places = {(a.site.layer, a.site.kind): (b.site.layer, b.site.kind) for a, b in pairs}
    assert places == {(0, "attention"): (0, "mlp"), (2, "attention"): (2, "mlp")}
    # A site that keeps everything is not decided for, and the one behind it still is, from what it reads.
    allocator = {"name": "explicit", "attention": [0.5, 0, 0.5], "mlp": [0.5, 0.5, 0.5]}
    trace, _ = run(model, batches, ratio=None, allocator=allocator, **AHEAD)
    assert [(r["layer"], r["kind"]) for r in trace[:5]] == [
        *[(0, "attention"), (0, "mlp"), (1, "mlp"), (2, "attention"), (2, "mlp")]
    ]


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_generation_decides_once_and_keeps_to_it(make_model, batches, family):
    model, ids = make_model(family), batches[0]["input_ids"][:2]
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True, **AHEAD) as pruned, torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert len(pruned.trace) == 6
        pruned.reset()
        logits = model(ids, use_cache=False).logits
        assert [r["kept"] for r in pruned.trace[6:]] == [r["kept"] for r in pruned.trace[:6]]
    assert torch.equal(logits[:, -1].argmax(-1), tokens[:, ids.shape[1]])


@pytest.mark.parametrize("whole", ["attention", "mlp"])
def test_generation_beside_sites_that_keep_everything(make_model, batches, whole):
    """They decide nothing, and what comes after them was decided by the prompt."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"][:2]
    allocator = {"name": "explicit", "attention": [0.5, 0.5, 0.5], "mlp": [0.5, 0.5, 0.5], whole: [0, 0, 0]}
    options = dict(ratio=None, allocator=allocator, calibration=batches, trace=True)
    with prune(model, "pp", **options, **AHEAD) as pruned, torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert len(pruned.trace) == 3, "one decision a layer, none in decode steps"
        again = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokens.shape == again.shape == (2, 30)


@pytest.mark.parametrize("options", [{"selector": {"name": "spread", "ahead": True}}, {"compensate": "probe_mean"}])
def test_with_other_parts(make_model, batches, options):
    options = {**AHEAD, **options}
    model = make_model("llama-gqa")
    trace, logits = run(model, batches, **options)
    zeroed, same = run(model, batches, applier="zero", **options)
    assert trace == zeroed
    for one, other in zip(logits, same, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    # A cut that is made once can look ahead for its bias.
    probed = {"selector": {"name": "spread", "ahead": True}, "merger": None, "compensate": "probe_mean"}
    assert run(model, batches, **probed)[1][0].isfinite().all()


def test_a_failed_batch_leaves_no_decision_behind(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True, **AHEAD) as pruned, torch.no_grad():
        expected = model(ids, use_cache=False).logits
        pruned.reset()
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(batches[1]["input_ids"], use_cache=False)
        handle.remove()
        assert pruned._engine.shared.running.batch is None
        pruned.reset()
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_layers_that_attend_differently_are_refused(make_model, batches):
    model = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert len(set(model.config.layer_types)) == 2
    with pytest.raises(ModelError, match=r"selector ahead: .*full_attention, sliding_attention.*set ahead: false"):
        prune(model, "pp", ratio=0.4, calibration=batches, **AHEAD)
    prune(model, "pp", ratio=0.4, calibration=batches).remove()


def test_beside_is_at_once_without_a_cuda_device():
    side, done = SideStreams(True), []
    x = torch.zeros(2)
    with side.work(x):
        done.append(x.sum())
    side.join()
    side.share(x, None)
    assert done and not side.used
