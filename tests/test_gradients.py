"""Statistics of gradients: those of plain autograd, one gradient at a time, and the model as before afterwards."""

import copy
from typing import ClassVar, Literal

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.calibration import gradients
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.registry import (
    Catalog,
    DataError,
    GradientScorer,
    ModelError,
    NonFiniteError,
    PluginError,
    SpecError,
)
from prunekit.strategies.llm_pruner import LlmPruner
from prunekit.strategies.wanda_sp import WandaSp
from pydantic import ValidationError
from torch.nn import functional

from tests.test_plugin_docs import EXAMPLES


class Recording(GradientScorer):
    """A scorer as a plugin has it: notes the matrices that it gets, and scores by |weight times gradient|."""

    name: Literal["recording"] = "recording"
    squared: bool = False
    seen: ClassVar[dict] = {}

    @property
    def needs_squares(self):
        return self.squared

    def reduce(self, matrix):
        self.seen[matrix.path] = copy.deepcopy(matrix)
        return (matrix.weight * matrix.gradient).abs().sum(1)

    def combine(self, parts, site):
        return torch.stack([part.values.sum(1) for part in parts]).sum(0)


class Adding(Recording):
    """The same for what adds up over batches."""

    name: Literal["adding"] = "adding"

    @property
    def additive(self):
        return True

    def reduce(self, matrix):
        return (matrix.weight * matrix.gradient).sum(1)


def loss_of(model, batch):
    """Mean loss of the predicted tokens, and their number."""
    ids, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    return functional.cross_entropy(logits[real], ids[:, 1:][real]), int(real.sum())


def plain(model, batches):
    """The gradients of the mean loss, and the mean squared gradients of the rows' losses, by plain autograd."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())

    def of(loss):
        found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
        return {name: each for name, each in zip(parameters, found, strict=True) if each is not None}

    with torch.enable_grad():
        losses = [loss_of(model, batch) for batch in batches]
        total = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        whole = of(total)
        places = [(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
        rows = [{key: value[row : row + 1] for key, value in batch.items()} for batch, row in places]
        each = [of(loss_of(model, row)[0]) for row in rows]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return whole, {name: torch.stack([one[name].square() for one in each]).mean(0) for name in whole}


def recorded(model, batches, scorer=None, use="llm_pruner", **options):
    """What a scorer gets of every matrix."""
    Recording.seen.clear()
    with prune(model, use, ratio=0.3, calibration=batches, scorer=scorer or Recording(), **options):
        return dict(Recording.seen)


def parts_of(model, batches, scorer=None, **options):
    """What a scorer makes of every site's group."""
    with prune(model, "llm_pruner", ratio=0.3, calibration=batches, scorer=scorer or Recording(), **options) as pruned:
        return [part.values for cut in pruned.cuts for part in cut.state.gradients]


GROUPS = {
    "llama-gqa": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                  "mlp.up_proj", "mlp.down_proj"),
    "opt": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
}  # fmt: skip
CONSUMERS = ("o_proj", "out_proj", "down_proj", "fc2")


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("family", GROUPS)
def test_gradients_are_those_of_plain_autograd(make_model, batches, family, squared):
    model = make_model(family)
    batches = batches[:2]
    batches[1]["attention_mask"] = (torch.arange(24) >= torch.tensor([0, 5, 23, 9])[:, None]).long()  # left padding
    rows = [{key: value[row : row + 1] for key, value in batches[1].items()} for row in (0, 1, 3)]  # row 2: one token
    whole, squares = plain(model, [batches[0], *rows])
    seen = recorded(model, batches, Recording(squared=squared))
    layers = "model.decoder.layers" if family == "opt" else "model.layers"
    assert list(seen) == [f"{layers}.{layer}.{name}" for layer in range(3) for name in GROUPS[family]]
    for path, matrix in seen.items():
        assert matrix.reads == path.endswith(CONSUMERS)
        turned = (lambda t: t.t()) if matrix.reads else (lambda t: t)
        assert torch.equal(matrix.weight, turned(model.get_parameter(f"{path}.weight")))
        torch.testing.assert_close(matrix.gradient, turned(whole[f"{path}.weight"]), rtol=1e-4, atol=1e-7)
        if squared:
            torch.testing.assert_close(matrix.squares, turned(squares[f"{path}.weight"]), rtol=1e-4, atol=1e-9)
        else:
            assert matrix.squares is None


def test_a_group_has_the_matrices_of_a_cut(make_model, batches):
    model = make_model("llama-gqa")
    seen = recorded(model, batches[:1], attention_unit="query_head", skip_layers=[1])
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert set(seen) == {f"model.layers.{layer}.{name}" for layer in (0, 2) for name in names}


