"""Runs the command in a child process that shares this one's imports, and says what is wrong with how it ended."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunekit.compress.cli.main import main

LONGEST = 5.0
"""Processor seconds that a refusal may take; commands that work get theirs in addition."""

MOST = 20_000
"""Characters of a command's output."""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    """Exit code; negative: killed by that signal."""
    output: str
    seconds: float
    """Of the processor."""

    def wrong(self, allowed: float = LONGEST) -> str | None:
        """What is wrong with it, in a few words."""
        last = self.output.strip().splitlines()[-1:] or [""]
        if "Traceback" in self.output or "PRUNEKIT_TRACEBACK" in self.output:
            return f"internal error: {last[0][:200]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}: {last[0][:200]}"
        if self.seconds > allowed:
            return f"{self.seconds:.1f} s of the processor"
        if len(self.output) > MOST:
            return f"{len(self.output):,} characters of output"
        if any(character in self.output for character in "\x1b\x07\u202e"):
            return "a control sequence in the output"
        return None


def warm_up() -> None:
    """Import what commands import, once for all children."""
    import matplotlib.pyplot
    import pandas
    import scipy.stats
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    from prunekit.compress.export import difference, exporting, verify
    from prunekit.compress.reporting import command, compare, pivot_tables

    _ = (
        matplotlib.pyplot,
        pandas,
        scipy.stats,
        transformers,
        difference,
        exporting,
        verify,
        command,
        compare,
        pivot_tables,
    )


def run(
    arguments: Sequence[object],
    folder: Path,
    before: Callable[[], None] | None = None,
    kill_after: float | None = None,
    longest: float = 120.0,
) -> Ended:
    """Run ``prunekit`` with these arguments in a folder; ``before`` runs first in the child, which may be killed."""
    reading, writing = os.pipe()
    said = bytearray()
    with open(reading, "rb") as pipe:
        child = os.fork()
        if child == 0:
            _become(arguments, folder, writing, before)
        os.close(writing)
        os.set_blocking(reading, False)
        until = time.monotonic() + (longest if kill_after is None else kill_after)
        while True:
            pid, status, used = os.wait4(child, os.WNOHANG)
            said += pipe.read() or b""
            if pid:
                break
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                _, status, used = os.wait4(child, 0)
                break
            time.sleep(0.005)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"), used.ru_utime + used.ru_stime)


def _become(arguments: Sequence[object], folder: Path, said: int, before: Callable[[], None] | None) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 (the child ends with them)
        os.chdir(folder)
        sys.argv = ["prunekit", *map(str, arguments)]
        random.seed()
        if before is not None:
            before()
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
