"""One sentence for errors of the system, such as memory that runs out, and for errors that nobody foresaw."""

from __future__ import annotations

import traceback
from pathlib import Path

from ...registry import Component
from ...registry.catalog import is_foreign, named
from ...registry.errors import is_out_of_memory


def explained(failure: BaseException) -> str | None:
    """A sentence with the remedy for memory that ran out, and for files and links; ``None`` for other errors."""
    message = str(failure).strip()
    if is_out_of_memory(failure):
        first = message.splitlines()[0] if message else type(failure).__name__
        return (
            f"memory ran out ({first}); lower the batch sizes of calibration and evaluators, close other programs, or "
            "use a machine with more memory"
        )
    if isinstance(failure, RuntimeError) and message.startswith("Symlink loop"):  # Python's pathlib before 3.13
        return f"{message}: the link leads to itself; name a file or folder"
    if isinstance(failure, OSError) and failure.errno is not None:
        where = f"{failure.filename}: " if failure.filename else ""
        return f"{where}{failure.strerror}; see to that, and run the same command again"
    return None


def blamed(failure: BaseException) -> str | None:
    """The message that names the plugin which an error came out of; ``None`` where it is from prunekit itself."""
    for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Component):
            return f"{named(owner)} raised {described(failure)}; fix the plugin" if is_foreign(owner) else None
    return None


def described(failure: BaseException) -> str:
    """Kind, message and last place of an error that was not foreseen."""
    frames = traceback.extract_tb(failure.__traceback__)
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    message = str(failure).strip()
    return f"{type(failure).__name__}: {message or 'no message'}{place}"
