"""The command: exit codes, where messages go, and that nothing half-written stays."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prunekit import __version__
from prunekit.compress.cli import main
from prunekit.registry import ROLES, Catalog
from typer.testing import CliRunner

QUICK = """\
calibration: {sequences: 2, length: 32}
prune: {use: wanda_sp, ratio: 0.4}
evaluate: [{name: perplexity, window: 32, limit: 2}]
"""

PLUGIN = '''
import time
from typing import Literal
from prunekit.registry import Evaluator, Measurement, hookimpl

class Slow(Evaluator):
    """Takes its time."""
    name: Literal["slow"] = "slow"
    def evaluate(self, subject):
        for _ in subject.progress(iter(range(600)), "slow", 600):
            time.sleep(0.1)
        return Measurement({}, {})

@hookimpl
def evaluators(): return [Slow]
'''


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs ``prunekit`` with arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_BLOCK", raising=False)
    return lambda *arguments: CliRunner().invoke(main.app, [str(argument) for argument in arguments])


@pytest.fixture
def quick(tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


def refused(result, *words):
    """The result is one message on stderr and exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    text = " ".join(result.stderr.split())
    assert all(word in text for word in words), result.stderr


def test_help_and_version_answer_without_torch():
    for arguments in ("--help", "--version", "run --help"):
        code = (
            "import sys; from prunekit.compress.cli import main; sys.argv = ['prunekit', *sys.argv[1:]]\n"
            "try: main.main()\nfinally: sys.exit(7 if 'torch' in sys.modules else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done)
        assert ("prunekit" if "help" in arguments else __version__) in done.stdout


@pytest.mark.parametrize("name", [None, *main.COMMANDS])
def test_help_has_a_short_name(command, name):
    long, short = (command(*([name] if name else []), option) for option in ("--help", "-h"))
    assert short.exit_code == 0 and short.stdout == long.stdout != ""


def test_run_writes_where_it_is_told_and_says_so(command, quick, tmp_path):
    result = command("run", quick, "--out", "out/it", "--set", "prune.ratio=0.2", "--set", "output.trace=true")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "it") in result.stdout
    assert "perplexity" in result.stdout and "requested 20%; removed 20.0%" in result.stdout
    assert json.loads((tmp_path / "out" / "it" / "results.json").read_text())["ratio"]["asked"] == 0.2
    assert (tmp_path / "out" / "it" / "decisions.jsonl").is_file()
    refused(command("run", quick, "--out", "out/it"), "exists", "--out", "--overwrite")
    again = command("run", quick, "--out", "out/it", "--overwrite")
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "out" / "it" / "decisions.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (None, [], ["there is no pipeline file"]),
        ("", [], ["is empty"]),
        ("prune: {use: pp, ratio: 1.5}", [], ["line 1", "prune.ratio", "1.5"]),
        ("prune: {use: ppp, ratio: 0.4}", [], ["did you mean 'pp'?"]),
        (QUICK, ["--set", "prune.ratio"], ["--set prune.ratio", "prune.ratio=0.2"]),
        (QUICK, ["--plugin", "gone.py"], ["gone.py does not exist"]),
        (QUICK, ["--set", "prune.skip_layers=[0,1,2,3,4,5,6]"], ["out of reach", "skip"]),
        (QUICK, ["--set", "prune.skip_layers=[99]"], ["skip_layers", "99"]),
        (QUICK, ["--set", "model.name=./nowhere"], ["nowhere"]),
        (QUICK, ["--set", "calibration.length=100000"], ["calibration.length", "100000"]),
        (QUICK, ["--set", "calibration.file=gone.txt"], ["calibration.file", "gone.txt"]),
        (QUICK, ["--set", "calibration={file: short.txt, length: 32}"], ["short.txt", "calibration.length"]),
        (QUICK, ["--set", "calibration.file=empty.txt"], ["empty.txt", "no text"]),
        (QUICK, ["--set", "evaluate.0.window=100000"], ["perplexity.window", "100000"]),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(command, tmp_path, text, arguments, words):
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "empty.txt").write_text("  \n")
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    before = sorted(tmp_path.rglob("*"))
    refused(command("run", path, *arguments, "--out", "results/here"), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_validate(command, quick):
    result = command("validate", quick)
    assert (result.exit_code, "valid" in result.stdout) == (0, True)
    refused(command("validate", quick, "--set", "prune.scorr=x", "--set", "seed=x"), "2 mistakes", "scorer", "seed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "sent", "code"),
    [
        ("calibrating", signal.SIGINT, 130),
        ("dense: slow", signal.SIGINT, 130),
        ("dense: slow", signal.SIGTERM, 143),
    ],
)
def test_an_interruption_leaves_nothing(quick, tmp_path, when, sent, code):
    (tmp_path / "slow.py").write_text(PLUGIN)
    quick.write_text(QUICK.replace("sequences: 2", "sequences: 900").replace("evaluate: [", "evaluate: [slow, "))
    before = sorted(tmp_path.rglob("*"))
    # Whoever runs the tests in the background has a shell that lets its children ignore Ctrl-C.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = [sys.executable, "-c", f"{heed}; from prunekit.compress.cli.main import main; main()"]
    arguments = ["run", str(quick), "--plugin", str(tmp_path / "slow.py"), "--out", str(tmp_path / "results" / "here")]
    if when != "calibrating":
        arguments += ["--set", "calibration.sequences=2"]
    with subprocess.Popen([*start, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while when not in said and process.poll() is None:
                said += process.stderr.readline()
            time.sleep(0.3)
            process.send_signal(sent)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, said + err
    assert err.strip().splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in said + err
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


# What there is


def test_list_names_every_component(command):
    result = command("list")
    assert result.exit_code == 0
    for role in ROLES:
        assert role in result.stdout
    for entry in Catalog.discover(block="").entries:
        assert entry.name in result.stdout
    only = command("list", "allocators").stdout
    assert "global_adaptive" in only and "wanda_sp" not in only
    refused(command("list", "allocator"), "did you mean 'allocators'?")


def test_list_shows_plugins_and_their_problems(command, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(PLUGIN)
    result = command("list", "evaluators", "--plugin", "slow.py")
    assert result.exit_code == 0
    assert "slow" in result.stdout and "file slow.py" in result.stdout
    found = Catalog.discover(block="")
    found.problems.append("plugin odd of odd 1.0 cannot be imported")
    monkeypatch.setattr(Catalog, "discover", classmethod(lambda cls, files=(): found))
    result = command("list", "evaluators")
    assert result.exit_code == 0
    assert result.stderr.count("cannot be imported") == 1 and "cannot" not in result.stdout
    monkeypatch.undo()
    monkeypatch.setenv("PRUNEKIT_BLOCK", "latency")
    blocked = CliRunner().invoke(main.app, ["list", "evaluators"])
    assert (
        not re.search(r"^\s*latency\b", blocked.stdout, re.MULTILINE)
        and "switched off by PRUNEKIT_BLOCK" in blocked.stderr
    )


def test_show_tells_every_option_of_every_role_of_that_name(command):
    result = command("show", "pp")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert "arXiv 2502.15618" in text
    for words in ("attention_unit: kv_group | query_head, default kv_group", "skip_layers: list of int, default []"):
        assert words in text
    assert "ratio: float, required (unless the allocator takes none)" in text
    assert "In Python: from prunekit.strategies import PP " in text
    random = command("show", "random").stdout
    assert all(role in random for role in ("Strategy", "Scorer", "ProbeSelector"))
    explicit = " ".join(command("show", "explicit").stdout.split())
    assert "attention: list of float, required" in explicit
    refused(command("show", "wanda-sp"), "did you mean 'wanda_sp'?")


def test_choosers_are_called_choosers(command):
    shown = command("show", "obs").stdout
    assert "obs  Strategy, from" in shown and "obs  Chooser (a scorer that orders units jointly), from" in shown
    assert "Scorer, from" not in shown and "ppsp  Scorer, from" in command("show", "ppsp").stdout
    listed = command("list", "scorers").stdout
    assert listed.count("Chooser: ") == 2


def test_show_says_that_a_name_is_provided_twice(command, tmp_path):
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(PLUGIN)
    result = command("show", "slow", "--plugin", "one.py", "--plugin", "two.py")
    assert result.exit_code == 2
    error = " ".join(result.stderr.split("error:")[1].split())
    assert "'slow' is provided twice" in error and "did you mean" not in error


def test_the_commands_fit_a_narrow_terminal(command):
    assert "..." not in command("--help").stdout.split("Commands:")[1]


@pytest.mark.parametrize("name", sorted({entry.name for entry in Catalog.discover(block="").entries}))
def test_show_works_for_everything(command, name):
    result = command("show", name)
    assert result.exit_code == 0 and name in result.stdout


def test_schema_is_json_with_plugins(command, tmp_path):
    (tmp_path / "slow.py").write_text(PLUGIN)
    schema = json.loads(command("schema", "--plugin", "slow.py").stdout)
    assert "slow" in schema["$defs"]["Evaluator"]["anyOf"][0]["enum"]


def test_the_reference_has_plugin_files_too(command, tmp_path):
    (tmp_path / "slow.py").write_text(PLUGIN)
    assert "\n### `slow`\n" in command("schema", "--markdown", "--built-in", "--plugin", "slow.py").stdout
    both = command("schema", "--markdown", "--ablation")
    assert both.exit_code == 2 and "leave --ablation out" in both.stderr


def test_the_installed_command_is_this_one():
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert 'prunekit = "prunekit.__main__:main"' in text
