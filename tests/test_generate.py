"""``prunekit generate`` and ``generate()``: prompts, answers, and what is measured of them."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from prunekit.compress import Exporter, PipelineSpec, generate, load, prune
from prunekit.compress.cli import main
from prunekit.compress.export.generating import by_kind
from prunekit.compress.output import printing
from prunekit.compress.output.folders import whole_file
from prunekit.compress.runs.prompts import encoded, prompts_of, read_prompts
from prunekit.registry import DataError, SpecError
from prunekit.registry.tensors.caches import cache_bytes
from prunekit.registry.tensors.tokens import ending_ids, left_padded, until_end
from transformers import DynamicCache
from typer.testing import CliRunner

from tests.test_generation import greedy, zeroed_copy

SHORT, LONG = "w5 w17 w40", "w3 w80 w2 w61 w9 w44 w27 w30"
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'system' else '</s>' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w93{% endif %}"
)


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(make_model):
    found = make_model("llama-gqa")
    found.generation_config.eos_token_id = None
    return found


def written(found):
    return [answer.tokens for answer in found.answers]


# Answers


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_are_those_of_the_model_without_the_dropped_units(model, tokenizer, batches, batch_size):
    clean = copy.deepcopy(model)
    ids, mask = left_padded([encoded(p, tokenizer) for p in prompts_of([SHORT, LONG])], 0)
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
        found = generate(pruned, [SHORT, LONG], tokenizer=tokenizer, max_new_tokens=8, batch_size=batch_size)
        last = zeroed_copy(clean, pruned, pruned.trace[-6:])
        kept = found.kept
        with pruned.dense():
            dense = generate(pruned, [SHORT, LONG], tokenizer=tokenizer, max_new_tokens=8, batch_size=batch_size)
    rows = slice(2 - batch_size, 2)  # the units of the last batch
    expected = greedy(last, ids[rows], mask[rows])[:, ids.shape[1] :].tolist()
    assert written(found)[rows] == expected
    assert written(dense) == greedy(clean, ids, mask)[:, ids.shape[1] :].tolist() != written(found)
    assert kept == {"attention": (7, 12), "mlp": (346, 576)} and dense.kept["mlp"] == (576, 576)
    assert found.cache_bytes * 12 == dense.cache_bytes * 7
    assert found.answers[0].text == tokenizer.decode(written(found)[0])


def test_an_answer_depends_on_its_batch_alone(model, tokenizer, batches):
    with prune(model, "pp", ratio=0.4, calibration=batches, merger={"momentum": 0.1}) as pruned:
        alone = generate(pruned, SHORT, tokenizer=tokenizer, max_new_tokens=8)
        after = generate(pruned, [LONG, SHORT, SHORT], tokenizer=tokenizer, max_new_tokens=8)
    assert written(after)[1:] == written(alone) * 2


def test_an_answer_ends_with_the_eos(model, tokenizer):
    all_tokens = written(generate(model, SHORT, tokenizer=tokenizer, max_new_tokens=8))[0]
    model.generation_config.eos_token_id = [all_tokens[3], 96]
    (answer,) = generate(model, SHORT, tokenizer=tokenizer, max_new_tokens=8).answers
    assert answer.ended and answer.tokens == all_tokens[: all_tokens.index(all_tokens[3]) + 1]
    assert answer.record["new_tokens"] == len(answer.tokens) and answer.record["prompt_tokens"] == 3
    together = generate(model, [LONG, SHORT], tokenizer=tokenizer, max_new_tokens=8, batch_size=2)
    assert together.answers[1].tokens == answer.tokens
    assert (ending_ids(model), until_end([1, 2, 3], (5,)), until_end([1, 5, 3], (5,))) == (
        (all_tokens[3], 96),
        [1, 2, 3],
        [1, 5],
    )


def test_samples_depend_on_the_seed(model, tokenizer):
    options = dict(tokenizer=tokenizer, max_new_tokens=12, temperature=1.5)
    first, again, other = (written(generate(model, SHORT, seed=seed, **options)) for seed in (1, 1, 2))
    assert first == again != other


def test_times_and_the_pieces_of_an_answer(model, tokenizer):
    pieces = []
    found = generate(model, SHORT, tokenizer=tokenizer, max_new_tokens=6, write=pieces.append)
    assert "".join(pieces).split() == found.answers[0].text.split() and len(pieces) > 3
    assert 0 < found.first_token_seconds <= found.seconds and found.token_seconds > 0
    assert found.tokens_per_second == pytest.approx(6 / found.seconds)
    pieces_before = len(pieces)
    one = generate(model, [SHORT, LONG], tokenizer=tokenizer, max_new_tokens=1, batch_size=2, write=pieces.append)
    assert one.token_seconds is None and len(pieces) == pieces_before
    assert found.cache_bytes == 3 * 2 * 4 * (3 + 5) * 16 * 4  # layers, keys and values, heads, positions, size, bytes


def test_bytes_of_a_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4), 0)
    cache.update(torch.zeros(2, 1, 5, 4, dtype=torch.bfloat16), torch.zeros(2, 1, 5, 4, dtype=torch.bfloat16), 1)
    assert cache_bytes(cache) == 2 * 120 * 4 + 2 * 40 * 2
    assert cache_bytes(None) == 0


def test_routed_experts_are_counted_together():
    sites = [("attention", 2, 4), ("mlp", 0, 8), ("expert0", 3, 8), ("expert1", 4, 8)]
    assert by_kind(sites) == {"attention": (2, 4), "mlp": (0, 8), "expert channels": (7, 16)}


# Prompts


def test_prompts_go_through_the_chat_template(chatting):
    texts = {
        "w5 w6": "</s> w5 w6 w93",
        (("user", "w5"), ("assistant", "w6"), ("user", "w7")): "</s> w5 </s> w6 </s> w7 w93",
    }
    for given, text in texts.items():
        content = given if isinstance(given, str) else [{"role": r, "content": c} for r, c in given]
        (prompt,) = prompts_of([content])
        assert chatting.decode(encoded(prompt, chatting)) == text
        assert chatting.decode(encoded(prompt, chatting, "w1")) == f"<s> w1 {text}"
    assert chatting.decode(encoded(prompts_of("w5 w6")[0], chatting, chat=False)) == "w5 w6"


USER = {"role": "user", "content": "w5"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 cannot be read as JSON"),
        ('"w1"', r"line 2 has neither of prompt and messages; write \{"),
        ('{"text": "w1"}', "line 2 has neither of"),
        ('{"prompt": "w1", "messages": []}', "line 2 has both of"),
        ('{"prompt": ["w1"]}', r"line 2: prompt is \['w1'\]; write"),
        ('{"messages": "w1"}', "line 2: messages is 'w1'"),
        ('{"messages": []}', r"line 2: \[\] is neither a text nor a chat"),
        ('{"messages": [{"role": "user"}]}', "line 2: .* is neither a text nor a chat"),
        ('{"messages": [{"role": "assistant", "content": "w1"}]}', "line 2 ends with an answer"),
        (json.dumps({"messages": [USER]}), "line 2 has the messages of a chat, .* tokenizer has none"),
        ('{"prompt": ""}', "line 2 has no tokens"),
        (
            '{"prompt": "' + "w1 " * 250 + '"}',
            "line 2: 250 tokens and 8 new ones are more than the model's context of 256",
        ),
    ],
)
def test_a_bad_line_is_named(command, small_pipeline, tmp_path, line, message):
    """As a whole command: exit code 2, and no file."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_pipeline(use="wanda_sp")))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n' + line)
    out = tmp_path / "there" / "answers.jsonl"
    code, output = command(
        "generate", tmp_path / "run.yaml", "--file", tmp_path / "prompts.jsonl", "--out", out, "--max-new-tokens", 8
    )
    assert code == 2 and not out.parent.exists()
    assert re.search(f"prompts.jsonl, {message}", output), output