def test_the_rows_of_a_unit_stay_together(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "llm_pruner", ratio=0.3, calibration=batches[:1], scorer=Recording()) as pruned:
        cut = pruned.cuts[0]
        parts = cut.state.gradients
        assert [part.values.shape for part in parts] == [(4, 32), (4, 16), (4, 16), (4, 32)]
        assert [part.entries for part in parts] == [32 * 128, 16 * 128, 16 * 128, 32 * 128]
        assert [part.reads for part in parts] == [False, False, False, True]
        expected = Recording().reduce(Recording.seen["model.layers.0.self_attn.k_proj"])
        assert torch.equal(parts[1].values, expected.view(4, 16))


def test_segments_of_a_fused_layer_are_parts(make_model, batches):
    """Rows in three segments, as where one layer computes all queries, then all keys, then all values."""
    from dataclasses import replace

    from prunekit.registry import Producer, Rows

    model = make_model("llama-mha")
    with prune(model, "llm_pruner", ratio=0.3, calibration=batches[:1], scorer=Recording()) as pruned:
        cut = pruned.cuts[1]
        fused = gradients.Matrix(
            cut, Recording(), cut.binding.producers[0][0], "fused", Producer("fused", (Rows(0, 1), Rows(96, 1)))
        )
        cut.binding.__dict__["site"] = replace(cut.site, units=96, unit_size=1)
        fused._vector = torch.arange(192.0)
        assert [part.values.flatten().tolist() for part in fused.parts()] == [
            list(range(96)),
            list(range(96, 192)),
        ]


def test_a_fused_family_of_a_plugin(tmp_path, batches):
    (source,) = [source for source in EXAMPLES if "gpt_neox_japanese" in source]
    (tmp_path / "neox.py").write_text(source)
    config = transformers.GPTNeoXJapaneseConfig(
        vocab_size=97, hidden_size=64, intermediate_multiple_size=2, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole, _ = plain(model, batches[:1])
    with prune(
        model, "llm_pruner", ratio=0.3, calibration=batches[:1], catalog=Catalog.discover([tmp_path / "neox.py"])
    ) as pruned:
        values = [part.values for part in pruned.cuts[0].state.gradients]
    weight = model.gpt_neox_japanese.layers[0].attention.query_key_value.weight
    expected = (weight * whole["gpt_neox_japanese.layers.0.attention.query_key_value.weight"]).abs().sum(1).detach()
    assert [tuple(value.shape) for value in values] == [(4, 48), (4, 16)]
    torch.testing.assert_close(values[0], expected.view(4, 48), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scorer", [Recording(), Recording(squared=True), Adding()], ids=["sums", "squares", "adding"])
def test_one_gradient_at_a_time(make_model, batches, monkeypatch, scorer):
    model, alive = make_model("llama-gqa").requires_grad_(True), []
    take = gradients.Matrix.take

    def counting(matrix, *arguments):
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        take(matrix, *arguments)
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))

    monkeypatch.setattr(gradients.Matrix, "take", counting)
    parts_of(model, batches[:2], scorer)
    passes = 8 if scorer.needs_squares else 2
    assert alive == [1, 0] * (21 * passes)


