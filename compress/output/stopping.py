"""Ctrl-C and SIGTERM: the first one ends the command after tidying up, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

BURST = 0.5
"""Seconds within which several signals count as one: some senders repeat theirs at once."""

_started = False
_asked: tuple[int, float] | None = None


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def install() -> None:
    """Handle Ctrl-C and SIGTERM; until :func:`begin` they end the process at once, since nothing is written yet."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def begin() -> None:
    """From here on a signal raises :class:`Stopped`, so that what was begun is tidied up."""
    global _started
    _started = True


def check() -> None:
    """Raise :class:`Stopped` if a signal asked for the end; Python drops exceptions that are raised at some moments."""
    if _asked is not None:
        raise Stopped(_asked[0])


def _on_signal(number: int, frame: Any) -> None:
    global _asked
    now = time.monotonic()
    if not _started:
        os.write(2, b"interrupted; nothing was written\n")
        os._exit(128 + number)
    if _asked is not None:
        if now - _asked[1] > BURST:
            os._exit(128 + number)
        return
    _asked = number, now
    raise Stopped(number)
