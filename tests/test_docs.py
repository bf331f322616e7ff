"""The pages as a whole: links, the index, the front page, the picture of the rooms, the hooks for commits."""

import csv
import importlib
import itertools
import operator
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prunekit.compress import Pruned
from prunekit.compress.files import moved

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (DOCS / "python.md").read_text(encoding="utf-8")
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "compress/bundled/README.md")]
PAGES = sorted([*DOCS.rglob("*.md"), *OUTSIDE])
MOST_WORDS = 800
"""Of the front page."""
ROOMS: dict[str, tuple[str, ...]] = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["ROOMS"]


NAMES = {"Wanda-sp": "wanda_sp", "FLAP": "flap", "PP": "pp"}


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    """Targets of a page's links and pictures that lead to this checkout."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8")))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading\n[a](#one-heading) [b](#another) [c](page.md) [d](other.md) [e](https://x.example)\n"
    )
    assert broken(page) == ["#another", "other.md"]


def misread(page: str) -> list[str]:
    """Lines that GitHub and the site show differently: a list under a paragraph, and an indent of 1 to 3 spaces."""
    lines = ["", *re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.MULTILINE | re.DOTALL).splitlines()]
    pairs = list(itertools.pairwise(lines))
    item = re.compile(r" *(?:[-*]|\d+\.) ")
    begins = [line for above, line in pairs if item.match(line) and above.strip() and not re.match(r"[-*\d ]", above)]
    indented = [line for above, line in pairs if re.match(r" {1,3}\S", line) and (not above or item.match(line))]
    return begins + indented


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_read_the_same_on_the_site(path):
    assert misread(path.read_text(encoding="utf-8")) == [], "an empty line before a list; an indent of 4 spaces"


def test_what_the_site_would_misread_is_found():
    page = "A list:\n- a\n  - b\n\n  more\n\n- c\n  goes on\n    - d\n\n```\nx:\n- y\n```\n"
    assert misread(page) == ["- a", "  - b", "  more"]


def test_every_page_is_reached_from_the_index():
    seen, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen:
            seen.add(page)
            targets = [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
            waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in seen] == []


def test_the_front_page_is_short():
    assert len(README.split()) <= MOST_WORDS


@pytest.fixture
def run_page(tmp_path):
    """Runs a page's blocks of Python as one script, in a process of its own, and returns what it printed."""

    def run(page: str) -> str:
        script = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_example_of_the_front_page_runs(run_page):
    assert "(7, 'mlp'): 307" in run_page(README)


@pytest.mark.slow
def test_the_page_on_python_runs(run_page, tmp_path):
    lines = run_page(PYTHON).splitlines()
    assert lines[0].startswith("<Pruned LlamaForCausalLM by pp: requested 40%; removed ")
    assert any(line.startswith("307 ") for line in lines) and (tmp_path / "smaller" / "config.json").is_file()
    assert (tmp_path / "flap-results" / "results.json").is_file()


def test_every_member_of_the_handle_is_described():
    rows = re.findall(r"^\| (`.+) \|", PYTHON, re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"`(\w+)[`(]", row.split(" | ")[0])}
    assert {name for name in vars(Pruned) if not name.startswith("_")} <= described | {"model", "strategy", "catalog"}


def test_the_figures_of_the_front_page_are_recorded():
    with (DOCS / "results" / "real-model" / "demo.csv").open(encoding="utf-8") as stream:
        records = {record["strategy"]: record for record in csv.DictReader(stream) if record["ratio"] in ("0", "0.4")}
    rows = re.findall(r"^\| ([*`\w-]+) \| (?:once|per batch|) ?\| (.+?) \|$", README, re.MULTILINE)
    names = {title: title.strip("*`") for title, _ in rows}
    assert {NAMES.get(name, name) for name in names.values()} == set(records)
    for title, cells in rows:
        found = records[NAMES.get(names[title], names[title])]
        shown = [f"{float(found[text]):.1f}" for text in ("other", "same")] + [f"{float(found['flops']):.0%}"]
        assert [cell.strip("* ") for cell in cells.split("|")] == shown, title


def test_the_picture_shows_every_room_in_order():
    drawn = re.findall(r'font-weight="bold"[^>]*>(\w+)<', (DOCS / "rooms.svg").read_text(encoding="utf-8"))
    assert drawn == [*ROOMS["compress"], *ROOMS["registry"]]


def test_the_twelve_steps_are_in_the_engine():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| \*\*\w+\.\*\* .* \| ?(.*) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 13))
    for _, places in rows:
        for place in filter(None, places.split("; ")):
            file, *names = re.findall(r"`([\w.]+)`", place)
            module = importlib.import_module(f"prunekit.compress.engine.{file.removesuffix('.py')}")
            assert names and [operator.attrgetter(name)(module) for name in names]


@pytest.mark.parametrize("floor", ROOMS)
def test_contributors_read_the_order_of_the_rooms(floor):
    words = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert f"`{floor}/`: {', '.join(ROOMS[floor])}" in words


def test_the_changelog_names_every_option_that_moved():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    old = [name for _, name in (*moved.OPTIONS, *moved.NAMES)]
    assert [name for name in (*old, *moved.NAMES.values()) if name not in changes] == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md", "docs/limits.md", "docs/strategies.md"])
def test_files_that_pages_name_exist(name):
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", (ROOT / name).read_text(encoding="utf-8"))
    assert named and [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_commit_hooks_use_the_version_of_the_constraints():
    pinned = re.search(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[pinned]] * 2
