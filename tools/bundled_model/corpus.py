"""Build the bundled texts, and the training text, from Python's own documentation.

Two kinds of text are taken from the running interpreter's standard library, nothing is imported but
`pydoc_data.topics`, which is plain data: `reference` is the language reference as `pydoc` shows it, and
`docstrings` are the docstrings of the standard library's modules, read with `ast`.  Whole topics and whole
top-level modules go to one split each; after that every paragraph stands in one split only, and once only.

`python -m tools.bundled_model.corpus` writes the four bundled texts again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from prunekit.compress.bundled import TEXTS

SPLITS = ("calibration", "evaluation", "training")
EXCLUDED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "pydoc_data",
    "__phello__",
    "__pycache__",
}
BUNDLED_BYTES = 100_000  # upper bound of one bundled text
LARGEST_TOPIC = 22_000  # longer documents stay in the training split, so that no single one fills a bundled text
LARGEST_MODULE = 25_000
SHORTEST_DOCSTRING = 60


def tidy(text: str) -> str:
    """Drop trailing blanks and collapse runs of empty lines; nothing is unwrapped."""
    lines = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def paragraph_key(paragraph: str) -> str:
    """What two paragraphs must share to count as the same: their words, however wrapped."""
    return " ".join(paragraph.split())


def is_prose(docstring: str) -> bool:
    """Whether a docstring is long enough, mostly letters, and more than an interactive example."""
    lines = [line.strip() for line in docstring.splitlines() if line.strip()]
    session = sum(line.startswith((">>>", "...")) for line in lines)
    letters = sum(character.isalpha() or character == " " for character in docstring)
    return len(docstring) >= SHORTEST_DOCSTRING and 3 * session < len(lines) and letters > 0.6 * len(docstring)


def reference_documents() -> dict[str, str]:
    """The language reference, one document per `pydoc` topic."""
    from pydoc_data.topics import topics

    return {name: tidy(text) for name, text in topics.items()}


def source_files(root: Path) -> Iterator[Path]:
    """The standard library's Python files below `root`, relative to it, in sorted order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not any(part in EXCLUDED or part.startswith(("_test", "config-")) for part in relative.parts):
            yield relative


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, in the order of the source."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = tidy(ast.get_docstring(node) or "")
        if is_prose(text):
            yield text


def docstring_documents() -> dict[str, str]:
    """The standard library's docstrings, one document per top-level module or package."""
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, list[str]] = {}
    for relative in source_files(root):
        texts = modules.setdefault(relative.parts[0].removesuffix(".py"), [])
        texts.extend(docstrings((root / relative).read_bytes()))
    return {name: "\n\n".join(texts) for name, texts in modules.items() if texts}


class Splitter:
    """Hands out documents to the splits and remembers every paragraph that was handed out."""

    def __init__(self) -> None:
        """Start with no paragraph seen."""
        self.seen: set[str] = set()

    def new_part(self, document: str) -> tuple[str, set[str]]:
        """The paragraphs of a document that no split holds yet, and their keys."""
        keys: set[str] = set()
        kept = []
        for paragraph in document.split("\n\n"):
            key = paragraph_key(paragraph)
            if key and key not in self.seen and key not in keys:
                keys.add(key)
                kept.append(paragraph.strip("\n"))
        return "\n\n".join(kept), keys

    def fill(self, documents: dict[str, str], limit: int, largest: int) -> dict[str, str]:
        """Move documents out of `documents`, in the order of their names' digests, until `limit` bytes are full."""
        chosen: dict[str, str] = {}
        size = 0
        for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
            text, keys = self.new_part(documents[name])
            length = len(text.encode()) + 2
            if not text or len(documents[name].encode()) > largest or size + length > limit:
                continue
            chosen[name] = text
            size += length
            self.seen |= keys
        for name in chosen:
            del documents[name]
        return chosen


def python_documentation() -> dict[str, dict[str, str]]:
    """Documents of both kinds and all splits, keyed `reference-training` and so on, no paragraph twice."""
    sources = {
        "reference": (reference_documents(), LARGEST_TOPIC),
        "docstrings": (docstring_documents(), LARGEST_MODULE),
    }
    splitter = Splitter()
    result: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        for kind, (documents, largest) in sources.items():
            limit, bound = (BUNDLED_BYTES, largest) if split != "training" else (1 << 40, 1 << 40)
            result[f"{kind}-{split}"] = splitter.fill(documents, limit, bound)
    return result


def bundled_text(documents: dict[str, str]) -> str:
    """The content of a bundled text file: its documents, a blank line between them."""
    return "\n\n".join(documents.values()) + "\n"


def books(folder: Path) -> dict[str, str]:
    """The public-domain books `book-*.txt` of a folder, by title, in the order of their names."""
    return {
        path.stem.removeprefix("book-"): tidy(path.read_text(encoding="utf-8-sig"))
        for path in sorted(folder.glob("book-*.txt"))
    }


def main() -> None:
    """Write the bundled texts and print the size of every split."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("Python", platform.python_version())
    for key, documents in python_documentation().items():
        text = bundled_text(documents)
        print(f"{key}: {len(documents)} documents, {len(text.encode())} bytes")
        if key in TEXTS:
            TEXTS[key].parent.mkdir(parents=True, exist_ok=True)
            partial = TEXTS[key].with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, TEXTS[key])


if __name__ == "__main__":
    main()
