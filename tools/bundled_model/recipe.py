"""What a training run writes down about itself, so that it can be judged and repeated."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from prunekit.compress.bundled import TEXTS

from tools.bundled_model.corpus import books, bundled_text, python_documentation


def training_documents(folder: Path) -> tuple[dict[str, dict[str, str]], dict]:
    """The training documents of both sources, by name, and what the recipe says about them."""
    titles, documentation = books(folder), python_documentation()
    for key, path in TEXTS.items():
        if bundled_text(documentation[key]) != path.read_text(encoding="utf-8"):
            raise SystemExit(
                f"{path.name} is not what the documentation of this Python {platform.python_version()} "
                "gives, so the training text might overlap it; run tools.bundled_model.corpus first"
            )
    training = {key: documents for key, documents in documentation.items() if key.endswith("training")}
    note = {
        "books": [
            {"name": name, "bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in titles.items()
        ],
        "python_documentation": {
            key: {"documents": list(documents), "bytes": sum(len(text.encode()) for text in documents.values())}
            for key, documents in training.items()
        },
    }
    return {"books": titles, "docs": training["reference-training"] | training["docstrings-training"]}, note


def write(path: Path, content: str) -> None:
    """Write a text file under a temporary name and rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


@dataclass
class Recipe:
    """The growing record of one run."""

    args: argparse.Namespace
    device: str
    corpus: dict
    parameters: int
    begin: float
    started: float = 0.0  # of the first step
    paused: float = 0.0  # seconds since then that went into measuring and saving
    steps_done: int = 0
    schedule: dict = field(default_factory=dict)
    train_loss: list = field(default_factory=list)
    evaluation_loss: list = field(default_factory=list)

    def save(self, path: Path, **more) -> None:
        """Write the record up to now, with `more` at its end."""
        seconds = time.time() - self.started - self.paused
        settings = {key: value for key, value in vars(self.args).items() if key not in ("corpus", "out")}
        content = {
            "settings": settings | {"betas": [0.9, 0.95], "gradient_clip": 1.0, "autocast": "bfloat16"},
            "schedule": self.schedule | {"finished_steps": self.steps_done},
            "parameters": self.parameters,
            "corpus": self.corpus,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "machine": {
                "device": torch.cuda.get_device_name() if self.device == "cuda" else platform.machine() + " CPU",
                "threads": torch.get_num_threads(),
            },
            "seconds": {"all": round(time.time() - self.begin), "steps": round(seconds)},
            "tokens_per_second": round(self.steps_done * self.args.batch * self.args.context / max(1e-9, seconds)),
            "train_loss": self.train_loss,
            "evaluation_loss": self.evaluation_loss,
        }
        write(path, json.dumps(content | more, indent=1) + "\n")
