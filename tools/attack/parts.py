"""The attacks, each over so many attempts: crashes, full disks, hostile and damaged files."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.compress.bundled import MODEL

from . import hostile
from .forked import LONGEST, Ended, run

SMALL = """calibration: {sequences: 2, length: 64, batch_size: 2}
evaluate: [{name: perplexity, window: 64, limit: 2}]
"""
PIPELINE = SMALL + "prune: {use: flap, ratio: 0.2}\n"
EXPORT = SMALL + "prune: {use: wanda_sp, ratio: 0.2}\n"
STUDY = """base:
  calibration: {sequences: 2, length: 64, batch_size: 2}
  evaluate: [{name: perplexity, window: 64, limit: 2}]
vary: {prune.use: [flap, wanda_sp, magnitude], prune.ratio: [0.2, 0.4]}
"""
GOOD = (
    "run p.yaml --out run",
    "export e.yaml --profile padded --out export",
    "ablate s.yaml --out s.sqlite",
    "report run --out report-run",
    "report s.sqlite --out report",
    "compare run run",
    "diff export export",
    "verify export --no-measure",
)
"""Commands that succeed; what they write is attacked."""

TEXT = '{"text": "one two three"}\n' * 50


@dataclass
class Counts:
    """Attempts of one attack, and what was wrong."""

    attack: str
    attempts: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, *problems: str | None) -> None:
        self.attempts += 1
        self.wrong += [f"{what}: {problem}" for problem in problems if problem]


class Ground:
    """A folder with good files, made once; every attack works on copies."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.draw = folder, random.Random(seed)
        self.seconds: dict[str, float] = {}
        for name, text in (("p.yaml", PIPELINE), ("e.yaml", EXPORT), ("s.yaml", STUDY), ("t.jsonl", TEXT)):
            (folder / name).write_text(text)
        for command in GOOD:
            self.good(command)
        self.trials = trials(folder / "s.sqlite")

    def good(self, command: str) -> None:
        began = time.monotonic()
        ended = run(command.split(), self.folder)
        assert ended.code == 0, ended.output
        name = " ".join(command.split()[:2])
        self.seconds[name] = ended.seconds
        self.seconds[f"wall {name}"] = time.monotonic() - began

    def attempt(self, command: str, like: str, before: Callable[[], None] | None = None) -> tuple[Ended, str | None]:
        """Run a command that takes no longer than a good one and a refusal; says what is wrong."""
        ended = run(command.split(), self.folder, before)
        return ended, ended.wrong(self.seconds[like] + LONGEST) or self.left()

    def left(self) -> str | None:
        """What is left behind that should not be there."""
        found = [path.name for path in self.folder.glob("*") if ".partial" in path.name or path.name == "owned"]
        for path in self.folder.glob(".*.partial*"):
            shutil.rmtree(path, ignore_errors=True)
        return f"{found[0]} is left behind" if found else None

    def fresh(self, source: str, name: str) -> Path:
        """A copy of a good file or folder."""
        target = self.folder / name
        remove(target)
        if (self.folder / source).is_dir():
            shutil.copytree(self.folder / source, target)
        else:
            shutil.copy(self.folder / source, target)
        return target


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def trials(store: Path) -> dict[str, Any]:
    """Metrics by key of the trials that are done."""
    connection = sqlite3.connect(store)
    rows = connection.execute("SELECT key, data FROM trials WHERE status = 'done'").fetchall()
    connection.close()
    return {key: measured(json.loads(data)) for key, data in rows}


def measured(results: dict[str, Any]) -> list[Any]:
    return [[metric["dense"], metric["pruned"]] for metric in results["metrics"]]


def yaml_files(ground: Ground, count: int) -> Counts:
    """Pipeline and ablation files."""
    found = Counts("YAML files")
    for number, content in enumerate(hostile.yamls(PIPELINE + STUDY, count, ground.draw)):
        (ground.folder / "self.yaml").write_bytes(content)
        _, wrong = ground.attempt("validate self.yaml", "ablate s.yaml")
        found.add(f"validate, file {number}", wrong)
    return found


