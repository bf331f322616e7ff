"""What is wrong with a pipeline as far as its file and this machine tell: found before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...registry import DataError, ExpertUnit, ModelError, PrunekitError, TextSource
from ...registry.tensors.tokens import context_length
from ..calibration.statistics_file import check_place
from ..files.reader import Mistake, Place
from ..files.recover import check_installed
from ..files.spec import PipelineSpec
from ..files.yaml_file import parse_place
from ..models import gguf_file
from ..models.given import check_predicts
from ..models.loading import outline_of, usable_device
from ..models.source import ModelSource, place_of
from ..pruning.sites import find_sites, serving, sites_within

Check = tuple[Place, Hashable, Callable[[], object]]
"""The place in the pipeline, what is checked (once, however many pipelines share it), and the check."""


def mistakes(spec: PipelineSpec) -> list[Mistake]:
    """All mistakes of a pipeline; nothing is loaded."""
    found = ((place, message_of(check)) for place, _, check in checks(spec))
    return [placed(place, message) for place, message in found if message is not None]


def checks(spec: PipelineSpec, here: bool = True) -> Iterator[Check]:
    """The checks of one pipeline; those of the device and of the model's folder only if it runs ``here``."""
    source, strategy, calibration = spec.model, spec.prune, spec.calibration
    outline = _outline(source) if here else None
    if here:
        yield ("model", "device"), ("device", source.device), lambda: usable_device(source.device)
        yield ("model", "name"), ("place", source), lambda: place_of(source)
        yield ("prune",), ("layers", source, strategy), lambda: _check_layers(spec)
        family, named = (source, spec.architecture, spec.plugins), spec.architecture is not None
        yield ("architecture",) if named else ("model", "name"), ("family", family), lambda: _check_family(spec)
        yield ("prune",), ("experts", family, strategy.experts), lambda: _check_experts(spec)
        if spec.recover is not None:
            yield ("recover",), ("installed", "peft"), check_installed
        if calibration.statistics is not None and not calibration.statistics.exists():
            yield ("calibration", "statistics"), calibration.statistics, partial(check_place, calibration.statistics)
    context = None if outline is None else context_length(outline)
    lengths = {"calibration": calibration.length} if strategy.needs_calibration else {}
    lengths |= {} if spec.recover is None else {"recover": spec.recover.length}
    for section, length in lengths.items():
        key = f"{section}.length"
        yield (section, "length"), ("context", key, context, length), partial(check_context, key, length, context)
    for index, evaluator in enumerate(spec.evaluate):
        place, which = ("evaluate", index), evaluator.identity
        yield place, ("options", which), evaluator.check_options
        yield place, ("rows", which, spec.positions, context), partial(check_rows, spec, index, context)
        if outline is not None:
            yield place, ("model", which, source), partial(evaluator.check, outline)


def check_rows(spec: PipelineSpec, index: int, context: int | None) -> None:
    """Raise :class:`DataError` for an evaluator whose rows are longer than the histories."""
    evaluator, positions = spec.evaluate[index], spec.positions
    row = evaluator.longest_row(context)
    if row is None or positions is None or row <= positions:
        return
    place = f"evaluate.{index}" + (f".{evaluator.row_option}" if evaluator.row_option else "")
    written = getattr(evaluator, evaluator.row_option) if evaluator.row_option else row
    found = "" if written in (None, row) else f" (found {written})"
    lower = f"lower {place} to {positions}, or raise" if evaluator.row_option else "leave it out, or raise"
    raise DataError(
        f"{place}: {evaluator.name} runs rows of {row} tokens{found}, but {spec.prune.name} keeps a history of "
        f"calibration.length = {positions} positions; {lower} calibration.length to {row}"
    )


def check_context(key: str, length: int, context: int | None) -> None:
    """Raise :class:`DataError` for sequences that are longer than the model's context; ``key`` has their length."""
    if context is not None and length > context:
        raise DataError(
            f"{key}: the model's context is {context} tokens, found {length}; set {key} to {context} or less"
        )


def unseen(specs: Iterable[PipelineSpec]) -> str:
    """A sentence on what these checks leave to the run."""
    hub: dict[str, None] = {}
    for spec in specs:
        if spec.model.is_on_hub:
            hub[f"model {spec.model.label}"] = None
        texts: list[TextSource] = list(spec.calibration.sources) if spec.prune.needs_calibration else []
        found = [text for each in spec.evaluate for _, text in each]
        found += [text for texts in found if isinstance(texts, tuple) for text in texts]
        texts += [text for text in found if isinstance(text, TextSource)]
        texts += spec.training_texts
        hub |= dict.fromkeys(f"dataset {text.dataset}" for text in texts if text.dataset)
    there = f", and on the hub: {', '.join(hub)}" if hub else ""
    return f"not looked at: the weights, whether texts are long enough, the data of tasks{there}"


def message_of(check: Callable[[], object]) -> str | None:
    """The message of a check that fails."""
    try:
        check()
    except PrunekitError as error:
        return str(error)
    except Exception:  # not foreseen: the run itself will report it, with its place
        return None
    return None


def placed(place: Place, message: str) -> Mistake:
    """The mistake at the place that the message begins with, where that is the checked place or in it."""
    named, colon, rest = message.partition(": ")
    if colon and parse_place(named)[: len(place)] == place:
        return Mistake(parse_place(named), rest)
    if colon and len(place) == 1 and named.isidentifier():  # skip_layers, of the strategy's options
        return Mistake((*place, named), rest)
    return Mistake(place, message)


def _check_layers(spec: PipelineSpec) -> None:
    """Check that the layers to skip exist, and that the others can lose what the ratio asks for."""
    outline = _outline(spec.model)
    layers = None if outline is None else getattr(outline.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int):
        sites_within(spec.prune, [], layers)


def _check_family(spec: PipelineSpec) -> None:
    """Check that an architecture serves the model, and that one that the user names has its layers."""
    outline = _outline(spec.model)
    if outline is None:
        return
    check_predicts(outline.config)
    if spec.architecture is not None or serving(outline.config, spec.catalog) is None:
        _find_sites(spec, "keep")


def _check_experts(spec: PipelineSpec) -> None:
    """Check that whole experts can be removed, where the strategy does that and an architecture serves the model."""
    outline = _outline(spec.model)
    if spec.prune.experts == "whole" and outline is not None and serving(outline.config, spec.catalog) is not None:
        _find_sites(spec, "whole")


def _find_sites(spec: PipelineSpec, experts: ExpertUnit) -> None:
    model = outline_of(spec.model)
    if model is None:
        return
    try:
        find_sites(model, spec.catalog, spec.prune.attention_unit, experts)
    except ModelError as error:
        message, _, lines = str(error).partition(":\n\n")
        if not lines:
            raise
        raise ModelError(f"{message}; prunekit families --model {spec.model.label} prints them") from None


@lru_cache(maxsize=64)
def _outline(source: ModelSource) -> Any:
    """An object with the ``config`` of a local model, and nothing else; None where it cannot be known offline."""
    import transformers

    try:
        place = place_of(source)
        if Path(place).is_file():
            return SimpleNamespace(config=gguf_file.config_of(Path(place)))
        if not Path(place).is_dir() or source.trust_remote_code:
            return None
        return SimpleNamespace(config=transformers.AutoConfig.from_pretrained(place, trust_remote_code=False))
    except Exception:  # a broken model is reported when it is loaded
        return None
