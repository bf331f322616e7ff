"""The model card of an exported folder: what it is, how to load it, what was cut, what was measured and how."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..output.formatting import number, sentence, share, table
from .constraint import sentence as rounding_sentence
from .profiles import TOOLS, profile_named

UNITS = {"kv_group": "key/value groups", "query_head": "query heads"}


def card(manifest: dict[str, Any], name: str) -> str:
    """README.md of a folder: the hub's metadata block, then text."""
    lines = [
        "---",
        _metadata(manifest, name),
        "---",
        "",
        f"# {name}",
        "",
        _what(manifest),
        "",
        "## How to load it",
        "",
        *_loading(manifest, name),
        "",
        "## Results",
        "",
        *_results(manifest),
        "",
        "## What was cut",
        "",
        *_cut(manifest),
        "",
        "## Where it comes from",
        "",
        *_origin(manifest),
        "",
    ]
    return "\n".join(lines)


def _metadata(manifest: dict[str, Any], name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base = manifest["base"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(metric["protocol"].get("text", metric["label"])),
            dataset_name=str(metric["protocol"].get("text", metric["label"])),
            metric_type=metric["label"],
            metric_name=key,
            metric_value=value,
        )
        for metric in manifest["metrics"]
        for key, value in metric["exported"].items()
        if isinstance(value, (int, float)) and key != "loss"
    ]
    hub = base["name"] if not Path(str(base["name"])).is_absolute() and base["name"] != "bundled" else None
    return (
        ModelCardData(
            license=manifest["license"],
            library_name="prunekit" if manifest["profile"] == "dynamic" else "transformers",
            pipeline_tag="text-generation",
            base_model=hub,
            tags=["prunekit", "pruned", "structured-pruning", manifest["strategy"]],
            model_name=name,
            eval_results=results or None,
        )
        .to_yaml()
        .strip()
    )


def _what(manifest: dict[str, Any]) -> str:
    ratio, base = manifest["ratio"], manifest["base"]
    cut = f"{share(ratio['units_cut'])} of its attention and MLP units and {share(ratio['prunable_parameters_cut'])}"
    text = (
        f"{base_label(base)} ({base['architecture']}), pruned by the strategy `{manifest['strategy']}` of prunekit: "
        f"{cut} of the parameters in them are cut"
    )
    if manifest["profile"] == "dynamic":
        return f"{text}, anew for every batch. This folder refers to the dense weights and does not hold them."
    zero = " set to zero; the model is no smaller and no faster" if manifest["profile"] == "padded" else ""
    return f"{text}{zero}. {_trained(manifest.get('recovery'))}"


def _trained(recovery: dict[str, Any] | None) -> str:
    """What was done to the weights after the cut."""
    if not recovery:
        return "Nothing was trained afterwards."
    return (
        f"Afterwards it was recovered by LoRA of rank {recovery['rank']}, {recovery['steps']} steps on "
        f"{recovery['text']}, which is added to the weights."
    )


def base_label(base: dict[str, Any]) -> str:
    """How people call the model that was pruned."""
    return "prunekit's bundled model" if base["name"] == "bundled" else Path(str(base["name"])).name


def _loading(manifest: dict[str, Any], name: str) -> list[str]:
    profile = manifest["profile"]
    where = profile_named(profile)
    runs = ", ".join(f"{tool} ({state})" for tool, state in zip(TOOLS, where.runs, strict=True) if state != "no")
    note = f"Runs in: {runs}; `verified` is tested with every release of prunekit, `read` was only read."
    if profile == "dynamic":
        files = manifest["plugin_files"]
        plugins = f", plugins={files!r}" if files else ""
        code = ["from prunekit.compress import load", f'model = load("{name}"{plugins}).model']
    elif profile == "gguf":
        code = ["from llama_cpp import Llama", f'model = Llama("{name}/model.gguf")']
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{_trust(profile)})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{_trust(profile)})',
        ]
    lines = ["```python", *code, "```", "", note]
    if profile == "hf-hetero":
        lines += [
            "",
            "`modeling_prunekit.py` in this folder is the code that is trusted; with prunekit installed, "
            "`prunekit.compress.load` runs its own copy instead. "
            f"It needs transformers {manifest['requires']['transformers']} or newer.",
        ]
    return [*lines, "", f"`prunekit verify {shlex.quote(name)}` checks the files and measures again."]


def _trust(profile: str) -> str:
    return ", trust_remote_code=True" if profile == "hf-hetero" else ""