def texts_and_tokenizers(ground: Ground, count: int) -> Counts:
    """Calibration texts, and the tokenizer and configuration of a model."""
    found = Counts("texts and tokenizers")
    for number in range(count):
        section, what = "", "text"
        if number % 2:
            file = ground.draw.choice(["tokenizer.json", "tokenizer_config.json", "config.json"])
            model = ground.folder / "model"
            remove(model)
            shutil.copytree(MODEL, model)
            hostile.altered_file(model / file, ground.draw)
            section, what = "model: {name: model}", file
        else:
            text = ground.draw.choice(
                [b"[" * 100_000, hostile.damaged(TEXT.encode(), ground.draw), b"\x00" * 1000, b"{}\n"]
            )
            (ground.folder / "x.jsonl").write_bytes(text)
            section = "calibration: {file: x.jsonl, sequences: 1, length: 16}"
        (ground.folder / "x.yaml").write_text(
            f"evaluate: [{{name: perplexity, window: 16, limit: 2}}]\nprune: {{use: flap, ratio: 0.2}}\n{section}\n"
        )
        remove(ground.folder / "x")
        ended, wrong = ground.attempt("run x.yaml --out x", "run p.yaml")
        finished = (ground.folder / "x" / "results.json").exists()
        found.add(f"run, {what} {number}", wrong, "it looks finished" if finished != (ended.code == 0) else None)
    return found


def results_and_manifests(ground: Ground, count: int) -> Counts:
    """results.json of runs, prunekit.json and recipes of exports."""
    found = Counts("results and manifests")
    for number in range(count):
        remove(ground.folder / "rep")
        kind = number % 4
        if kind == 0:
            hostile.altered_file(ground.fresh("run", "x") / "results.json", ground.draw)
            command, like = "report x --out rep", "report run"
        elif kind == 1:
            hostile.altered_file(ground.fresh("run", "x") / "results.json", ground.draw)
            command, like = "compare x run", "compare run"
        else:
            hostile.altered_file(ground.fresh("export", "x") / "prunekit.json", ground.draw)
            command, like = (
                ("diff x export", "diff export") if kind == 2 else ("verify x --no-measure", "verify export")
            )
        ended, wrong = ground.attempt(command, like)
        looks = "a report after a refusal" if ended.code and (ground.folder / "rep").exists() else None
        found.add(f"{command}, {number}", wrong, looks, leaked(ground.folder / "rep"))
    return found


def stores(ground: Ground, count: int) -> Counts:
    """Stores of studies."""
    found = Counts("stores")
    for number in range(count):
        remove(ground.folder / "rep")
        hostile.altered_store(ground.fresh("s.sqlite", "x.sqlite"), ground.draw)
        command, like = (
            ("report x.sqlite --out rep", "report s.sqlite")
            if number % 2
            else ("ablate s.yaml --out x.sqlite", "ablate s.yaml")
        )
        ended, wrong = ground.attempt(command, like)
        same = None
        if not number % 2 and ended.code == 0 and "checksum" in ended.output:
            same = None if trials(ground.folder / "x.sqlite") == ground.trials else "other numbers than before"
        found.add(f"{command}, {number}", wrong, same, leaked(ground.folder / "rep"))
    return found


def leaked(folder: Path) -> str | None:
    """What of this machine is in a report: its home folder."""
    home = str(Path.home())
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.suffix in (".html", ".md", ".csv", ".json", ".tex") and f"{home}/" in path.read_text(errors="replace"):
            return f"{path.name} has the home folder"
    return None


def full_disks(ground: Ground, most: int) -> Counts:
    """A disk that is full when the first, second, third, ... file is opened for writing, and files of limited size."""
    found = Counts("full disks")
    commands = {
        "run p.yaml --out x": ("run p.yaml", "x"),
        "export e.yaml --profile padded --out x": ("export e.yaml", "x"),
        "report s.sqlite --out x": ("report s.sqlite", "x"),
        "ablate s.yaml --out x.sqlite": ("ablate s.yaml", "x.sqlite"),
    }
    for command, (like, target) in commands.items():
        for before, label in disks(ground.folder, most):
            remove(ground.folder / target)
            ended, wrong = ground.attempt(command, like, before)
            looks = None
            if target == "x" and ended.code and (ground.folder / "x").exists():
                looks = "a folder that looks finished"
            if target == "x.sqlite" and (ground.folder / target).exists():
                stored = trials(ground.folder / target)
                looks = None if stored.items() <= ground.trials.items() else "a trial of other numbers"
            found.add(f"{command}, {label}", wrong, looks)
            if ended.code == 0 and label.startswith("open"):
                break
    return found


