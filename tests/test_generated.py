"""Calibration text that the model itself generates."""

import json

import pytest
import torch
import yaml
from prunekit.compress.ablation.command import ablate
from prunekit.compress.calibration.generated import Generated
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.compress.files.spec import Calibration, PipelineSpec
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.pipeline import Pipeline, calibration_of
from prunekit.registry import DataError, NonFiniteError, SpecError, TextSource

BOS, PAD, EOS = 1, 0, 2


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


def made(model, tokenizer, count=5, length=12, batch_size=2, seed=3, progress=no_progress, **options):
    return Generated(**options).sequences(model, tokenizer, count, length, batch_size, seed, progress)


def drawn_without_cache(model, ids, first, seed, temperature):
    """The tokens from place ``first`` on that the same random numbers choose, by whole passes over what is before."""
    numbers = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).double()
    found = []
    for place in range(first, ids.shape[1]):
        chances = (model(ids[:, :place], use_cache=False).logits[:, -1].double() / temperature).softmax(-1)
        found.append((chances.cumsum(-1) <= numbers[:, place : place + 1]).sum(-1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "opt"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_token_is_drawn_from_the_models_own_distribution(make_model, tokenizer, family, temperature):
    model = make_model(family)
    ids = made(model, tokenizer, temperature=temperature)
    assert ids.shape == (5, 12) and ids.dtype == torch.long and bool((ids[:, 0] == BOS).all())
    assert torch.equal(ids[:, 1:], drawn_without_cache(model, ids, 1, 3, temperature))
    assert not torch.equal(ids[:, 1:], drawn_without_cache(model, ids, 1, 4, temperature))
    assert not torch.equal(ids[:, 1:], drawn_without_cache(model, ids, 1, 3, 3 * temperature))


def test_the_frequencies_of_tokens_are_their_chances(make_model, tokenizer):
    model = make_model("llama-gqa")
    second = made(model, tokenizer, count=4000, length=2, batch_size=4000)[:, 1]
    chances = model(torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    found = torch.bincount(second, minlength=97) / 4000
    assert float((found - chances).abs().max()) < 0.03 < float(chances.max())


def test_the_coldest_text_is_the_likeliest(make_model, tokenizer):
    model = make_model("llama-gqa")
    ids = made(model, tokenizer, temperature=1e-4)
    assert torch.equal(ids[:, 1:], model(ids).logits.argmax(-1)[:, :-1])


def test_batches_make_no_difference_and_a_seed_does(make_model, tokenizer):
    model = make_model("llama-gqa")
    ids = made(model, tokenizer)
    assert len({tuple(row) for row in ids.tolist()}) == 5
    for size in (1, 5, 64):
        assert torch.equal(made(model, tokenizer, batch_size=size), ids)
    assert not torch.equal(made(model, tokenizer, seed=4), ids)


def test_a_random_start_takes_no_special_token(make_model, tokenizer):
    model = make_model("llama-gqa")
    ids = made(model, tokenizer, start="random", count=300, length=3, batch_size=300)
    assert bool((ids[:, 0] == BOS).all())
    assert set(range(3, 97)) >= set(ids[:, 1].tolist()) and len(set(ids[:, 1].tolist())) > 80
    assert torch.equal(ids[:, 2:], drawn_without_cache(model, ids, 2, 3, 1.0))


def test_a_tokenizer_without_bos(make_model, tokenizer):
    tokenizer.bos_token = None
    model = make_model("llama-gqa")
    ids = made(model, tokenizer, start="random", count=300, length=2, batch_size=300)
    assert len(set(ids[:, 0].tolist())) > 80 and not {PAD, EOS} & set(ids[:, 0].tolist())
    with pytest.raises(DataError, match="no BOS token to start with; set start: random"):
        made(model, tokenizer)


@pytest.mark.parametrize(("start", "length"), [("bos", 1), ("random", 1), ("random", 2)])
def test_sequences_no_longer_than_their_start(make_model, tokenizer, start, length):
    assert made(make_model("llama-gqa"), tokenizer, start=start, length=length).shape == (5, length)


def test_the_model_is_as_before(make_model, tokenizer):
    model = make_model("opt", dropout=0.5).train()
    state = torch.get_rng_state()
    ids = made(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(ids, made(model.eval(), tokenizer))


def test_what_cannot_be_generated_is_refused(make_model, tokenizer):
    model = make_model("llama-gqa")
    handle = model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    with pytest.raises(SpecError, match="LlamaForCausalLM has no key/value cache"):
        made(model, tokenizer)
    handle.remove()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"logits are NaN or infinite while it generates .* nothing was pruned"):
        made(model, tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<beyond>"})
    with pytest.raises(DataError, match="generated text contains token id 97, but the model embeds 97 ids only"):
        made(model, tokenizer)


def test_progress_counts_passes(make_model, tokenizer):
    seen = []

    def progress(items, label, total):
        items = list(items)
        seen.append((label, total, len(items)))
        return items

    made(make_model("llama-gqa"), tokenizer, progress=progress)
    assert seen == [("generating text", 33, 33)]


@pytest.fixture
def generating(monkeypatch):
    """How many sequences were generated, each time."""
    counts, own = [], Generated.sequences

    def sequences(self, model, tokenizer, count, *rest):
        counts.append(count)
        return own(self, model, tokenizer, count, *rest)

    monkeypatch.setattr(Generated, "sequences", sequences)
    return counts


def test_a_text_is_generated_once_for_a_model(make_model, tokenizer, generating):
    loaded, known = Loaded(make_model("llama-gqa"), tokenizer, {}), SharedStatistics()
    asked = Calibration(generated={}, sequences=3, length=8, batch_size=2)
    batches, facts = calibration_of(asked, loaded, statistics=known)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1] and len(generating) == 1
    assert facts.text == "generated by the model (start bos, temperature 1)" and facts.seed == 0
    assert calibration_of(asked, loaded, statistics=known)[1].fingerprint == facts.fingerprint
    assert len(generating) == 1
    for other in ({"seed": 1}, {"length": 7}, {"sequences": 2}, {"generated": Generated(temperature=2)}):
        assert calibration_of(asked.model_copy(update=other), loaded, statistics=known)[1].fingerprint not in (
            facts.fingerprint, None,
        )  # fmt: skip
    assert len(generating) == 5
    assert calibration_of(asked, loaded)[1].fingerprint == facts.fingerprint and len(generating) == 6


def test_generated_text_is_a_part_of_a_mixture(make_model, tokenizer, tmp_path, generating):
    (tmp_path / "mine.txt").write_text(" ".join(f"w{number % 94}" for number in range(200)))
    asked = Calibration(mixture=({"generated": {}}, {"file": tmp_path / "mine.txt"}), sequences=5, length=8)
    batches, facts = calibration_of(asked, Loaded(make_model("llama-gqa"), tokenizer, {}))
    assert generating == [3] and facts.text.endswith(" + mine.txt")
    assert bool((batches[0]["input_ids"][:3, 0] == BOS).all()) and len(batches[0]["input_ids"]) == 5


def test_a_study_generates_once_and_its_results_say_so(small_pipeline, tmp_path, generating):
    content = small_pipeline("llama-gqa", use="wanda_sp")
    content["calibration"] = {"generated": {"start": "random"}, "sequences": 4, "length": 16}
    results = Pipeline(PipelineSpec.of(content)).run(tmp_path / "out")
    assert results.record.calibration.text == "generated by the model (start random, temperature 1)"
    again = yaml.safe_load((tmp_path / "out" / "resolved.yaml").read_text())
    assert again["calibration"]["generated"] == {"start": "random", "temperature": 1.0}
    assert Pipeline(again).measure().record.calibration == results.record.calibration
    del generating[:]
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"base": content, "vary": {"prune.use": ["wanda_sp", "flap"], "prune.ratio": [0.2]}}))
    ablate(study, out=tmp_path / "store.sqlite", show=lambda path, trials: None)
    assert generating == [4]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"generated": {}, "limit": 3}, "limit is of texts that are read, and generated text is not"),
        ({"generated": {}, "apply_chat_template": True}, "apply_chat_template is of texts that are read"),
        ({"generated": {}, "bundled": "reference-calibration"}, "found bundled and generated"),
        ({"generated": {"start": "eos"}}, "should be 'bos' or 'random'"),
        ({"generated": {"temperature": 0}}, "should be greater than 0"),
        ({"generated": True}, "expected a mapping of start, temperature"),
        ({"mixture": [{"generated": {}}, {"generated": {}}]}, "would give the same sequences twice"),
    ],
)
def test_options_that_cannot_be_are_refused(options, complaint):
    with pytest.raises(SpecError, match=complaint):
        PipelineSpec.of({"prune": {"use": "flap", "ratio": 0.4}, "calibration": options})


def test_only_calibration_generates():
    assert "generated" not in TextSource.model_fields
    assert "generated" not in Calibration().model_dump() and Calibration().bundled == "reference-calibration"
