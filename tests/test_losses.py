"""The losses that an allocator measures: those of the cut model, without repeated work, the model whole afterwards."""

import itertools
from contextlib import contextmanager
from typing import ClassVar, Literal

import accelerate
import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration import losses
from prunekit.compress.calibration.losses import spread
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.registry import DataError, ModelError, NonFiniteError, PluginError, SparsityAllocator, SpecError
from torch.nn import functional

ALL = 10_000
"""More tokens than the text has: every row is measured."""


class Asking(SparsityAllocator):
    """Asks for the losses of its candidates, and keeps the counts of the last one."""

    name: Literal["asking"] = "asking"
    needs_scores: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    candidates: tuple[tuple[int, ...], ...]
    tokens: int = ALL
    how: tuple[tuple[str, str | int], ...] = ()
    found: ClassVar[list[float]] = []

    def allocate(self, sites, ratio, evaluate=None):
        self.found[:] = evaluate(self.candidates, self.tokens, **dict(self.how))
        return list(self.candidates[-1])


def measured(model, batches, *candidates, use="wanda_sp", tokens=ALL, how=(), **options):
    """The losses of candidates; the model is pruned to the last one and restored."""
    allocator = Asking(candidates=candidates, tokens=tokens, how=tuple(dict(how).items()))
    with prune(model, use, ratio=0.1, calibration=batches, allocator=allocator, **options):
        return list(Asking.found)


@torch.no_grad()
def loss_of(model, batches):
    """Nats per predicted token of batches without padding."""
    ids = torch.cat([batch["input_ids"] for batch in batches])
    logits = model(ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).item()


def is_whole(model, before):
    """Whether nothing of a measurement is left."""
    clean = not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    clean &= all(type(layer).__name__ == "LlamaDecoderLayer" for layer in model.model.layers)
    return clean and all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("family", "unit", "counts"),
    [
        ("llama-gqa", "kv_group", [(1, 192, 4, 192, 4, 192), (4, 192, 4, 192, 2, 30), (3, 0, 0, 100, 2, 31)]),
        ("llama-gqa", "query_head", [(8, 192, 3, 50, 8, 192), (8, 192, 8, 192, 5, 192)]),
        ("opt", "kv_group", [(8, 192, 3, 192, 8, 50), (8, 1, 8, 192, 8, 192), (7, 100, 8, 192, 0, 192)]),
    ],
    ids=["groups", "query heads", "opt"],
)
def test_a_loss_is_that_of_the_model_cut_to_these_counts(make_model, batches, family, unit, counts):
    model = make_model(family)
    dense = loss_of(model, batches)
    losses = measured(model, batches, *counts, attention_unit=unit)
    for candidate, loss in zip(counts, losses, strict=True):
        allocator = Asking(candidates=(candidate,))
        options = dict(ratio=0.1, calibration=batches, allocator=allocator, applier="zero", attention_unit=unit)
        with prune(model, "wanda_sp", **options):
            assert loss == pytest.approx(loss_of(model, batches), abs=1e-5)
        assert abs(loss - dense) > 1e-3  # the cut is felt
    assert measured(model, batches, (model.config.num_attention_heads, 192) * 3, attention_unit="query_head") == (
        pytest.approx([dense], abs=1e-5)
    )


def test_the_first_tokens_of_a_row_are_measured_as_many_as_asked(make_model, batches):
    model, statistics = make_model("llama-gqa"), SharedStatistics()
    cut = (2, 192, 4, 50, 4, 192)
    first = [{"input_ids": batch["input_ids"][:, :9]} for batch in batches]
    allocator = Asking(candidates=(cut,))
    with pruned_to(model, batches, allocator):
        expected = loss_of(model, first)
    whole = measured(model, batches, cut, statistics=statistics)
    found = measured(model, batches, cut, how={"length": 9}, statistics=statistics)
    assert found == pytest.approx([expected], abs=1e-5) and abs(found[0] - whole[0]) > 1e-3


@contextmanager
def pruned_to(model, batches, allocator):
    with prune(model, "wanda_sp", ratio=0.1, calibration=batches, allocator=allocator, applier="zero"):
        yield


