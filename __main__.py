"""Entry point of the ``prunekit`` command: signals are handled before anything that takes time is imported."""

from __future__ import annotations

from .compress.output.stopping import install

install()


def main() -> None:
    """Run the command."""
    from .compress.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
