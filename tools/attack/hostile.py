"""Hostile and damaged files, made from good ones: YAML, JSON, SQLite and bytes."""

from __future__ import annotations

import copy
import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ESCAPE = "\x1b]0;title\x07\x1b[2J\u202e"

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1e308, 10**20, "", "x", "\x00", "../../../etc/passwd", "~nobody", "$\\frac{1}{$", "x" * 5000,
    "<script>alert(1)</script>", "/dev/zero", ESCAPE, "a\nb", "[bold]", [], {}, [3], {"a": {}}, [[]] * 3, ["x"] * 1000,
    [{"layer": 0}] * 20_000, "nan", "\u0000\u200f",
)  # fmt: skip
"""What takes the place of a value."""


def bomb(first: str, item: str, times: int) -> str:
    """YAML whose aliases repeat what is before them, nine times each."""
    lines = [f"a0: &a0 {first}"]
    for index in range(1, times):
        inner = ", ".join(item.format(alias=f"*a{index - 1}", number=number) for number in range(9))
        lines.append(
            f"a{index}: &a{index} " + ("{<<: [" + inner + "]}" if "<<" in first else f"{first[0]}{inner}{first[-1]}")
        )
    return "\n".join(lines) + "\n"


PP = "prune: {use: pp, ratio: 0.4}\n"

YAMLS = (
    bomb("[1]", "{alias}", 10),
    bomb("{k: v}", "k{number}: {alias}", 10),
    bomb("[<<]", "{alias}", 12),
    "prune: &a {<<: *a}",
    "a: &a [*a]",
    "[" * 100_000,
    "{a: " * 50_000,
    "- " * 20_000,
    "a: [" + "1," * 900_000 + "1]",
    "\n".join(" " * i + "a:" for i in range(2000)),
    "? " * 5000,
    "!" * 100_000,
    "%YAML 9.9\n---\na: 1",
    "a: !!python/name:os.system x",
    "!!python/object/apply:os.system ['touch owned']",
    "a: " + "9" * 10_000,
    "a: 0x" + "f" * 10_000,
    "a: 1e999",
    "\ufeff\x00",
    "prune: {use: pp, ratio: no}",
    "prune: {use: pp, ratio: 010}",
    "prune: {use: pp, ratio: 1:30}",
    "prune: {use: [pp], ratio: {}}",
    PP + "model: {name: /dev/zero}",
    PP + "calibration: {file: /dev/zero}",
    PP + 'model: {name: "a\\0b"}',
    PP + 'model: {name: "\\ud800"}',
    PP + "plugins: [/dev/zero]",
    PP + "plugins: [~nobody/x.py]",
    "prune: {use: pp, ratio: 0.4, skip_layers: [" + "9" * 25 + "]}",
    "x" * 1_000_000 + ": 1",
    "prune: {use: " + "x" * 500_000 + "}",
    "base: {prune: {use: pp}}\nvary: {prune.ratio: [" + ", ".join(f"0.{i:06}" for i in range(20_000)) + "]}",
    "base: {prune: {use: pp}}\nvary: {prune.ratio: [0.1, 0.2], seed: " + str(list(range(9000))) + "}",
    "base: self.yaml\nvary: {seed: [1, 2]}",
    "base: /dev/zero\nvary: {seed: [1]}",
    f'title: "{ESCAPE.encode("unicode_escape").decode()}"\nbase: {{prune: {{use: ppp}}}}\nvary: {{seed: [1]}}',
)