@torch.no_grad()
def divergence_of(model, batches, cut, top=0):
    """KL(dense || cut) per predicted token of batches without padding, entry by entry; ``cut`` prunes the model."""
    ids = torch.cat([batch["input_ids"] for batch in batches])
    dense = model(ids, use_cache=False).logits[:, :-1].double()
    with cut:
        pruned = model(ids, use_cache=False).logits[:, :-1].double()
    total = 0.0
    for p, q in zip(dense.flatten(0, 1), pruned.flatten(0, 1), strict=True):
        chosen = p.argsort(descending=True)[: top or len(p)]
        p, q = p[chosen].exp() / p[chosen].exp().sum(), q[chosen].exp() / q[chosen].exp().sum()
        total += float((p * (p / q).log()).sum())
    return total / dense[..., 0].numel()


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("top", [0, 7, 500])
def test_a_divergence_is_that_of_the_cut_model_from_the_dense_one(make_model, batches, family, top):
    model, heads = make_model(family), 4 if family == "llama-gqa" else 8
    whole, candidate, other = (heads, 192) * 3, (heads, 192, 1, 192, heads, 30), (2, 192, heads, 192, heads, 30)
    found = measured(model, batches, whole, candidate, other, how={"objective": "kl", "top_logits": top})
    for counts, value in zip((candidate, other), found[1:], strict=True):
        allocator = Asking(candidates=(counts,))
        expected = divergence_of(model, batches, pruned_to(model, batches, allocator), top)
        assert value == pytest.approx(expected, rel=1e-3) and value > 1e-3
    assert found[0] == 0


def test_divergences_do_not_count_padding_and_are_stored_apart_from_losses(make_model, batches):
    model, statistics = make_model("llama-gqa"), SharedStatistics()
    cut, kl = (4, 192, 4, 192, 4, 20), {"objective": "kl"}
    ids = batches[0]["input_ids"]
    mask = torch.arange(24) < torch.tensor([24, 7, 24, 15])[:, None]
    padded = [{"input_ids": ids.masked_fill(~mask, 5), "attention_mask": mask.long()}]
    alone = [
        measured(model, [row[:n][None]], cut, use="magnitude", how=kl)[0]
        for row, n in zip(ids, mask.sum(1), strict=True)
    ]
    weights = mask.sum(1) - 1
    (found,) = measured(model, padded, cut, use="magnitude", how=kl)
    assert found == pytest.approx(float(torch.tensor(alone) @ weights.float() / weights.sum()), rel=1e-3)
    three = [{}, kl, {"objective": "kl", "top_logits": 5}]
    values = [measured(model, batches, cut, how=how, statistics=statistics)[0] for how in three]
    assert len(set(values)) == 3
    assert values == [measured(model, batches, cut, how=how, statistics=statistics)[0] for how in three]
    with pytest.raises(SpecError, match="asking asks for the objective 'kld'; there are loss and kl"):
        measured(model, batches, cut, how={"objective": "kld"})


def test_without_memory_for_outputs_every_layer_runs_again(make_model, batches, monkeypatch):
    model, runs = make_model("llama-gqa"), []
    cuts = [(4, 192, 4, 192, 4, 20), (4, 192, 4, 192, 4, 30)]
    expected = [measured(model, batches, *cuts, how=how) for how in ({}, {"objective": "kl"})]
    monkeypatch.setattr(losses, "OUTPUTS", 10)
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    assert [measured(model, batches, *cuts, how=how) for how in ({}, {"objective": "kl"})] == expected
    assert len(runs) == 2 * (4 + 3)  # of each: calibration, the dense model, two cuts


def test_layers_before_the_first_cut_run_once(make_model, batches):
    model, runs = make_model("llama-gqa"), []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: runs.append(number))
    whole, last, middle = (4, 192, 4, 192, 4, 192), (4, 192, 4, 192, 4, 20), (4, 192, 1, 192, 4, 192)
    measured(model, batches, whole)
    dense = list(runs)
    measured(model, batches, last, middle, whole)
    assert runs[len(dense) :] == [*dense, 2, 1, 2]


