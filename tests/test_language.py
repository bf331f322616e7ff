"""Plain English: words that are refused in docstrings, comments, messages and pages, with what to write instead."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("registry", "strategies", "evaluators", "compress", "tests", "tools", "docs")
pytestmark = pytest.mark.smoke

INSTEAD = {
    r"g[ai]v(?:e|es|en|ing) (?:it |them |this |that )?back": "compensate, restore, return or free",
    r"told": "configured, passed, reported or distinguished",
    r"spelt": "written",
    r"mend(?:s|ed|ing)?": "fix",
    r"beside": "next to, or compared with",
    r"meanwhile": "at the same time, or while ...",
    r"said": "stated, named, reported or set",
    r"of (?:no )?use": "useful, useless",
    r"by (?:it|them)sel(?:f|ves)": "alone or automatically",
    r"afresh": "again",
    r"reckon(?:s|ed|ing)?": "compute or count",
    r"contenders?": "candidate, or 'is not compared'",
    r"(?:across|along) (?:the|its|their) grain": "with strided access",
    r"hold(?:s)? (?:zero|0|1)": "contains",
    r"at one go": "at once",
    r"by way of": "through",
    r"gone on with|goes on where": "resumed, resumes",
    r"strangers?(?:'s?)?": "third party",
    r"(?<!there )(?:is|are|was|were) no (?!longer\b|more\b|less\b|\w+er than\b)\w+": (
        "is not a ..., has no ..., or there is no ..."
    ),
}
"""A pattern of whole words -> what to write."""

REFUSED = re.compile("|".join(rf"(?P<w{i}>\b(?:{pattern})(?!\w))" for i, pattern in enumerate(INSTEAD)), re.IGNORECASE)

Line = tuple[int, str]


def literals(source: str) -> Iterator[Line]:
    """Line and text of every string literal, the fixed parts of f-strings included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(source: str) -> Iterator[Line]:
    """Line and text of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def documentation(source: str) -> Iterator[Line]:
    """First line and text of every comment and docstring: the other strings of tests are data."""
    yield from comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def page_prose(page: str) -> Iterator[Line]:
    """First line and text of every paragraph of a page outside blocks of code."""
    fence, first, lines = "", 0, []
    for number, line in enumerate([*page.splitlines(), ""], start=1):
        opened = re.match(r"\s*(```|~~~)", line)
        if fence:
            fence = "" if opened and opened[1] == fence else fence
            continue
        if opened or not line.strip():
            fence = opened[1] if opened else ""
            if lines:
                yield first, " ".join(lines)
            lines = []
        elif not line.startswith("    ") or lines:
            first = first if lines else number
            lines.append(line)


def yaml_prose(text: str) -> Iterator[Line]:
    """Line and text of every comment."""
    for number, line in enumerate(text.splitlines(), start=1):
        found = re.search(r"(?:^|\s)#.*", line)
        if found:
            yield number, found[0]


READERS = {
    "code.py": lambda source: set(comments(source)) | set(literals(source)),
    "test.py": documentation,
    ".md": page_prose,
    ".yaml": yaml_prose,
    ".toml": yaml_prose,
}


def refused(text: str, kind: str) -> list[str]:
    """``line: word: write ...`` for every refused word of a file's text; inline code and links' targets are exempt."""
    found = []
    for line, prose in sorted(READERS[kind](text)):
        plain = re.sub(r"``?[^`]*``?|\]\([^)]*\)", "", prose)
        for match in REFUSED.finditer(" ".join(plain.split())):
            instead = list(INSTEAD.values())[int(match.lastgroup[1:])]
            found.append(f"{line}: {match[0]!r}: write {instead}")
    return found


def kind_of(path: Path) -> str | None:
    """The key of the file's reader; None for data: recorded files of tests, texts, pictures."""
    tested = path.is_relative_to(ROOT / "tests")
    if path.suffix == ".py":
        return "test.py" if tested else "code.py"
    return path.suffix if path.suffix in READERS and not tested else None


def files() -> list[Path]:
    """Code, pages, and files of settings."""
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in (*ROOT.glob("*"), *inside) if kind_of(path))


def test_words_that_are_refused():
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in files() for line in refused(path.read_text(), kind_of(path))
    ]
    assert found == [], "\n".join(["", *found])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("code.py", '"""What is given\nback."""\n'),
        ("test.py", "x = 1  # told once\n"),
        ("test.py", 'x = 1\n"""What is said."""\n'),
        ("code.py", 'raise ValueError(f"{x} is no " f"folder; mend it")\n'),
        (".md", "# A page\n\nIt stands\nbeside the other.\n"),
        (".md", "| a | gives back |\n"),
        (".yaml", "a: 1  # spelt out\n"),
    ],
)
def test_each_kind_of_text_is_read(kind, text):
    assert refused(text, kind)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("code.py", "said = told(beside)\n"),
        ("test.py", 'text = "She told him."\n'),
        ("code.py", '"""There is no folder, and it is no longer ``told``."""\n'),
        (".md", "```python\ntold = 1\n```\n\n    told\n\nIt `mends` a [page](beside.md).\n"),
        (".yaml", "told: beside\n"),
    ],
)
def test_names_code_and_plain_english_pass(kind, text):
    assert refused(text, kind) == []
