"""The model card of an exported folder: how to load the model, what was cut, what was measured and how."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..models.exported.manifest import Manifest
from ..models.gguf_file import ENDING
from ..models.language import AUTO_CLASSES, auto_name
from ..models.named import MODELS
from ..output.formatting import kept_units, names_of, number, sentence, share, table, value_text
from ..output.records import LayerCut, is_expert
from ..runs.records import damage
from .constraint import sentence as rounding_sentence
from .profiles import TOOLS, profile_named

TEMPLATE = Path(__file__).with_name("card.md")

UNITS = {"kv_group": "key/value groups", "query_head": "query heads"}


def card(manifest: Manifest, name: str) -> str:
    """README.md of a folder: the hub's metadata block, then text."""
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment

    base = manifest.base
    auto = auto_name(base.architecture)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(metric.protocol.get("text", metric.label)),
            dataset_name=str(metric.protocol.get("text", metric.label)),
            metric_type=metric.label,
            metric_name=key,
            metric_value=value,
        )
        for metric in manifest.metrics
        for key, value in metric.exported.items()
        if isinstance(value, (int, float)) and key != "loss"
    ]
    data = ModelCardData(
        license=manifest.license,
        library_name="prunekit" if manifest.profile == "dynamic" else "transformers",
        pipeline_tag=AUTO_CLASSES[auto],
        base_model=hub_id(base.name),
        tags=["prunekit", "pruned", "structured-pruning", manifest.strategy],
        model_name=name,
        eval_results=results or None,
    )
    states = dict(zip(TOOLS, profile_named(manifest.profile).runs, strict=True))
    if manifest.profile == "hf-hetero" and any(lacks_block(layer) for layer in manifest.layers):
        states["vLLM"] = "no"
    rows = metric_rows(manifest)
    rounding = manifest.rounding
    template = Environment(finalize=_one_line, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        card_data=_Block(data.to_yaml()),
        manifest=manifest,
        name=name,
        quoted=shlex.quote(name),
        profile=manifest.profile,
        auto=auto,
        reads_images=auto != "AutoModelForCausalLM",
        base="prunekit's bundled model" if base.name == "bundled" else Path(base.name).name,
        revision=base.commit or base.revision,
        runs=", ".join(f"{tool} ({state})" for tool, state in states.items() if state != "no"),
        results=_Block("\n".join(table(metric_heads(manifest), [[*map(_one_line, row)] for row in rows]))),
        damages=damages(manifest),
        units=_units(manifest),
        layers=_Block("\n".join(_layers(manifest))),
        rounding=rounding and rounding_sentence(rounding, manifest.ratio.asked),
        share=share,
        sentence=sentence,
    )


class _Block(str):
    """Text of several lines that belongs in the card as it is."""


def _one_line(value: Any) -> Any:
    """A value from a manifest, which may be anyone's, as printable text of one line and without HTML."""
    if isinstance(value, _Block) or not isinstance(value, str):
        return value
    plain = "".join(character if character.isprintable() else " " for character in value)
    return " ".join(plain.split()).replace("<", "&lt;") if plain != value or "<" in value else value


def hub_id(name: str) -> str | None:
    """The hub id of a model that was loaded as ``name``: an id, or a folder of the hub's cache; otherwise None.

    A GGUF on the hub is one of ``OWNER/NAME/FILE``.
    """
    if name in MODELS:
        return MODELS[name].hub
    path = Path(name)
    if path.suffix == ENDING:
        return hub_id(str(path.parent))
    if path.is_absolute():
        cached = path.parent.parent.name if path.parent.name == "snapshots" else ""
        return cached.removeprefix("models--").replace("--", "/") if cached.startswith("models--") else None
    return name if name != "bundled" and name.count("/") <= 1 and not path.exists() else None


def metric_heads(manifest: Manifest) -> list[str]:
    """Titles of the columns of :func:`metric_rows`."""
    between = ["per batch"] * bool(manifest.freeze) + ["before recovery"] * bool(manifest.recovery)
    return ["measurement", "dense", *between, "this model"]


def metric_rows(manifest: Manifest) -> list[list[str]]:
    """One row for each value: its name, the dense model's value and this model's.

    Between these stand the value before the decisions were frozen and the value before recovery, if there were any.
    """
    rows = []
    for metric in manifest.metrics:
        between = [metric.per_batch] if manifest.freeze else []
        between += [metric.before_recovery] if manifest.recovery else []
        columns = [metric.dense, *between, metric.exported]
        for key in names_of(metric.exported):
            label = key if key == metric.label else f"{metric.label}: {key}"
            rows.append([label.replace("_", " "), *(value_text(values, key) for values in columns)])
    counts = manifest.parameters
    between_counts = [counts.dense] * bool(manifest.freeze) + [counts.exported] * bool(manifest.recovery)
    rows.append(["parameters", *map(number, (counts.dense, *between_counts, counts.exported))])
    if manifest.profile == "dynamic":
        rows.append(["parameters a batch uses", number(counts.dense), number(counts.active)])
    return rows


def damages(manifest: Manifest) -> list[str]:
    """A sentence for every perplexity that rose far."""
    recovered = manifest.recovery is not None
    return [line for found in manifest.metrics for line in damage(found.label, found.dense, found.exported, recovered)]


def lacks_block(layer: LayerCut) -> bool:
    """Whether a layer has lost its attention or its MLP alone."""
    left = {site.kept > 0 for site in layer.sites.values()}
    return left == {True, False}


def _units(manifest: Manifest) -> str:
    """What the units are that were cut."""
    kinds = {kind for layer in manifest.layers for kind in layer.sites}
    if "experts" in kinds:
        return "routed experts"
    return "attention, MLP and expert units" if any(map(is_expert, kinds)) else "attention and MLP units"


def _layers(manifest: Manifest) -> list[str]:
    """The table of kept units."""
    heads = f"attention ({UNITS.get(manifest.attention_unit, 'units')})"
    return kept_units(manifest.layers, heads, "MLP channels")
