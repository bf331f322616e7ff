"""Scripts of docs/ in this process, which has imported already what takes them most of their time."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch


def run_script(path: Path, *arguments: str) -> SimpleNamespace:
    """Exit code, stdout and stderr of ``python path arguments``; what the script does not catch is raised."""
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(torch.enable_grad())  # restores what the script sets
        stack.enter_context(patch.object(sys, "argv", [str(path), *arguments]))
        stack.enter_context(patch.object(sys, "path", [str(path.parent), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(end.code)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
