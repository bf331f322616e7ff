"""The bundled multiple-choice task is what its script makes, and gives nothing away without the context."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from prunekit.compress.bundled import TEXTS
from prunekit.evaluators.tasks import TRUE_CONTINUATION

from tools.bundled_model import continuations


@pytest.fixture(scope="module")
def questions():
    return [json.loads(line) for line in TRUE_CONTINUATION.read_text(encoding="utf-8").splitlines()]


def test_the_file_is_what_the_script_makes():
    assert continuations.task_data().encode() == TRUE_CONTINUATION.read_bytes()
    assert TRUE_CONTINUATION.stat().st_size < 150_000


def test_answers_are_balanced(questions):
    assert len(questions) == 200
    assert Counter(question["answer"] for question in questions) == {0: 50, 1: 50, 2: 50, 3: 50}
    assert Counter(question["source"] for question in questions) == dict.fromkeys(continuations.SOURCES, 100)


def test_the_right_answer_is_the_texts_own(questions):
    texts = {source: " ".join(TEXTS[source].read_text(encoding="utf-8").split()) for source in continuations.SOURCES}
    for question in questions:
        continued = [f"{question['context']} {choice}" in texts[question["source"]] for choice in question["choices"]]
        assert continued == [place == question["answer"] for place in range(4)]


def test_a_continuation_is_as_often_right_as_any_other(questions):
    for source in continuations.SOURCES:
        mine = [question for question in questions if question["source"] == source]
        offered = Counter(choice for question in mine for choice in question["choices"])
        right = Counter(question["choices"][question["answer"]] for question in mine)
        assert set(offered.values()) == {4}
        assert right == dict.fromkeys(offered, 1)


def test_answers_to_a_question_are_of_one_length(questions):
    for question in questions:
        assert {len(choice.split()) for choice in question["choices"]} == {continuations.CONTINUATION}
    spread = [max(map(len, question["choices"])) - min(map(len, question["choices"])) for question in questions]
    assert sorted(spread)[len(spread) // 2] <= 2


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="tiny has 0 paragraphs"):
        continuations.questions_of("A few words.", "tiny")


@pytest.mark.parametrize("script", ["continuations", "corpus", pytest.param("train", marks=pytest.mark.slow)])
def test_the_scripts_run_in_a_checkout(script):
    root = Path(__file__).resolve().parents[1]
    call = [sys.executable, "-m", f"tools.bundled_model.{script}", "--help"]
    done = subprocess.run(call, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {script}.py" in done.stdout, done.stderr
