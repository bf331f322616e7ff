"""Reads the arguments of ``prunekit export`` and prints its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ...registry import Catalog, SpecError
from ..files.reader import Mistake
from ..files.spec import PipelineSpec
from ..files.yaml_file import read_yaml
from ..models.exported.manifest import Manifest
from ..output import printing
from ..output.formatting import achieved
from ..output.records import as_number
from ..runs.preflight import mistakes
from ..runs.records import Comparison, RunResult, read_results
from .card import damages, metric_heads, metric_rows
from .constraint import sentence as rounding_sentence
from .exporting import Exporter
from .profiles import PROFILES, TOOLS, asked_for


def list_profiles(plugins: Sequence[Path]) -> None:
    """Print the profiles: what is written, what each requires of the cut, and where it runs; those of plugins too."""
    rows = [(profile.name, profile.writes, profile.requires, profile.remark) for profile in PROFILES]
    catalog = Catalog.discover(plugins)
    for entry in catalog.of_role("export_formats"):
        made_from = asked_for(entry.name, catalog)[0].name
        rows.append((entry.name, entry.component.summary(), f"as {made_from}", f"by {entry.provider}"))
    printing.show_table(("profile", "what is written", "requires of the cut", "remark"), rows, left=4)
    printing.show_table(("runs in", *TOOLS), [(p.name, *p.runs) for p in PROFILES], left=1 + len(TOOLS))
    printing.say("verified: prunekit's tests run it; read: its documentation or code says so; no: it cannot run it")


def export(
    source: Path | None,
    profile: str | None,
    out: Path | None,
    settings: Sequence[str],
    plugins: Sequence[Path],
    **options: Any,
) -> None:
    """Export, and print the result."""
    names = ", ".join(p.name for p in PROFILES)
    if source is None or profile is None or out is None:
        missing = "RUN_OR_YAML" if source is None else "--profile NAME" if profile is None else "--out DIR"
        raise SpecError(
            f"{missing} is missing: prunekit export RUN_OR_YAML --profile NAME --out DIR, with one of the profiles "
            f"{names} (prunekit export --list)"
        )
    spec, run = source_of(source, settings, plugins)
    printing.catalog_problems(spec.catalog)
    with printing.Bars() as bars:
        exporter = Exporter(spec, profile, out, run=run, progress=bars.track, say=bars.say, **options)
        manifest = exporter.export()
    show(manifest)
    printing.say(f"written: {Path(out).expanduser()} ({size(manifest)})", whole=True)


def source_of(source: Path, settings: Sequence[str], plugins: Sequence[Path]) -> tuple[PipelineSpec, RunResult | None]:
    """The pipeline of a pipeline file, or that of a results folder with its results."""
    if source.is_dir():
        resolved, results = source / "resolved.yaml", source / "results.json"
        if not (resolved.is_file() and results.is_file()):
            raise SpecError(
                f"{source} is a folder without resolved.yaml and results.json, so it is not a run; name a results "
                "folder of prunekit run, or a pipeline file"
            )
        run = read_results(source)
        if isinstance(run, Comparison):
            raise SpecError(f"{results} holds {len(run.runs)} runs; name one of the pipeline files in {source}")
        # Measurements with other settings are not those of this export.
        return PipelineSpec.load(resolved, settings, plugins, _mistakes), None if settings else run
    file = read_yaml(source)
    if file.is_study:
        raise SpecError(f"{source} is an ablation file, of many models; name a pipeline file or a results folder")
    return PipelineSpec.load(file, settings, plugins, _mistakes), None


def _mistakes(spec: PipelineSpec) -> list[Mistake]:
    """Those of the pipeline, without those of evaluators that an export does not run."""
    return [
        found
        for found in mistakes(spec)
        if not (found.place[:1] == ("evaluate",) and spec.evaluate[int(found.place[1])].paired)
    ]


def show(manifest: Manifest) -> None:
    """Print the cut and the measurements of an export."""
    printing.say(f"{manifest.strategy} on {manifest.base.name} as {manifest.profile}: {achieved(manifest.ratio)}")
    if manifest.rounding:
        printing.say(rounding_sentence(manifest.rounding, manifest.ratio.asked))
    printing.show_table((*metric_heads(manifest)[:-1], "exported"), metric_rows(manifest))
    for line in freezing_costs(manifest):
        printing.say(line)
    show_end(manifest)


def show_end(manifest: Manifest) -> None:
    """Print the comparison of the written model with the pruned one, and the notes."""
    check = manifest.check
    if check is not None:
        exact = "bit-equal" if check.logits == "equal" else f"equal to {check.largest_difference:.1e}"
        printing.say(f"loaded again: logits {exact} over {check.tokens} tokens")
    for note in [*damages(manifest), *manifest.notes]:
        printing.warning(note)


def freezing_costs(manifest: Manifest) -> list[str]:
    """The changes in perplexity by freezing, one line each."""
    lines = []
    for metric in manifest.metrics if manifest.freeze else ():
        before, after = (as_number((v or {}).get("perplexity")) for v in (metric.per_batch, metric.exported))
        if manifest.freeze and isinstance(before, (int, float)) and isinstance(after, (int, float)) and before:
            lines.append(
                f"freezing ({manifest.freeze.how}) changed {metric.label} from {before:.4g} to {after:.4g} "
                f"({100 * (after / before - 1):+.2g}%)"
            )
    return lines


def size(manifest: Manifest) -> str:
    """The size of all files with a unit."""
    return decimal(sum(file.bytes for file in manifest.files.values()))
