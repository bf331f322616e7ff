"""Published perplexities: which models are known, and when a dense value is worth a warning."""

import pytest
from prunekit.evaluators.published_perplexities import PUBLISHED, check_published, known_model

WIKITEXT = {
    "text": "Salesforce/wikitext/wikitext-2-raw-v1/test",
    "documents": "all",
    "separator": "\n\n",
    "window": 2048,
    "stride": 2048,
    "bos": "first",
    "limit": None,
}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("/models/Llama-2-13b-hf/", "llama-2-13b"),
        ("huggyllama/llama-7b", "llama-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("facebook/opt-1.3b", "opt-1.3b"),
        ("meta-llama/Llama-2-7b-chat-hf", None),
        ("mistralai/Mistral-7B-Instruct-v0.1", None),
        ("mistralai/Mistral-7B-v0.3", None),
        ("bundled", None),
    ],
)
def test_known_models_are_told_by_their_names(name, known):
    assert known_model(name) == known


def test_a_dense_value_far_from_the_published_one_is_a_warning():
    assert check_published("meta-llama/Llama-2-7b-hf", WIKITEXT, {"perplexity": 5.47}) is None
    assert check_published("meta-llama/Llama-2-7b-hf", WIKITEXT, {"perplexity": 5.60}) is None
    warning = check_published("meta-llama/Llama-2-7b-hf", WIKITEXT, {"perplexity": 7.72})
    assert "5.47" in warning and "7.72" in warning and "+41%" in warning and "window 2048" in warning
    assert "no finite value" in check_published("facebook/opt-125m", WIKITEXT, {"perplexity": None})
    assert check_published("facebook/opt-125m", {**WIKITEXT, "bos": "every", "stride": 2047}, {"perplexity": 40.0})
    longer = {**WIKITEXT, "window": 4096, "stride": 4096}
    assert check_published("meta-llama/Llama-2-7b-hf", longer, {"perplexity": 5.12}) is None
    assert check_published("meta-llama/Llama-2-7b-hf", longer, {"perplexity": 5.47})


@pytest.mark.parametrize(
    "change",
    [
        {"window": 1024, "stride": 1024},
        {"stride": 512},
        {"limit": 10},
        {"documents": 100},
        {"separator": "\n"},
        {"text": "Salesforce/wikitext/wikitext-2-raw-v1/train"},
        {"text": "bundled reference-evaluation"},
    ],
)
def test_protocols_that_nobody_published_are_not_judged(change):
    assert check_published("meta-llama/Llama-2-7b-hf", {**WIKITEXT, **change}, {"perplexity": 99.0}) is None
    assert check_published("somebody/their-model", WIKITEXT, {"perplexity": 99.0}) is None


def test_measurements_that_are_no_perplexity_are_not_judged():
    assert check_published("facebook/opt-125m", WIKITEXT, {}) is None
    without = {key: value for key, value in WIKITEXT.items() if key != "window"}
    assert check_published("facebook/opt-125m", without, {"perplexity": 99.0}) is None


def test_every_published_value_names_its_source():
    for entries in PUBLISHED.values():
        for window, (value, source) in entries.items():
            assert window >= 1024 and 2 < value < 40 and source