def test_prompts_that_cannot_be_used(model, tokenizer, chatting, tmp_path):
    def ask(prompts, **options):
        return generate(model, prompts, tokenizer=chatting, **options)

    for prompts, options, error, message in [
        ([], {}, DataError, "no prompt"),
        ([3], {}, DataError, "prompt 1: 3 is neither a text nor a chat"),
        ("w1 \ud800", {"chat": False}, DataError, "prompt 1 holds half of a surrogate pair"),
        ([[USER]], {"chat": False}, DataError, "prompt 1 has the messages of a chat.*switched off"),
        ([[{"role": "system", "content": "w2"}, USER]], {"system": "w1"}, DataError, "system message of its own"),
        ("w1", {"system": "w2", "chat": False}, SpecError, "a system message needs a chat template"),
        ("w1", {"max_new_tokens": 0}, SpecError, "at least 1"),
        ("w1", {"max_new_tokens": 500}, DataError, "ask for 25. new tokens or fewer"),
    ]:
        with pytest.raises(error, match=message):
            ask(prompts, **options)
    with pytest.raises(SpecError, match="pass tokenizer="):
        generate(model, "w1")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "blank.jsonl")


def test_what_the_pruned_model_refuses_names_the_prompt(model, tokenizer, batches):
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        with pytest.raises(DataError, match=r"^prompt 2: .*longer than the history"):
            generate(pruned, [SHORT, "w1 " * 40], tokenizer=tokenizer, max_new_tokens=2)


# The command


@pytest.fixture
def pipeline(tmp_path, small_pipeline):
    """The content of a pipeline file, and the file."""

    def make(**strategy):
        data = small_pipeline(**strategy)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
        return data, tmp_path / "run.yaml"

    return make


