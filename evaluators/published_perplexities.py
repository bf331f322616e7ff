"""Published perplexities of well-known dense models, to detect a set-up that measures something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TOLERANCE = 0.03

CONVENTION = "WikiText-2 raw test, rows joined by a blank line, one BOS, windows without overlap, tail dropped"

GPTQ = "GPTQ, arXiv 2210.17323, table of OPT on WikiText2"
TRANSFORMERX = "github.com/cs-giung/transformerx, examples/llama/README.md"
WANDA = "github.com/locuslab/wanda, README.md"
KVQUANT = "github.com/SqueezeAILab/KVQuant, issue 16"
AQLM = "github.com/Vahe1994/AQLM, issue 152"
SMOOTHQUANT = "github.com/mit-han-lab/smoothquant, README.md"

PUBLISHED: dict[str, dict[int, tuple[float, str]]] = {
    "llama-7b": {2048: (5.67, TRANSFORMERX)},
    "llama-13b": {2048: (5.09, TRANSFORMERX)},
    "llama-30b": {2048: (4.10, TRANSFORMERX)},
    "llama-65b": {2048: (3.53, TRANSFORMERX)},
    "llama-2-7b": {2048: (5.47, TRANSFORMERX), 4096: (5.12, WANDA)},
    "llama-2-13b": {2048: (4.88, TRANSFORMERX), 4096: (4.57, WANDA)},
    "llama-2-70b": {2048: (3.32, TRANSFORMERX), 4096: (3.12, WANDA)},
    "llama-3-8b": {2048: (6.15, KVQUANT), 4096: (5.76, AQLM), 8192: (5.54, KVQUANT)},
    "mistral-7b": {2048: (5.25, SMOOTHQUANT)},
    "opt-125m": {2048: (27.65, GPTQ)},
    "opt-350m": {2048: (22.00, GPTQ)},
    "opt-1.3b": {2048: (14.63, GPTQ)},
    "opt-2.7b": {2048: (12.47, GPTQ)},
    "opt-6.7b": {2048: (10.86, GPTQ)},
    "opt-13b": {2048: (10.13, GPTQ)},
}
"""Model -> window -> (perplexity, source), in float16 or bfloat16 and the convention above, up to details (a BOS
before every window) that change the value by far less than the tolerance."""


def known_model(model_id: str) -> str | None:
    """The table's key for a hub id or folder; None for other models, chat and instruct versions too."""
    name = re.split(r"[\\/]", model_id.rstrip("\\/"))[-1].lower()
    name = re.sub(r"^meta-(?=llama)|-hf$", "", name)
    name = {"mistral-7b-v0.1": "mistral-7b"}.get(name, name)
    return name if name in PUBLISHED else None


def check_published(model_id: str, protocol: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
    """A warning if a known dense model's perplexity differs from its published one by more than 3%, else None.

    ``protocol`` and ``values`` are those of any evaluator. None too for values without perplexity, and for a protocol
    without a published value.
    """
    model, window, stride = known_model(model_id), protocol.get("window"), protocol.get("stride")
    comparable = (
        str(protocol.get("text")).endswith("wikitext-2-raw-v1/test")
        and protocol.get("separator") == "\n\n"
        and protocol.get("limit") is None
        and protocol.get("documents") == "all"
        and isinstance(window, int)
        and isinstance(stride, int)
        and window - stride in (0, protocol.get("bos") == "every")
    )
    if model is None or not comparable or window not in PUBLISHED[model] or "perplexity" not in values:
        return None
    published, source = PUBLISHED[model][window]
    value = values["perplexity"]
    if value is not None and abs(value / published - 1) <= TOLERANCE:
        return None
    found = "no finite value" if value is None else f"{value:.2f}, {value / published - 1:+.0%}"
    return (
        f"the dense perplexity of {model_id} at window {window} is published as {published:.2f} "
        f"({source}; {CONVENTION}), but this run measured {found}: check model, tokenizer, text and dtype before "
        "comparing with other papers"
    )
