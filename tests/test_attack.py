"""The quick part of ``make attack``, and that it can fail."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools.attack import hostile

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_quick_part_of_every_attack():
    command = [sys.executable, "-m", "tools.attack", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("| 0 |") == 6


def test_what_is_wrong_is_seen():
    from tools.attack.forked import Ended

    assert Ended(2, "error: p.yaml: seed: should be a whole number", 1.0).wrong() is None
    for code, output, seconds in (
        (1, "Traceback (most recent call last)", 1),
        (1, "KeyError: x; with PRUNEKIT_TRACEBACK=1 it is shown where that was raised", 1),
        (-9, "", 1),
        (2, "error", 6),
        (2, "x" * 30_000, 1),
        (2, "\x1b]0;title\x07", 1),
    ):
        assert Ended(code, output, seconds).wrong() is not None


def test_damage_is_drawn_from_the_seed():
    first, second = (hostile.altered({"a": [1, {"b": 2}]}, random.Random(3)) for _ in range(2))
    assert first == second != {"a": [1, {"b": 2}]}
    assert hostile.damaged(b"x" * 100, random.Random(4)) != b"x" * 100
