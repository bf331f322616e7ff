"""Signals from the first moment on, and a second signal."""

import os
import signal
import subprocess
import sys
import time

import pytest
from prunekit.compress.output import printing, stopping


@pytest.fixture
def asked(monkeypatch):
    """As if a signal had come in, one second ago."""
    monkeypatch.setattr(stopping, "_started", True)
    monkeypatch.setattr(stopping, "_asked", (signal.SIGTERM, time.monotonic() - 1))
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    return left


def test_the_first_signal_raises_and_a_burst_counts_as_one(monkeypatch):
    monkeypatch.setattr(stopping, "_started", True)
    monkeypatch.setattr(stopping, "_asked", None)
    with pytest.raises(stopping.Stopped) as stop:
        stopping._on_signal(signal.SIGTERM, None)
    assert stop.value.code == 143
    stopping._on_signal(signal.SIGTERM, None)


def test_a_second_signal_ends_the_process_at_once(asked):
    stopping._on_signal(signal.SIGINT, None)
    assert asked == [130]


def test_an_exception_that_python_dropped_comes_back(asked):
    with pytest.raises(stopping.Stopped):
        list(printing.Bars().track([1, 2], "steps", 2))


def test_before_the_command_begins_nothing_is_tidied(monkeypatch, capfd):
    left = []

    def leave(code):
        left.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(stopping, "_started", False)
    with pytest.raises(SystemExit):
        stopping._on_signal(signal.SIGTERM, None)
    assert left == [143] and "nothing was written" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 1.0])
def test_sigterm_while_it_starts(tmp_path, after):
    (tmp_path / "p.yaml").write_text("prune: {use: pp, ratio: 0.4}\n")
    code = (
        "import sys; import prunekit.__main__ as entry; print('ready', flush=True); "
        "sys.argv = ['prunekit', 'run', 'p.yaml', '--out', 'out']; entry.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(after)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "interrupted; nothing was written" in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]
