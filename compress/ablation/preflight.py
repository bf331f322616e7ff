"""Mistakes that only the machine can tell, found before the first trial: devices, model folders, layers, tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from ...registry import PrunekitError
from ..files.reader import Mistake, Place
from ..files.spec import PipelineSpec
from ..models.loading import ModelSource, place_of, usable_device
from ..pruning.prune import sites_within
from .planned import Planned

Check = tuple[Place, Hashable, Callable[[], object]]
"""Where in the pipeline, what is checked (once, however many trials share it), and how."""


def preflight(trials: Sequence[Planned], due: Collection[str], here: bool) -> dict[int, list[Mistake]]:
    """Mistakes by the place of the trial among ``trials``; nothing is loaded.

    Looked at is what the ``due`` trials (by key) use, their models only if they run ``here``, on this machine;
    finished trials that have the same mistake are named with them.
    """
    needed = {what for trial in trials if trial.key in due for _, what, _ in _checks(trial.spec, here)}
    messages: dict[Hashable, str | None] = {}
    found: dict[int, list[Mistake]] = {}
    for index, trial in enumerate(trials):
        for place, what, check in _checks(trial.spec, here):
            if what not in needed:
                continue
            if what not in messages:
                messages[what] = _message(check)
            if messages[what] is not None:
                found.setdefault(index, []).append(_mistake(place, messages[what]))
    return found


def _checks(spec: PipelineSpec, here: bool) -> Iterator[Check]:
    source, strategy = spec.model, spec.prune
    if here:
        yield ("model", "device"), ("device", source.device), lambda: usable_device(source.device)
        yield ("model", "name"), ("place", source), lambda: place_of(source)
        yield ("prune",), ("layers", source, strategy), lambda: _reach(spec)
    for index, evaluator in enumerate(spec.evaluate):
        yield ("evaluate", index), ("options", evaluator.identity), evaluator.check_options


def _message(check: Callable[[], object]) -> str | None:
    try:
        check()
    except PrunekitError as error:
        return str(error)
    except Exception:  # what no class of ours foresaw is the trial's to report, with its place
        return None
    return None


def _mistake(place: Place, message: str) -> Mistake:
    """With the place that the message begins with, where that is in or beside the place that was checked."""
    named, colon, rest = message.partition(": ")
    full = ".".join(map(str, place))
    if colon and named == full:
        return Mistake(place, rest)
    if colon and len(place) == 1 and named.isidentifier():  # skip_layers, of the strategy's options
        return Mistake((*place, named), rest)
    return Mistake(place, message)


def _reach(spec: PipelineSpec) -> None:
    """Whether the layers to skip are there, and the others can lose what the ratio asks for."""
    layers = _layers(spec.model)
    if layers is not None:
        sites_within(spec.prune, [], layers)


@lru_cache(maxsize=64)
def _layers(source: ModelSource) -> int | None:
    """The number of layers that a local model's configuration states; None where it cannot be known offline."""
    import transformers

    try:
        place = place_of(source)
        if not Path(place).is_dir() or source.trust_remote_code:
            return None
        found = transformers.AutoConfig.from_pretrained(place).get_text_config().num_hidden_layers
    except Exception:  # what is wrong with a model is said when it is loaded; here it is only not known
        return None
    return found if isinstance(found, int) else None
