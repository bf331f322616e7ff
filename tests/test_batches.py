"""What holds for one batch belongs to the call: another pass, a copy, a thread or a recomputation has its own."""

import asyncio
import copy
import signal
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ModelError
from prunekit.strategies.application import Slice
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

FROZEN = {"merger": {"momentum": 1.0}}
"""No batch changes what later ones are decided by."""


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **options}).logits


def tables(pruned):
    return [cut.history.table.clone() for cut in pruned.cuts]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("then", ["nothing", "dense", "decode"])
@pytest.mark.parametrize("options", [{}, {"selector": {"ahead": True}}])
def test_an_interrupted_batch_leaves_nothing_behind(make_model, batches, error, then, options):
    """Interrupted inside a block, also inside the block's run on the probe."""
    model, (first, second) = make_model("llama-gqa"), (batches[0]["input_ids"], batches[1]["input_ids"])
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True, **options) as pruned:
        cache = DynamicCache(config=model.config)
        logits(model, second[:1], past_key_values=cache, use_cache=True)
        pruned.reset()
        expected, before = logits(model, first), len(pruned.trace)
        pruned.reset()
        calibrated = tables(pruned)
        for number in (1, 2):  # in the probe and in the batch itself
            calls = []

            def interrupt(*_, calls=calls, number=number):
                calls.append(number)
                if len(calls) == number:
                    raise error

            handle = model.model.layers[1].mlp.act_fn.register_forward_hook(interrupt)
            with pytest.raises(error):
                logits(model, second)
            handle.remove()
            assert pruned._engine.shared.running.batch is None
            assert all(cut.kept is None for cut in pruned.cuts) and len(pruned.trace) == before
            if then == "dense":
                with pruned.dense():
                    logits(model, second)
            elif then == "decode":
                logits(model, second[:1, :1], past_key_values=cache, use_cache=True)
            assert all(torch.equal(a, b) for a, b in zip(calibrated, tables(pruned), strict=True))
        pruned.reset()
        del pruned.trace[before:]
        assert torch.equal(logits(model, first), expected)
        places = [(record["batch"], record["layer"], record["kind"]) for record in pruned.trace[before:]]
        assert places == [(0, layer, kind) for layer in range(3) for kind in ("attention", "mlp")]


@pytest.mark.parametrize("then", ["nothing", "dense"])
@pytest.mark.parametrize(
    ("strategy", "options"), [("pp", {"selector": "random"}), ("pp", {"selector": "spread"}), ("reconstruct", {})]
)
def test_draws_go_on_as_if_an_interrupted_batch_had_not_been(make_model, batches, strategy, options, then):
    model, (first, second, third) = make_model("llama-gqa"), (batch["input_ids"] for batch in batches[:3])
    with prune(model, strategy, ratio=0.4, calibration=batches, trace=True, **options) as pruned:
        first_logits, expected = logits(model, first), logits(model, third)
        records = list(pruned.trace)
        pruned.reset()
        del pruned.trace[:]
        assert torch.equal(logits(model, first), first_logits)

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.model.norm.register_forward_pre_hook(interrupt)  # everything has been drawn
        with pytest.raises(KeyboardInterrupt):
            logits(model, second)
        handle.remove()
        with pruned.dense() if then == "dense" else nullcontext():
            if then == "dense":
                logits(model, second)
        assert torch.equal(logits(model, third), expected)
        assert [r for r in pruned.trace if r["batch"] is not None] == [r for r in records if r["batch"] is not None]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "options"), [("pp", {"selector": "random"}), ("reconstruct", {}), ("flap", {})])