def _results(manifest: dict[str, Any]) -> list[str]:
    rows = metric_rows(manifest)
    lines = table(metric_heads(manifest), rows) if rows else ["Nothing was measured."]
    for metric in manifest["metrics"]:
        lines += ["", f"- **{metric['label']}**: {sentence(metric['protocol'])}"]
    if manifest["profile"] == "gguf":
        how = "Measured in transformers, before the weights went into the file"
        lines += ["", f"{how}; `prunekit verify` measures the file."]
    return lines


def metric_heads(manifest: dict[str, Any]) -> list[str]:
    """What the columns of :func:`metric_rows` are called."""
    between = ["per batch"] * bool(manifest["freeze"]) + ["before recovery"] * bool(manifest.get("recovery"))
    return ["measurement", "dense", *between, "this model"]


def metric_rows(manifest: dict[str, Any]) -> list[list[str]]:
    """One row for each value: its name, dense, as the strategy decided per batch where that was frozen, exported.

    Of a recovered model, before the last, as it was before recovery.
    """
    recovered = bool(manifest.get("recovery"))
    rows = []
    for metric in manifest["metrics"]:
        for key, value in metric["exported"].items():
            label = key if key == metric["label"] else f"{metric['label']}: {key}"
            row = [label.replace("_", " "), number(metric["dense"].get(key))]
            if manifest["freeze"]:
                row.append(number((metric["per_batch"] or {}).get(key)))
            if recovered:
                row.append(number(metric["before_recovery"].get(key)))
            rows.append([*row, number(value)])
    parameters = manifest["parameters"]
    between = [number(parameters["dense"])] if manifest["freeze"] else []
    between += [number(parameters["exported"])] if recovered else []
    rows.append(["parameters", number(parameters["dense"]), *between, number(parameters["exported"])])
    if manifest["profile"] == "dynamic":
        rows.append(["parameters a batch uses", number(parameters["dense"]), number(parameters["active"])])
    return rows


def _cut(manifest: dict[str, Any]) -> list[str]:
    lines = []
    if manifest["rounding"]:
        told = rounding_sentence(manifest["rounding"], manifest["ratio"]["asked"])
        lines += [f"Counts were fitted to the format: {told}.", ""]
    if manifest["freeze"]:
        how = manifest["freeze"]
        lines += [f"Decisions per batch were frozen (`{how['how']}`): {how['meaning']}.", ""]
    if manifest["compensation"]:
        about = manifest["compensation"]["compensator"]
        lines += [f"What was dropped is given back by compensation `{about['name']}`.", ""]
    layers = manifest["layers"]
    kinds = [kind for kind in layers[0] if kind != "layer"] if layers else []
    heads = {"attention": f"attention ({UNITS.get(manifest['attention_unit'], 'units')})", "mlp": "MLP channels"}
    rows = [(str(e["layer"]), *(f"{e[kind]['kept']} of {e[kind]['units']}" for kind in kinds)) for e in layers]
    lines += table(("layer", *(heads.get(kind, kind) for kind in kinds)), rows)
    if manifest["profile"] != "dynamic":
        lines += ["", "Which units were kept is in `kept_units.json`."]
    return lines


def _origin(manifest: dict[str, Any]) -> Iterable[str]:
    base, calibration = manifest["base"], manifest["calibration"]
    revision = base.get("commit") or base.get("revision")
    yield (
        f"- **base model**: {base_label(base)}{f', revision {revision}' if revision else ''}, {base['parameters']:,} "
        f"parameters, {base['dtype']}, weights {base['fingerprint'][:12]}; licence: {manifest['license']}"
    )
    yield f"- **calibration**: {sentence(calibration) if calibration else 'none needed'}"
    if manifest.get("recovery"):
        yield f"- **recovery**: {sentence(manifest['recovery'])}"
    yield f"- **versions**: {sentence(manifest['versions'])}"
    options = manifest["options"]
    flags = [f"--profile {manifest['profile']}"]
    flags += [f"--multiple {options['multiple']}"] if options.get("multiple") else []
    flags += [f"--freeze {options['freeze']}"] if options.get("freeze") else []
    again = f"`prunekit export recipe.yaml {' '.join(flags)} --out FOLDER`"
    if manifest.get("recovery"):
        again += ", then `prunekit recover FOLDER --out RECOVERED` with the options above"
    yield f"- **again**: {again}, written {manifest['created']}"