def yamls(good: str, count: int, draw: random.Random) -> Iterator[bytes]:
    """``count`` YAML files: those above, then ``good`` with damaged bytes."""
    for text in YAMLS[:count]:
        yield text.encode("utf-8", "surrogatepass")
    for _ in range(count - len(YAMLS)):
        yield damaged(good.encode(), draw)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """``data`` with some bytes overwritten, left out, repeated or cut off."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(found) or 1)
        kind = draw.randrange(5)
        if kind == 0:
            found[at : at + draw.randint(1, 12)] = draw.choice(
                (b"\xff", b'"', b"\x00", b"9", b"[", b"{", b":")
            ) * draw.randint(1, 12)
        elif kind == 1:
            del found[at : at + draw.randint(1, 40)]
        elif kind == 2:
            found[at:at] = found[at : at + draw.randint(1, 200)]
        elif kind == 3:
            found[at:at] = draw.randbytes(draw.randint(1, 20))
        elif draw.random() < 0.2:
            del found[at:]
    return bytes(found)


def altered(data: Any, draw: random.Random) -> Any:
    """JSON data in which one to three values are others, are left out, or have other names."""
    found = copy.deepcopy(data)
    for _ in range(draw.randint(1, 3)):
        at: Any = found
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys:
                break
            key = draw.choice(list(keys))
            if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.7:
                at = at[key]
                continue
            kind = draw.random()
            if kind < 0.15:
                del at[key]
            elif kind < 0.25 and isinstance(at, dict):
                at[draw.choice((ESCAPE, "x" * 3000, "<b>", ""))] = at.pop(key)
            elif kind < 0.35 and isinstance(at[key], str):
                at[key] += ESCAPE
            else:
                at[key] = draw.choice(VALUES)
            break
    return found


def altered_file(path: Path, draw: random.Random) -> None:
    """Alter a JSON file: its values, or its bytes."""
    if draw.random() < 0.25:
        path.write_bytes(damaged(path.read_bytes(), draw))
    else:
        path.write_text(json.dumps(altered(json.loads(path.read_text()), draw)), encoding="utf-8")


QUERIES = (
    "UPDATE trials SET {column} = '{{' WHERE number = 1",
    "UPDATE trials SET {column} = NULL WHERE number = 1",
    "UPDATE trials SET {column} = x'ffff' WHERE number = 1",
    "UPDATE trials SET {column} = zeroblob(100) WHERE number = 1",
    "UPDATE trials SET {column} = 3",
    "UPDATE study SET value = '[3]' WHERE name = 'axes'",
    "UPDATE study SET value = 'x'",
    "DELETE FROM study",
    "DELETE FROM trials",
    "DROP TABLE trials",
    "CREATE TRIGGER t AFTER UPDATE ON trials BEGIN DELETE FROM trials; END",
    "CREATE TABLE more (x)",
    "PRAGMA user_version = 99",
    "DROP TABLE trials; CREATE VIEW trials AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
    "SELECT n AS number, n AS key, '' AS settings, '' AS pipeline, 'done' AS status, '' AS data, '' AS resolved, "
    "'' AS error, 1.0 AS seconds, '' AS finished, '' AS checksum FROM r",
)
COLUMNS = ("key", "settings", "pipeline", "status", "data", "resolved", "error", "seconds")


def altered_store(path: Path, draw: random.Random) -> None:
    """Alter a store: by a statement, by damaged JSON, or by damaged bytes."""
    kind = draw.random()
    if kind < 0.4:
        content = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content) - 20)
            content[at : at + 12] = draw.choice((b"\xff", b'"', b"\x00", b"7")) * 12
        path.write_bytes(content)
        return
    connection = sqlite3.connect(path)
    if kind < 0.7:
        with suppress(sqlite3.IntegrityError):
            connection.executescript(draw.choice(QUERIES).format(column=draw.choice(COLUMNS)))
    else:
        column = draw.choice(("settings", "data", "pipeline"))
        for key, text in connection.execute(f"SELECT key, {column} FROM trials WHERE {column} IS NOT NULL").fetchall():
            changed = json.dumps(altered(json.loads(text), draw))
            connection.execute(f"UPDATE trials SET {column} = ?, checksum = NULL WHERE key = ?", (changed, key))
    connection.commit()
    connection.close()