def test_what_adds_up_is_reduced_at_once(make_model, batches):
    model = make_model("llama-gqa")
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    for one, other in zip(parts_of(model, batches, Adding()), parts_of(model, [together], Adding()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_size_of_batches_makes_no_difference(make_model, batches):
    model = make_model("llama-gqa")
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    for one, other in zip(parts_of(model, batches), parts_of(model, [together]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_less_memory_takes_more_passes_and_gives_the_same(make_counting, batches):
    model = make_counting()
    expected, before = parts_of(model, batches), model.passes
    found = parts_of(model, batches, Recording(memory_gib=4 * 128 * 128 * 3 / 2**30))
    assert before == 4 and model.passes - before > 4 * 7
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_checkpointing_runs_layers_twice_and_gives_the_same(make_model, batches):
    model, runs = make_model("llama-gqa"), []
    expected = parts_of(model, batches)
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: runs.append(1))
    found = parts_of(model, batches, Recording(gradient_checkpointing=True))
    assert len(runs) == 2 * len(batches)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert not any("forward" in vars(layer) for layer in model.model.layers)


# Dtypes.


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_gives_float32_sums_near_those_of_float32(make_model, batches, dtype, bound):
    exact = parts_of(make_model("llama-gqa"), batches)
    for one, other in zip(exact, parts_of(make_model("llama-gqa").to(dtype), batches), strict=True):
        assert other.dtype == torch.float32
        assert float((one - other).norm() / one.norm()) < bound


def test_a_float16_loss_is_scaled(make_model, batches, monkeypatch):
    """Small gradients vanish without a scale; a scale that is too large is lowered."""
    model = make_model("llama-gqa").half()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    found = recorded(model, batches)
    monkeypatch.setattr(gradients, "SCALES", (1.0,))
    vanished = recorded(model, batches)
    monkeypatch.setattr(gradients, "SCALES", (2.0**60, 1.0))
    lowered = recorded(model, batches)
    path = "model.layers.0.mlp.up_proj"
    zeros = [int((each[path].gradient == 0).sum()) for each in (found, vanished)]
    assert zeros[0] * 10 < zeros[1]
    assert torch.equal(lowered[path].gradient, vanished[path].gradient)


def test_gradients_that_are_not_finite_are_named(make_model, batches, monkeypatch):
    monkeypatch.setattr(gradients, "SCALES", (2.0**60,))
    with pytest.raises(NonFiniteError, match=r"model.layers.\d.*: NaN or infinity in the gradient of the loss"):
        parts_of(make_model("llama-gqa").half(), batches)
    model = make_model("llama-gqa")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match="calibration batch 0: the loss of the model is NaN or infinite"):
        parts_of(model, batches)


# The model afterwards.


def state_of(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(id(p), p.requires_grad, id(p.grad) if p.grad is not None else None) for p in model.parameters()],
        [getattr(p, "_post_accumulate_grad_hooks", None) or None for p in model.parameters()],
        [(type(m), m.training, "forward" in vars(m), *(len(getattr(m, h)) for h in hooks)) for m in model.modules()],
    )


class Failing(Recording):
    """Fails in the middle of a backward pass."""

    name: Literal["failing"] = "failing"

    def reduce(self, matrix):
        if "layers.1" in matrix.path:
            raise RuntimeError("this scorer is broken")
        return super().reduce(matrix)


@pytest.mark.parametrize("scorer", [Recording(gradient_checkpointing=True), Failing(gradient_checkpointing=True)])
def test_everything_is_restored(make_model, batches, scorer):
    model = make_model("llama-gqa", attention_dropout=0.2).requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    model.model.layers[2].eval()
    loss_of(model, batches[0])[0].backward()
    before, weights = state_of(model), [p.detach().clone() for p in model.parameters()]
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if isinstance(scorer, Failing):
        with pytest.raises(PluginError, match=r"scorer failing: reduce failed at .*layers.1.*: this scorer is broken"):
            parts_of(model, batches[:1], scorer)
    else:
        parts_of(model, batches[:1], scorer)
    assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(a is None or torch.equal(p.grad, a) for a, p in zip(kept, model.parameters(), strict=True))


def test_training_mode_and_frozen_parameters_change_nothing(make_model, batches):
    expected = parts_of(make_model("opt"), batches)
    model = make_model("opt", dropout=0.3, attention_dropout=0.3).train().requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert all(torch.equal(one, other) for one, other in zip(expected, parts_of(model, batches), strict=True))


def test_tied_embeddings(make_model, batches):
    model = make_model("llama-gqa", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    whole, _ = plain(model, batches[:1])
    seen = recorded(model, batches[:1])
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"):
        torch.testing.assert_close(seen[path].gradient, whole[f"{path}.weight"], rtol=1e-4, atol=1e-7)
    assert model.lm_head.weight.grad is None


def test_inside_inference_mode(make_model, batches):
    model = make_model("llama-gqa")
    expected = parts_of(model, batches)
    with torch.inference_mode():
        found = parts_of(model, [{"input_ids": batch["input_ids"] + 0} for batch in batches])
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


# Shared.


def test_a_study_takes_gradients_once(make_counting, batches):
    model, statistics = make_counting(), SharedStatistics()

    def run(**options):
        before = model.passes
        prune(model, "llm_pruner", calibration=batches, statistics=statistics, **options).remove()
        return model.passes - before

    assert run(ratio=0.3) == 4
    assert run(ratio=0.5, allocator="global_ranking") == 0
    assert run(ratio=0.5, skip_layers=[0]) == 0
    assert run(ratio=0.3, scorer={"name": "llm_pruner", "importance": "vector"}) == 4
    assert run(ratio=0.3, attention_unit="query_head") == 4


def test_a_statistics_file_serves_what_else_is_read(make_counting, batches, tmp_path):
    model, file = make_counting(), tmp_path / "statistics"
    for _ in range(2):
        with prune(model, "llm_pruner", ratio=0.3, calibration=batches, statistics=file, compensate="mean") as pruned:
            assert pruned.cuts[0].history.mean is not None
    assert model.passes == 4 + 4 + 4


# What is refused.


def test_a_probe_has_no_gradients():
    for strategy, options in ((LlmPruner, {}), (WandaSp, {"scorer": Recording()})):
        with pytest.raises(ValidationError, match="reads gradients of the loss, which a probe does not have"):
            strategy(ratio=0.3, **options, **PROBE)


def _probe():
    from prunekit.strategies.pp.mergers import ImportanceScaled
    from prunekit.strategies.pp.selectors import ResidualNorm

    return {"selector": ResidualNorm(), "merger": ImportanceScaled()}


PROBE = _probe()


def offloaded(model):
    import accelerate

    accelerate.cpu_offload(model.model.layers[1].mlp.up_proj)


def integers(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def hooked(model):
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    weight.register_post_accumulate_grad_hook(lambda weight: weight.data.zero_())


def undifferentiated(model):
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))


class Fused(torch.autograd.Function):
    """A kernel without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


def fused(model):
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, args, output: Fused.apply(output))


def detached(model):
    model.model.norm.register_forward_hook(lambda module, args, output: output.detach())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (offloaded, "model.layers.1.mlp.up_proj.weight is offloaded, and gradients need the whole model in memory"),
        (integers, "model.layers.1.mlp.up_proj: a weight of int8 has no gradient; load the model unquantised"),
        (hooked, "model.layers.1.mlp.up_proj: the weight has a hook that acts on its gradient"),
        (undifferentiated, "model.layers.1.self_attn.q_proj got no gradient: .*fused kernels.*skip_layers"),
        (fused, "this LlamaForCausalLM cannot be differentiated .a fused kernel without gradients, say.: .*backward"),
        (detached, "model.layers.0.self_attn.q_proj got no gradient"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_weights_without_gradients_are_refused_by_name(make_model, batches, change, words):
    model = make_model("llama-gqa")
    change(model)
    before = state_of(model)
    with pytest.raises(ModelError, match=words):
        prune(model, "llm_pruner", ratio=0.3, calibration=batches[:1])
    assert state_of(model) == before


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_a_backward_pass_that_does_not_fit_is_said_to_be_too_large(make_model, batches, error, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch.Tensor, "backward", full)
    with pytest.raises(ModelError, match=r"does not fit in memory; lower calibration.batch_size, .* memory_gib"):
        prune(make_model("llama-gqa"), "llm_pruner", ratio=0.3, calibration=batches[:1])


def test_other_models_and_texts_are_refused(make_model, batches):
    with torch.inference_mode():
        model = make_model("llama-gqa")
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight was made in inference mode"):
        parts_of(model, batches)
    model = make_model("llama-gqa")
    with pytest.raises(DataError, match="no row of the calibration text has two tokens"):
        parts_of(model, [{"input_ids": torch.tensor([[5], [6]])}])
    with pytest.raises(DataError, match="strategy llm_pruner takes gradients: give it calibration batches"):
        prune(model, "llm_pruner", ratio=0.3)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="scorer llm_pruner takes gradients of the loss of the next token, and this"):
        prune(model, "llm_pruner", ratio=0.3, calibration=batches)


def test_a_reduction_of_another_shape_is_named(make_model, batches):
    class Wrong(Recording):
        """Reduces the other dimension."""

        name: Literal["wrong"] = "wrong"

        def reduce(self, matrix):
            return matrix.gradient.sum(0)

    with pytest.raises(SpecError, match=r"layer \d \w+: reduce of scorer wrong returned shape"):
        parts_of(make_model("llama-gqa"), batches[:1], Wrong())


def test_a_plugin_file_scores_by_gradients(make_model, batches, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from prunekit.registry import GradientScorer, hookimpl\n"
        "class Mine(GradientScorer):\n"
        '    """By the gradient alone."""\n'
        '    name: Literal["mine"] = "mine"\n'
        "    def reduce(self, matrix): return matrix.gradient.norm(dim=1)\n"
        "    def combine(self, parts, site): return parts[-1].values.norm(dim=1)\n"
        "@hookimpl\n"
        "def scorers(): return [Mine]\n"
    )
    model, catalog = make_model("opt"), Catalog.discover([tmp_path / "mine.py"])
    whole, _ = plain(model, batches)
    with prune(model, "wanda_sp", ratio=0.5, calibration=batches, catalog=catalog, scorer="mine") as pruned:
        scores = whole["model.decoder.layers.0.fc2.weight"].norm(dim=0)
        assert pruned.sites_kept[0, "mlp"] == tuple(scores.topk(96).indices.sort().values.tolist())
