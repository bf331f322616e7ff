"""Tables of a study: whole words and numbers, as wide as need be in a pipe, as many columns as fit on a terminal."""

from io import StringIO

import pytest
from prunekit.compress.output import printing
from prunekit.compress.output.failures import explained

HEAD = ("strategy", "ratio", "perplexity", "FLOPs", "prefill time", "word perplexity", "extra memory", "CKA")
ROWS = [("full batch probing", "40%", "386.7 ± 483.2", "61.3%", "0.71 ± 0.02", "12,345 ± 678", "125%", "0.9")] * 2


@pytest.fixture
def shown(monkeypatch):
    """The table's lines on a terminal that is so wide, or in a pipe."""

    def on(width=None):
        file = StringIO()
        options = {"width": width or printing.PIPED_WIDTH, "force_terminal": width is not None, "color_system": None}
        monkeypatch.setattr(printing, "out", printing.Console(file=file, **options))
        printing.show_wide_table(HEAD, ROWS, 2, "prunekit report x.sqlite")
        return [line.rstrip() for line in file.getvalue().splitlines()]

    return on


def test_a_pipe_has_no_width(shown):
    lines = shown()
    assert len(lines) == 5
    assert len(lines[0]) > printing.PIPED_WIDTH
    assert all(name in lines[0] for name in HEAD)
    assert all(cell in lines[2] for cell in ROWS[0])


@pytest.mark.parametrize(("width", "columns", "more"), [(80, 6, "2 more columns"), (200, 8, None), (30, 3, "5 more")])
def test_a_terminal_shows_the_columns_that_fit(shown, width, columns, more):
    lines = shown(width)
    rows = [line for line in lines if line.startswith("full batch probing")]
    assert len(rows) == 2
    assert all(cell in rows[0] for cell in ROWS[0][:columns])
    assert not any(cell in rows[0] for cell in ROWS[0][columns:])
    assert all(len(line) <= width for line in lines if "more column" not in line) or width == 30
    said = [line for line in lines if "more column" in line]
    assert said == ([] if more is None else said[:1])
    if more:
        assert said[0].startswith(more)
        assert said[0].endswith(": prunekit report x.sqlite")


def test_one_column_that_does_not_fit_is_one_column(shown):
    width = len(shown()[1])
    said = [line for line in shown(width - 15) if "more column" in line]
    assert said in ([], ["1 more column: prunekit report x.sqlite"])


@pytest.mark.parametrize(
    "text", ["\x1b]0;title\x07", "\x1b[2J", "a\rb", "\x9b31m", "\u202egnp.exe", "\u2066x", "\ud800"]
)
def test_no_control_sequence_reaches_the_terminal(monkeypatch, text):
    file = StringIO()
    for stream in ("out", "err"):
        monkeypatch.setattr(printing, stream, printing.SafeConsole(file=file, width=200, color_system=None))
    printing.error(text)
    printing.warning(text)
    printing.say(text)
    printing.show_table(("head " + text,), [(text,), ("[b]" + text,)], title="title " + text)
    printing.show_wide_table((text, "b"), [(text, "c")], 1, "elsewhere")
    printing.Bars().say(text)
    shown = file.getvalue()
    assert text not in shown
    hidden = [character for character in text if not character.isprintable()]
    assert not any(character in shown for character in hidden)
    assert hidden == ["\r"] or hidden[0].encode("unicode_escape").decode() in shown  # rich itself drops a \r


def test_messages_are_at_most_a_screenful(monkeypatch):
    file = StringIO()
    monkeypatch.setattr(printing, "err", printing.SafeConsole(file=file, width=200))
    printing.error("p.yaml: found " + "x" * 3_000_000 + "; the remedy")
    printing.error("\n".join(f"line {number}" for number in range(10_000)))
    printing.show_table(("a",), [("y" * 1_000_000,)])
    assert len(file.getvalue()) < 10_000
    assert "p.yaml: found xxx" in file.getvalue() and "xxx; the remedy" in file.getvalue()
    assert "line 0\n" in file.getvalue() and "line 9999\n" in file.getvalue() and "9,940 more" in file.getvalue()


def test_errors_of_the_system_are_explained():
    assert "memory ran out" in explained(MemoryError())
    assert "memory ran out" in explained(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 12 bytes"))
    assert explained(OSError(28, "No space left on device", "/elsewhere/x")).startswith("/elsewhere/x: No space left")
    assert explained(RuntimeError("Symlink loop from '/a/loop'")).endswith(
        "the link leads to itself; name a file or folder"
    )
    assert explained(RuntimeError("shapes differ")) is None
    assert explained(KeyError("x")) is None