def disks(folder: Path, most: int) -> Iterator[tuple[Callable[[], None], str]]:
    """What makes a child's disk full, the later the further on."""
    for size in (0, 100, 1_000, 10_000, 50_000, 200_000)[:most]:
        yield (lambda size=size: limit_files(size)), f"files of at most {size} bytes"
    for number in range(1, most + 1):
        yield (lambda number=number: full_at(folder, number)), f"open {number}"


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_at(folder: Path, number: int) -> None:
    """Let the ``number``-th opening for writing below the folder fail, and all that follow."""
    seen = 0

    def hook(event: str, arguments: Sequence[Any]) -> None:
        nonlocal seen
        if event != "open" or not isinstance(arguments[0], str) or not arguments[0].startswith(str(folder)):
            return
        mode, flags = arguments[1], arguments[2]
        writes = (
            any(letter in mode for letter in "wxa+")
            if isinstance(mode, str)
            else bool(flags & (os.O_WRONLY | os.O_RDWR))
        )
        if writes and ".lock" not in arguments[0]:
            seen += 1
            if seen >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    sys.addaudithook(hook)


def crashes(ground: Ground, count: int) -> Counts:
    """SIGKILL at random moments of run, export and ablate; the same command then gives the same results."""
    found = Counts("crashes")
    expected = measured(json.loads((ground.folder / "run" / "results.json").read_text()))
    for number in range(count):
        remove(ground.folder / "x")
        run(["run", "p.yaml", "--out", "x"], ground.folder, kill_after=moment(ground, "run p.yaml"))
        finished = ground.folder / "x" / "results.json"
        if (ground.folder / "x").exists():
            same = measured(json.loads(finished.read_text())) == expected
            found.add(f"run {number}, finished", None if same else "other numbers")
            continue
        ended = run(["run", "p.yaml", "--out", "x"], ground.folder)
        same = ended.code == 0 and measured(json.loads(finished.read_text())) == expected
        found.add(f"run {number}", ended.wrong(60), None if same else "other numbers")
    for number in range(count):
        remove(ground.folder / "x")
        command = ["export", "e.yaml", "--profile", "padded", "--out", "x"]
        run(command, ground.folder, kill_after=moment(ground, "export e.yaml"))
        ended = Ended(0, "", 0) if (ground.folder / "x").exists() else run(command, ground.folder)
        check = run(["verify", "x", "--no-measure"], ground.folder)
        found.add(f"export {number}", ended.wrong(60), None if check.code == 0 else "a damaged export")
    found.attempts += count
    found.wrong += [f"ablate: {each}" for each in killed_study(ground, count, in_fork)]
    for path in ground.folder.glob(".*.partial*"):
        remove(path)
    return found


def crashes_with_ray(ground: Ground, count: int) -> Counts:
    """SIGKILL at random moments of a study on two Ray workers."""
    found = Counts("crashes with Ray", count)
    found.wrong = killed_study(ground, count, in_process, ("--engine", "ray", "--workers", "2"))
    return found


def moment(ground: Ground, like: str) -> float:
    return ground.draw.uniform(0.02, 1.0) * ground.seconds[f"wall {like}"]


def killed_study(
    ground: Ground, count: int, start: Callable[[list[str], Path, float | None], int], options: Sequence[str] = ()
) -> Iterator[str] | list[str]:
    """Kill a study ``count`` times, and let it end; says what was lost or differs."""
    wrong, store, before = [], ground.folder / "x.sqlite", {}
    remove(store)
    command = ["ablate", "s.yaml", "--out", "x.sqlite", *options]
    longest = ground.seconds["wall ablate s.yaml"] * (0.5 if not options else 1) + (20 if options else 0)
    for number in range(count):
        if len(before) == len(ground.trials):
            remove(store)
            before = {}
        start(command, ground.folder, ground.draw.uniform(0.02, 1) * longest)
        stored = trials(store) if store.exists() else {}
        if not before.items() <= stored.items():
            wrong.append(f"crash {number} lost a finished trial")
        if not stored.items() <= ground.trials.items():
            wrong.append(f"crash {number} left other numbers")
        before = stored
    if start(command, ground.folder, None) != 0 or trials(store) != ground.trials:
        wrong.append("the study does not end with the same results")
    return wrong


def in_fork(command: list[str], folder: Path, kill_after: float | None) -> int:
    return run(command, folder, kill_after=kill_after).code


def in_process(command: list[str], folder: Path, kill_after: float | None) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "prunekit", *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