def printed(*arguments):
    """The plain data that the command prints."""
    result = CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_file_of_prompts_and_the_dense_answers(command, pipeline, tmp_path):
    _, path = pipeline(use="pp")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(f'{{"prompt": "{SHORT}", "note": 1}}\n\n{{"prompt": "{LONG}"}}\n')
    arguments = ["generate", path, "--file", prompts, "--out", out, "--max-new-tokens", 6, "--device", "cpu"]
    code, output = command(*arguments, "--dense")
    assert code == 0, output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [SHORT, LONG]
    assert all(record["dense"].keys() == {"answer", "prompt_tokens", "new_tokens", "ended"} for record in records)
    assert "measurement pp dense" in output and "answers: " in output
    assert "kept units, mlp 346 of 576 576 of 576" in output and "key/value cache" in output
    assert [path.name for path in tmp_path.glob(".*")] == []
    code, output = command(*arguments)
    assert code == 2 and "exists; choose another with --out, or replace it with --overwrite" in output
    assert command(*arguments, "--overwrite")[0] == 0
    assert ["dense" in json.loads(line) for line in out.read_text().splitlines()] == [False, False]


def test_settings_and_plain_data(command, pipeline):
    _, path = pipeline(use="wanda_sp")
    arguments = ["generate", path, "--prompt", SHORT, "--prompt", LONG, "--max-new-tokens", 4, "--json"]
    found = [printed(*arguments, *more) for more in ([], ["--set", "prune.ratio=0.2"])]
    units = [each["wanda_sp"]["kept"]["mlp"] for each in found]
    assert units == [{"kept": 346, "units": 576}, {"kept": 461, "units": 576}]
    assert [answer["prompt"] for answer in found[0]["wanda_sp"]["answers"]] == [SHORT, LONG]
    assert found[0]["wanda_sp"]["new_tokens"] == sum(a["new_tokens"] for a in found[0]["wanda_sp"]["answers"])


@pytest.mark.parametrize("profile", ["hf-hetero", "dynamic"])
def test_an_export_answers_as_the_pruned_model(command, pipeline, tmp_path, profile):
    data, path = pipeline(use="pp" if profile == "dynamic" else "wanda_sp")
    Exporter(PipelineSpec.of(data), profile, tmp_path / "export").export()
    asked = ["--prompt", SHORT, "--max-new-tokens", 6, "--json"]
    (own,), (exported,) = (printed("generate", place, *asked).values() for place in (path, tmp_path / "export"))
    assert exported["answers"] == own["answers"]
    assert exported["kept"] == own["kept"]
    if profile == "dynamic":
        assert written(generate(load(tmp_path / "export"), SHORT, max_new_tokens=6))
    else:
        code, output = command("generate", tmp_path / "export", "--prompt", SHORT)
        assert code == 0 and "kept units, mlp 346 of 576" in output
    code, output = command("generate", tmp_path / "export", "--prompt", "w1", "--set", "prune.ratio=0.2")
    assert code == 2 and "only those have keys" in output


def test_a_model_as_it_is(command, save_model, tmp_path):
    save_model(tmp_path / "plain")
    code, output = command("generate", tmp_path / "plain", "--prompt", SHORT, "--max-new-tokens", 3)
    assert code == 0 and "measurement not pruned" in output and "kept units" not in output
    code, output = command("generate", tmp_path / "plain", "--prompt", SHORT, "--dense")
    assert code == 2 and "is not pruned, so there is no dense model here" in output
    for wrong in ([], ["--prompt", "w1", "--file", tmp_path / "none.jsonl"]):
        code, output = command("generate", tmp_path / "plain", *wrong)
        assert code == 2 and "a prompt is needed" in output


def test_in_a_terminal_the_answer_comes_in_pieces(command, save_model, tmp_path, monkeypatch):
    save_model(tmp_path / "plain")
    pieces = []
    monkeypatch.setattr(printing, "out", printing.SafeConsole(force_terminal=True, width=100))
    monkeypatch.setattr(printing, "write", pieces.append)
    code, _ = command("generate", tmp_path / "plain", "--prompt", SHORT, "--max-new-tokens", 6)
    assert code == 0 and len(pieces) > 3


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a" / "b.jsonl") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "a" / "b.jsonl") as partial:
        partial.write_text("whole")
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["whole"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"), whole_file(tmp_path / "file" / "b"):
        pass
    with pytest.raises(SpecError, match="it is not a file"), whole_file(tmp_path / "a", overwrite=True):
        pass


def test_every_option_is_described(command):
    page = (Path(__file__).resolve().parents[1] / "docs" / "pipeline-files.md").read_text(encoding="utf-8")
    section = page.split("## `prunekit generate`")[1].split("\n## ")[0]
    options = set(re.findall(r"--[a-z-]+", command("generate", "--help")[1])) - {"--help", "--chat"}
    assert len(options) > 12 and [name for name in sorted(options) if f"`{name}" not in section] == []
