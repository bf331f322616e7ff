"""Every block of YAML on the pages is a valid file or a part of one, and every block of Python runs."""

import ast
import gzip
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from prunekit.compress import prune
from prunekit.compress.ablation.study import Study
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import Catalog
from prunekit.registry.checks import check_component

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "compress" / "bundled" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLUGINS = ROOT / "docs" / "examples" / "plugin"
STORE = ROOT / "tests" / "reporting" / "stored" / "study.sqlite.gz"
FRAGMENT = "<!-- fragment -->\n"
"""On the line before a block of YAML that is not a file: it is only parsed. Readers do not see it."""
RUN_ELSEWHERE = ("README.md", "docs/python.md")
"""Their blocks are run by tests/test_docs.py, which looks at what they print."""
ELSEWHERE = {"llama_cpp", "llmcompressor", "torchao"}
"""Packages that the tests do not install. Blocks that import them are compiled, and their other imports resolved."""
FLAP = """\
calibration: {sequences: 4, length: 64}
prune: {use: flap, ratio: 0.4}
evaluate: [{name: perplexity, window: 64, limit: 2}]
"""


def blocks(language: str, chosen=lambda source: True) -> list:
    """The blocks of a language on all pages, each with its page's name, and whether it is marked as a fragment."""
    found = []
    for path in PAGES:
        page, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for block in re.finditer(rf"({FRAGMENT})?^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            if chosen(block[2]):
                line = page.count("\n", 0, block.start(2))
                found.append(pytest.param(name, block[2], bool(block[1]), id=f"{name}:{line}"))
    return found


def is_plugin(source: str) -> bool:
    return "@hookimpl" in source


def is_compiled(source: str) -> bool:
    """Whether a script needs a package that is not there."""
    return bool(ELSEWHERE & set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)))


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


@pytest.mark.parametrize(("page", "source", "fragment"), blocks("yaml"))
def test_yaml_is_valid(catalog, fits_schema, tmp_path, page, source, fragment):
    data = yaml.safe_load(source)
    if fragment:
        return
    assert isinstance(data, dict), "not a file; write <!-- fragment --> on the line before a part of one"
    for name in data.get("plugins", ()):
        (tmp_path / name).write_text((PLUGINS / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "tasks").symlink_to(ROOT / "docs" / "examples" / "tasks")
    for name in re.findall(r"\bfile: ([\w.-]+)", source):
        (tmp_path / name).touch()
    if "base" in data:
        (tmp_path / "study.yaml").write_text(source)
        assert len(Study.load(tmp_path / "study.yaml").trials) > 1
        assert fits_schema["ablation"](data)
    else:
        whole = {"prune": {"use": "pp", "ratio": 0.4}, **data}
        PipelineSpec.of(whole, tmp_path, catalog=None if "plugins" in data else catalog)
        assert "plugins" in data or fits_schema["pipeline"](whole)


@pytest.mark.parametrize(("page", "source", "fragment"), blocks("python", is_plugin))
def test_plugins_pass_the_checks(tmp_path, page, source, fragment):
    file = tmp_path / "example.py"
    file.write_text(source)
    found = Catalog.discover(files=[file], block="")
    assert not [problem for problem in found.problems if str(file) in problem]
    entries = [entry for entry in found.entries if entry.provider == f"file {file}"]
    assert entries
    for entry in entries:
        check_component(entry.component)


def scripts() -> dict[str, list[str]]:
    """The scripts of each page that are run here."""
    found: dict[str, list[str]] = {}
    for parameter in blocks("python", lambda source: not is_plugin(source) and not is_compiled(source)):
        page, source, _ = parameter.values
        if page not in RUN_ELSEWHERE:
            found.setdefault(page, []).append(source)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with the files that scripts of the pages read."""
    (tmp_path / "flap.yaml").write_text(FLAP)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study.sqlite").write_bytes(gzip.decompress(STORE.read_bytes()))
    (tmp_path / "DIR").symlink_to("flap-hetero")  # the page on exports writes it
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", scripts())
def test_scripts_run(place, make_model, page):
    found = scripts()[page]
    found.sort(key=lambda source: "Exporter(" not in source)  # what others load comes first
    names = {"prune": prune, "model": make_model("llama-gqa")}
    for source in found:
        exec(compile(source, page, "exec"), names)


@pytest.mark.parametrize(("page", "source", "fragment"), [*blocks("py"), *blocks("python", is_compiled)])
def test_excerpts_can_be_compiled_and_import_what_there_is(page, source, fragment):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in ELSEWHERE:
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(name.name) for name in node.names if name.name not in ELSEWHERE)


def test_blocks_are_found():
    """The lists above are not empty, and what is only compiled is little."""
    assert len(blocks("yaml")) > 30 and len(blocks("python", is_plugin)) > 20 and len(scripts()) > 4
    assert len(blocks("py")) + len(blocks("python", is_compiled)) < 12
    assert not {language for path in PAGES for language in re.findall(r"^```(py\w+|y\w+)", path.read_text(), re.M)} - {
        "py",
        "python",
        "yaml",
    }
