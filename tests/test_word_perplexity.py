"""The word-level convention against lm-evaluation-harness itself, and how it finds WikiText's pages."""

import json
import math

import pytest
import torch
import yaml
from prunekit.compress import Pipeline, PipelineSpec, prune
from prunekit.compress.bundled import MODEL
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource
from prunekit.compress.runs.documents import read_documents
from prunekit.evaluators.perplexity import Perplexity
from prunekit.evaluators.published_perplexities import check_published
from prunekit.evaluators.wikitext_words import pages_of
from prunekit.registry import DataError, PlainSubject, TextSource
from pydantic import ValidationError

ROWS = [
    "",
    " = Cut = \n",
    "",
    ' A cut , made @-@ to @-@ measure , costs 1 @,@ 500 . It is " small " ( or so ) . \n',
    "",
    " = = Kinds = = \n",
    "",
    " Some keep = all = of it ; some do not . \n",
    "",
    " = Probe = \n",
    "",
    " A probe 's worth : \u00e9t\u00e9 . \n",
    "",
]
FILE = "".join(row or " \n" for row in ROWS)


@pytest.fixture(scope="module")
def loaded():
    # In bfloat16 lm-eval would take the log-softmax and its sums in bfloat16 too.
    return load(ModelSource(name=str(MODEL), device="cpu", dtype="float32"))


def subject_of(loaded, documents=None):
    found = PlainSubject(loaded.model, loaded.tokenizer)
    found.read = read_documents if documents is None else (lambda source: documents)
    return found


def from_lm_eval(loaded, pages, window):
    """What lm-evaluation-harness says of these pages, through its own task and model classes."""
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.wikitext import preprocess_wikitext as own

    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task = {
        "task": "pages",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([{"page": page} for page in pages])},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": own.wikitext_detokenizer,
        "process_results": own.process_results,
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False}
            for name, how in zip(names, ("weighted_perplexity", "weighted_perplexity", "bits_per_byte"), strict=True)
        ],
    }
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=window, batch_size=2)
    tasks = TaskManager(include_defaults=False)  # reading lm-eval's own tasks takes seconds
    found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0)["results"][
        "pages"
    ]
    return {name: found[f"{name},none"] for name in names}


def check(loaded, documents, pages, window):
    subject = subject_of(loaded, documents)
    found = Perplexity(convention="wikitext_words", window=window, batch_size=3).evaluate(subject)
    expected = from_lm_eval(loaded, pages, window)
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found.protocol["pages"] == len(pages)
    assert found.protocol["words"] == sum(len(page.split()) + 2 for page in pages)  # lm-eval counts blanks at the ends
    assert found.protocol["bytes"] == sum(len(page.encode()) for page in pages)
    total = found.values["loss"] * found.protocol["tokens"]
    assert found.values["word_perplexity"] == pytest.approx(math.exp(total / found.protocol["words"]))
    assert found.values["perplexity"] == pytest.approx(math.exp(found.values["loss"]))
    assert sum(found.details["window_losses"]) == pytest.approx(total)
    assert sum(found.details["window_tokens"]) == found.protocol["tokens"]


def test_pages_begin_at_titles():
    pages = pages_of([FILE])
    assert len(pages) == 2 and "".join(f"{page}\n" for page in pages) == FILE.removeprefix(" \n") + "\n"
    assert [page.split("\n")[0] for page in pages] == [" = Cut = ", " = Probe = "]
    assert pages_of(ROWS) == pages_of(pages) == pages
    assert pages_of([row.removesuffix("\n") for row in ROWS]) == pages
    assert pages_of(["preface", *ROWS[1:]])[0].strip() == "preface"
    plain = ["one\n= = no title = =\n=\n", " \n", "two = 2"]
    assert pages_of(plain) == [plain[0], plain[2]]


@pytest.mark.parametrize("window", [16, 128])
def test_small_pages_get_what_lm_eval_says(loaded, window):
    check(loaded, ROWS, pages_of([FILE]), window)


def test_real_pages_get_what_lm_eval_says(shared):
    folder, file = shared / "models" / "stories260k-hf", shared / "corpus" / "wikitext2-raw-test.txt"
    if not folder.is_dir() or not file.is_file():
        pytest.skip("needs the shared model and text")
    pages = pages_of([file.read_text(encoding="utf-8")])
    assert len(pages) == 62  # as many as lm-eval's dataset has
    few = sorted(pages, key=len)[:3]
    check(load(ModelSource(name=str(folder), device="cpu")), few, few, 256)