def test_layers_before_the_change_of_one_site_run_once(make_model, batches):
    """Whatever was cut before: the last candidate, and the one that it was measured from, are kept."""
    model, runs = make_model("llama-gqa"), []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: runs.append(number))
    base, first, second, both = (
        (2, 192, 4, 99, 4, 192),
        (2, 192, 4, 99, 4, 20),
        (2, 192, 4, 99, 1, 192),
        (2, 9, 4, 99, 1, 192),
    )
    losses = measured(model, batches, base, first, second, both)
    assert runs[-8:] == [0, 1, 2, 2, 2, 0, 1, 2]
    assert losses == pytest.approx(
        [measured(model, batches, each)[0] for each in (base, first, second, both)], abs=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(make_model, batches, side):
    model, candidates = make_model("opt"), [(8, 192, 8, 20, 8, 192), (2, 192, 8, 192, 8, 192)]
    ids = torch.cat([batch["input_ids"] for batch in batches[:2]])
    rows = [row[:length] for row, length in zip(ids, (24, 9, 17, 24, 2, 24, 24, 13), strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
    found = measured(model, [{"input_ids": padded, "attention_mask": mask}], *candidates, use="magnitude")
    alone = [measured(model, [row[None]], *candidates, use="magnitude") for row in rows]
    weights = [len(row) - 1 for row in rows]
    expected = [sum(w * each[n] for w, each in zip(weights, alone, strict=True)) / sum(weights) for n in (0, 1)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_rows_are_spread_over_the_text():
    assert spread(64, 4) == [0, 17, 34, 51]  # one of each of four texts, one after another or in turns
    assert spread(3, 10) == spread(3, 3) == [0, 1, 2] and spread(5, 0) == [0]
    for total, number in itertools.product(range(1, 30), range(1, 30)):
        places = spread(total, number)
        assert places == sorted(set(places)) and len(places) == min(total, number) and places[-1] < total


def test_a_number_of_tokens_measures_some_rows(make_model, batches):
    model = make_model("llama-gqa")
    cut = (4, 192, 4, 192, 4, 20)
    (some,) = measured(model, batches, cut, use="magnitude", tokens=48)
    rows = torch.cat([batch["input_ids"] for batch in batches])[spread(16, 2)]
    assert [some] == measured(model, [rows], cut, use="magnitude")
    assert [some] != measured(model, batches, cut, use="magnitude")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_measurement_leaves_the_model_whole(make_model, batches, after):
    model, steps = make_model("llama-gqa"), []
    before = [parameter.clone() for parameter in model.parameters()]

    class Stopping(torch.nn.Module):
        def __call__(self, *_):
            steps.append(1)
            if len(steps) > after:
                raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(Stopping())
    with pytest.raises(KeyboardInterrupt):
        measured(model, batches, *((4, 192, 4, 192, 4, width) for width in (20, 40, 60)))
    handle.remove()
    assert len(steps) == after + 1 and is_whole(model, before)


def test_a_loss_is_measured_once_for_a_text_and_a_scorer(make_model, batches):
    model, passes = make_model("llama-gqa"), []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    shared, cut, other = SharedStatistics(), (4, 192, 4, 192, 4, 20), (4, 20, 4, 192, 4, 192)

    def run(*candidates, calibration=batches, **options):
        passes.clear()
        return measured(model, calibration, *candidates, statistics=shared, **options), len(passes)

    alone = measured(model, batches, cut, other)
    assert run(cut, other) == (alone, 3)  # and the dense pass
    assert run(other, cut) == (alone[::-1], 0)
    assert run((4, 20, 4, 192), skip_layers=(0,))[1] == 2
    assert run(cut[2:], skip_layers=(0,), compensate="mean") == (alone[:1], 0)
    assert run(cut, use="pp")[1] == 2  # another scorer
    assert run(cut, tokens=48)[1] == 2
    assert run(cut, calibration=batches[:2])[1] == 2
    assert run(cut)[1] == 0


def test_losses_are_kept_in_a_statistics_file(make_model, batches, tmp_path):
    model, path = make_model("llama-gqa"), tmp_path / "statistics.safetensors"
    cuts, steps = [(4, 192, 4, 192, 4, width) for width in (20, 40, 60)], []
    handle = model.lm_head.register_forward_hook(lambda *_: steps.append(1) or (1 / (3 - len(steps)) and None))
    with pytest.raises(PluginError, match="raised ZeroDivisionError"):  # after the dense pass and one candidate
        measured(model, batches, *cuts, statistics=path)
    handle.remove()
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    steps.clear()
    found = measured(model, batches, *cuts, statistics=path)
    assert len(steps) == 3 and found == measured(model, batches, *cuts)
    steps.clear()
    assert measured(model, batches, *cuts, statistics=path) == found and not steps


def test_an_offloaded_model_has_the_same_losses(make_model, batches):
    candidates = [(4, 192, 1, 192, 4, 192), (4, 192, 4, 192, 4, 20)]
    model = make_model("llama-gqa")
    expected = measured(model, batches, *candidates)
    accelerate.cpu_offload(model, torch.device("cpu"))
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert measured(model, batches, *candidates) == expected
    after = [vars(module).get("forward") for module in model.modules()]
    assert sum(map(bool, forwards)) > 10 and list(map(bool, after)) == list(map(bool, forwards))


def test_what_cannot_be_measured_is_refused(make_model, batches):
    from transformers import LlamaForSequenceClassification

    model = make_model("llama-gqa")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(SpecError, match=r"asking asks for the loss of .*5, 192.* a kept count for each of 6 sites"):
        measured(model, batches, (5, 192, 4, 192, 4, 192))
    with pytest.raises(DataError, match="no row of the calibration text has two tokens"):
        measured(model, [batches[0]["input_ids"][:, :1]], (4, 192, 4, 192, 4, 20))
    assert is_whole(model, before)
    with pytest.raises(ModelError, match=r"asking measures the loss .* LlamaForSequenceClassification has no output"):
        measured(LlamaForSequenceClassification(model.config), batches, (4, 192, 4, 192, 4, 20))
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match="the loss of the unpruned model on the calibration text is NaN"):
        measured(model, batches, (4, 192, 4, 192, 4, 20))