def test_an_interruption_at_any_moment_leaves_nothing_behind(make_model, batches, strategy, options):
    model, (first, second) = make_model("llama-gqa"), (batches[0]["input_ids"], batches[1]["input_ids"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with prune(model, strategy, ratio=0.4, calibration=batches, **options) as pruned:
        started = time.perf_counter()
        logits(model, second)
        lasts = time.perf_counter() - started
        pruned.reset()
        once, twice = logits(model, first), None
        pruned.reset()
        logits(model, second)
        twice = logits(model, first)
        before, gradients = signal.signal(signal.SIGALRM, interrupt), torch.is_grad_enabled()
        moments = [lasts * (number + 0.5) / 40 for number in range(40)]
        try:
            for moment in moments:
                pruned.reset()
                try:
                    signal.setitimer(signal.ITIMER_REAL, moment)  # on a busy machine it may ring at once
                    logits(model, second)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    # torch.no_grad(), interrupted between its own lines, leaves gradients off for all tests after it.
                    torch.set_grad_enabled(gradients)
                found = logits(model, first)  # the batch has been, or has not
                assert torch.equal(found, once) or torch.equal(found, twice), moment
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("strategy", "options"), [("pp", {}), ("wanda_sp", {"compensate": "mean"}), ("flap", {})])
def test_a_copy_is_pruned_for_itself(make_model, batches, strategy, options):
    model, (first, second) = make_model("llama-gqa"), (batches[0]["input_ids"], batches[1]["input_ids"][:3, :17])
    with prune(model, strategy, ratio=0.4, calibration=batches, trace=True, **options) as pruned:
        expected = [logits(model, first), logits(model, second)]
        pruned.reset()
        twin, before, calibrated = copy.deepcopy(model), len(pruned.trace), [cut.history.clone() for cut in pruned.cuts]
        found = [logits(twin, first), logits(twin, second)]
        assert len(pruned.trace) == before
        for history, cut in zip(calibrated, pruned.cuts, strict=True):
            assert history.table is None or torch.equal(history.table, cut.history.table)
        assert torch.equal(logits(model, first), expected[0])
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(logits(twin, first), expected[0]) or strategy == "pp", "the copy stays pruned"


@pytest.mark.parametrize(
    ("strategy", "options"), [("pp", FROZEN), ("wanda_sp", {}), ("wanda_sp", {"attention_unit": "query_head"})]
)
def test_a_copied_handle_takes_the_pruning_off_the_copied_model(make_model, batches, strategy, options):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    dense = logits(model, ids)
    pruned = prune(model, strategy, ratio=0.4, calibration=batches, **options)
    cut = logits(model, ids)
    twin, theirs = copy.deepcopy((model, pruned))
    theirs.remove()
    assert torch.equal(logits(twin, ids), dense) and twin.model.layers[0].mlp.down_proj.weight.is_contiguous()
    assert torch.equal(logits(model, ids), cut)
    pruned.remove()
    assert torch.equal(logits(model, ids), dense)
    prune(twin, strategy, ratio=0.4, calibration=batches, **options).remove()


@pytest.mark.parametrize(("strategy", "options"), [("pp", FROZEN), ("wanda_sp", {})])
def test_threads_take_turns(make_model, batches, strategy, options):
    """Passes of different shapes, with caches of their own."""
    model, inputs = make_model("llama-gqa"), [batches[0]["input_ids"], batches[1]["input_ids"][:3, :17]]
    with prune(model, strategy, ratio=0.4, calibration=batches, **options):

        def call(ids):
            return logits(model, ids, past_key_values=DynamicCache(config=model.config), use_cache=True)

        expected, found = [call(ids) for ids in inputs], [[], []]

        def work(number):
            for _ in range(8):
                found[number].append(call(inputs[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for right, ours in zip(expected, found, strict=True):
        assert len(ours) == 8 and all(torch.equal(right, one) for one in ours)


def test_threads_give_what_one_of_their_orders_gives(make_model, batches):
    """The history of PP changes with every batch, so the order of two batches changes the second one."""
    model, inputs = make_model("llama-gqa"), [batches[0]["input_ids"], batches[1]["input_ids"][:3, :17]]
    with prune(model, "pp", ratio=0.4, calibration=batches, merger={"momentum": 0.0}) as pruned:
        orders = []
        for order in ((0, 1), (1, 0)):
            pruned.reset()
            made = {number: logits(model, inputs[number]) for number in order}
            orders.append([made[0], made[1]])
        assert not torch.equal(orders[0][1], orders[1][1])
        for _ in range(8):
            pruned.reset()
            found = [None, None]

            def work(number, found=found):
                found[number] = logits(model, inputs[number])

            threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert any(all(map(torch.equal, found, order)) for order in orders)


@pytest.mark.parametrize(
    ("strategy", "options"), [("pp", FROZEN), ("wanda_sp", {}), ("flap", {"attention_unit": "query_head"})]
)
@pytest.mark.parametrize("caches", [False, True])
def test_dense_belongs_to_the_thread_that_asked(make_model, batches, strategy, options, caches):
    model, (first, second) = make_model("llama-gqa"), (batches[0]["input_ids"], batches[1]["input_ids"][:3, :17])
    found, inside, left = [], threading.Event(), threading.Event()

    def call(ids):
        more = dict(past_key_values=DynamicCache(config=model.config), use_cache=True) if caches else {}
        return logits(model, ids, **more)

    dense = call(second)
    with prune(model, strategy, ratio=0.4, calibration=batches, **options) as pruned:
        expected = call(first)

        def work():
            with pruned.dense():
                found.append(call(second))
                inside.set()
                left.wait()
                assert pruned.is_dense
                found.append(call(second))

        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        assert not pruned.is_dense
        for _ in range(2):
            assert torch.equal(call(first), expected)
        left.set()
        thread.join()
        assert len(found) == 2 and all(torch.equal(one, dense) for one in found)
        assert torch.equal(call(first), expected)


def test_dense_belongs_to_the_task_that_asked(make_model, batches):
    """Of an asyncio server, which switches between tasks of one thread."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    dense = logits(model, ids)
    with prune(model, "flap", ratio=0.4, calibration=batches) as pruned:
        expected = logits(model, ids)

        async def measure():
            with pruned.dense():
                await asyncio.sleep(0)
                return logits(model, ids)

        async def serve():
            await asyncio.sleep(0)
            return logits(model, ids)

        async def both():
            return await asyncio.gather(measure(), serve(), measure())

        unpruned, cut, again = asyncio.run(both())
    assert torch.equal(cut, expected) and torch.equal(unpruned, dense) and torch.equal(again, dense)


@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
def test_remove_waits_for_the_batch_of_another_thread(make_model, batches, strategy):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    dense, inside, found = logits(model, ids), threading.Event(), []
    pruned = prune(model, strategy, ratio=0.4, calibration=batches)
    expected = logits(model, ids)
    pruned.reset()

    def linger(*_):
        inside.set()
        time.sleep(0.2)

    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(linger)
    thread = threading.Thread(target=lambda: found.append(logits(model, ids)))
    thread.start()
    inside.wait()
    pruned.remove()
    thread.join()
    handle.remove()
    assert torch.equal(found[0], expected)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"merger": {"momentum": 0.0}}, {"selector": "random"}, {"compensate": "probe_mean"}]
)
def test_a_recomputation_repeats_the_decisions_of_its_forward_pass(make_model, batches, options, reentrant):
    """Gradient checkpointing; by then history has moved on, and a random selector would draw anew."""
    ids, found = batches[0]["input_ids"], []
    for checkpoints in (False, True):
        model = make_model("llama-gqa").requires_grad_(True).train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            own = [layer._gradient_checkpointing_func for layer in model.model.layers]
        with prune(model, "pp", ratio=0.4, calibration=batches, trace=True, **options) as pruned:
            loss = model(ids, labels=ids, use_cache=False).loss
            learnt, decisions = tables(pruned), len(pruned.trace)
            loss.backward()
            assert all(torch.equal(a, b) for a, b in zip(learnt, tables(pruned), strict=True))
            assert len(pruned.trace) == decisions == 6
            assert all(cut.kept is None for cut in pruned.cuts)
        if checkpoints:
            assert [layer._gradient_checkpointing_func for layer in model.model.layers] == own
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (loss, gradients), (same, theirs) = found
    assert loss == pytest.approx(same, rel=1e-6) and gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-6))
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first_dense", [False, True])
@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
def test_a_recomputation_runs_in_the_mode_of_its_forward_pass(make_model, batches, strategy, first_dense, reentrant):
    """A dense pass may be followed by its backward pass outside of dense(), and the other way round."""
    ids, found = batches[0]["input_ids"], []
    for checkpoints in (False, True):
        model = make_model("llama-gqa").requires_grad_(True).train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with prune(model, strategy, ratio=0.4, calibration=batches) as pruned:
            with pruned.dense() if first_dense else nullcontext():
                loss = model(ids, labels=ids, use_cache=False).loss
            with nullcontext() if first_dense else pruned.dense():
                loss.backward()
            pruned.reset()
            found.append(({name: p.grad for name, p in model.named_parameters()}, logits(model, ids)))
    (gradients, cut), (theirs, after) = found
    torch.testing.assert_close(after, cut)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-6))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
@pytest.mark.parametrize("ends", ["remove", "freeze", "suspended"])
def test_a_recomputation_without_the_pruning_of_its_forward_pass_is_refused(
    make_model, batches, strategy, ends, reentrant
):
    model, ids = make_model("llama-gqa").requires_grad_(True).train(), batches[0]["input_ids"]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with prune(model, strategy, ratio=0.4, calibration=batches) as pruned:
        loss = model(ids, labels=ids, use_cache=False).loss
        if ends == "remove":
            pruned.remove()
        elif ends == "freeze":
            pruned.freeze("calibration")
        with pruned.suspended() if ends == "suspended" else nullcontext():
            with pytest.raises(ModelError, match=r"run the backward pass before remove\(\)"):
                loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_of_the_whole_model_is_refused_where_it_would_decide_anew(make_model, batches, reentrant):
    """A checkpoint of one's own around the model, which calls the decoder again in the backward pass."""
    model, ids, found = make_model("llama-gqa").requires_grad_(True), batches[0]["input_ids"], []

    def again():
        states = model.get_input_embeddings()(ids)
        run = partial(model, use_cache=False)
        return checkpoint(lambda inputs: run(inputs_embeds=inputs).logits, states, use_reentrant=reentrant).sum()

    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        loss, learnt = again(), tables(pruned)
        with pytest.raises(ModelError, match=r"use model.gradient_checkpointing_enable\(\)"):
            loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(learnt, tables(pruned), strict=True))
        model(ids, use_cache=False).logits.sum().backward()  # without a checkpoint, all is as before
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches):
        for loss in (again(), model(ids, use_cache=False).logits.sum()):
            model.zero_grad()
            loss.backward()
            found.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_zeroes_padding_also_in_layers_that_are_not_cut(make_model, batches, reentrant):
    """Hooks of a reference strategy are in every layer."""
    ids, found = batches[0]["input_ids"], []
    mask = torch.ones_like(ids)
    mask[:2, :5] = 0
    for checkpoints in (False, True):
        model = make_model("llama-gqa", attention="eager").requires_grad_(True).train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with prune(model, "pp_reference", ratio=0.4, skip_layers=(0,), calibration=batches):
            model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-6))


def test_a_layer_alone_is_refused_where_every_batch_decides(make_model, batches):
    model = make_model("llama-gqa")
    states, layer = torch.randn(2, 8, 128), model.model.layers[1]
    rotary = model.model.rotary_emb(states, torch.arange(8)[None])
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned, torch.no_grad():
        with pytest.raises(ModelError, match="layer 1 attention runs outside of a call of its decoder"):
            layer(states, position_embeddings=rotary)
        with pruned.dense():
            layer(states, position_embeddings=rotary)
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches), torch.no_grad():
        layer(states, position_embeddings=rotary)


def test_the_applier_is_asked_for_every_cut_of_every_batch(make_model, batches):
    asked = []

    class Counting(Slice):
        def producer(self, weight, bias, rows):
            asked.append(len(rows))
            return super().producer(weight, bias, rows)

        def consumer(self, weight, columns):
            asked.append(len(columns))
            return super().consumer(weight, columns)

    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.5, calibration=batches, applier=Counting()):
        for _ in range(2):
            asked.clear()
            logits(model, batches[0]["input_ids"])
            assert len(asked) == 3 * (4 + 3)