def test_both_conventions_side_by_side(tmp_path):
    (tmp_path / "text.txt").write_text(FILE * 4, encoding="utf-8")
    text = {"file": str(tmp_path / "text.txt")}
    evaluate = [
        {"name": "perplexity", "text": text, "window": 32},
        {"name": "perplexity", "text": text, "window": 32, "convention": "wikitext_words", "limit": 3},
    ]
    pipeline = {"prune": {"use": "pp", "ratio": 0.4}, "calibration": {"sequences": 2, "length": 32}}
    results = Pipeline({**pipeline, "evaluate": evaluate}).measure()
    assert set(results.metrics) == {
        "perplexity 1.perplexity", "perplexity 1.loss", "perplexity 2.perplexity", "perplexity 2.loss",
        "perplexity 2.word_perplexity", "perplexity 2.byte_perplexity", "perplexity 2.bits_per_byte",
    }  # fmt: skip
    one, two = results.record.metrics
    assert (one.protocol["convention"], two.protocol["convention"]) == ("tokens", "wikitext_words")
    assert two.protocol["pages"] == two.protocol["limit"] == 3
    for side in ("dense", "pruned"):
        assert len(two.details[side]["window_losses"]) == two.protocol["windows"]
    for values in (two.dense, two.pruned):
        assert values["word_perplexity"] > values["perplexity"] > values["byte_perplexity"]
    json.dumps(results.record.as_json(), allow_nan=False)
    again = PipelineSpec.of(yaml.safe_load(results.resolved)).evaluate
    assert [evaluator.convention for evaluator in again] == ["tokens", "wikitext_words"]
    assert check_published("meta-llama/Llama-2-7b-hf", {**two.protocol, "window": 2048}, two.dense) is None


def test_probing_strategies_get_windows_of_one_length_in_text_order(loaded):
    shapes, seen = [], []

    def show(_, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        seen.append(kwargs["input_ids"])
        assert "attention_mask" not in kwargs

    subject = subject_of(loaded, ROWS)
    handle = loaded.model.register_forward_pre_hook(show, with_kwargs=True)
    calibration = [torch.randint(3, 500, (4, 16), generator=torch.Generator().manual_seed(0))]
    with prune(loaded.model, "pp", ratio=0.4, calibration=calibration):
        Perplexity(convention="wikitext_words", window=16, batch_size=3).evaluate(subject)
    handle.remove()
    assert all(rows <= 3 and length <= 16 for rows, length in shapes) and (3, 16) in shapes
    # Every page begins with the prefix, and with the BOS that this tokenizer adds itself.
    begins = torch.cat([ids[:, :2] for ids in seen])
    assert (begins == loaded.tokenizer.bos_token_id).sum(1).tolist() == [2, 0, 0, 0, 2, 0]


def test_options_of_the_other_convention_are_refused():
    for option in ({"stride": 8}, {"bos": "every"}, {"separator": " "}, {"tail": "drop"}):
        with pytest.raises(ValidationError, match=f"has its own way to cut the text; leave {next(iter(option))} out"):
            Perplexity(convention="wikitext_words", **option)


def test_tokenizers_without_bos_begin_with_eos(loaded):
    class Letters:
        bos_token_id, eos_token_id = None, 1

        def encode(self, text, **kwargs):
            return [3 + ord(letter) % 90 for letter in text]

    subject = subject_of(loaded, ["abc"])
    subject.tokenizer = Letters()
    asked = Perplexity(convention="wikitext_words", window=16)
    found = asked.evaluate(subject)
    assert (found.protocol["prefix"], found.protocol["tokens"], found.protocol["words"]) == (1, 3, 1)
    subject.tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="has neither; use convention: tokens"):
        asked.evaluate(subject)
    subject.tokenizer.eos_token_id, subject.read = 1, lambda source: [" "]
    with pytest.raises(DataError, match="reference-evaluation gives no tokens to score"):
        asked.evaluate(subject)
    subject.tokenizer.encode = lambda text, **_: [10**6]
    subject.read = lambda source: ["a"]
    with pytest.raises(DataError, match="token id 1000000"):
        asked.evaluate(subject)
    assert Perplexity().text == TextSource(bundled="reference-evaluation")
