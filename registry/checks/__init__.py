"""Checks that every component has to pass, built in or not: ``check_component(MaxWeight)`` in a plugin's tests.

They run on small made-up tensors. :func:`check_sites` compares an architecture with a model, and
:func:`check_evaluation` runs an evaluator. A broken rule raises :class:`AssertionError`, which names the component and
the rule.
"""

from __future__ import annotations

import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError

from ..catalog import complaint, near
from ..component import Component
from ..errors import PluginError, PrunekitError
from ..roles.choosing import Chooser
from ..roles.compensation import Compensator
from ..roles.evaluation import Evaluator, Subject, checked
from ..roles.exporting import ExportFormat
from ..roles.fitting import FittedScorer
from ..roles.gradients import GradientScorer
from ..roles.grouping import Grouping
from ..roles.hookspecs import ROLES
from ..roles.parts import Architecture, HistoryMerger, MaskApplier, ProbeSelector, Scorer, SparsityAllocator
from ..roles.policies import Policy
from ..roles.strategy import Strategy
from ..tensors.model_state import ModelState
from ..tensors.tokens import context_length
from .allocators import check_allocation, check_block_statistic, check_budget, check_weight_statistic
from .appliers import check_application
from .choosers import CHOOSER_CHECKS
from .compensators import COMPENSATOR_CHECKS
from .exporting import EXPORT_CHECKS
from .fitting import FITTING_CHECKS
from .gradients import GRADIENT_CHECKS
from .grouping import GROUPING_CHECKS
from .parts import expect
from .policies import POLICY_CHECKS
from .probes import (
    check_merge,
    check_merge_order,
    check_merge_scale,
    check_real_tokens,
    check_selection,
    check_update,
    check_update_entries,
)
from .scorers import check_arguments, check_channel_order, check_score_cost, check_scores
from .sites import check_model_types, check_sites
from .statistics import check_observation, check_statistic

Check = Callable[[Any], None]
"""Takes one component, of the role that the check is of."""

__all__ = ["check_component", "check_evaluation", "check_sites", "checks_of"]


def check_component(component: type[Component] | Component) -> None:
    """Run every check on a component, or on a class with its default options.

    A class with options that have no default must be passed as an object. Raises :class:`AssertionError`.
    """
    for check in checks_of(component):
        run_check(check, built(component))


class Finding(NamedTuple):
    """What one check says of a component."""

    check: str
    """Name of the function."""
    rule: str
    """What the check demands, in one sentence."""
    result: Literal["passed", "failed", "left out"]
    message: str
    """What is wrong, or why the check is left out; empty where it has passed."""


def findings(component: Component) -> Iterator[Finding]:
    """What every check says of a component, one after the other."""
    for check in _every(type(component)):
        yield found(check, component, component.exempt.get(check.__name__, ""))


def found(check: Check, component: Component, exempt: str = "") -> Finding:
    """What one check says of a component; ``exempt`` is the reason why it is left out."""
    rule = inspect.cleandoc(check.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")
    try:
        if not exempt:
            run_check(check, component)
    except AssertionError as error:
        return Finding(check.__name__, rule, "failed", str(error))
    return Finding(check.__name__, rule, "left out" if exempt else "passed", exempt)


def run_check(check: Check, component: Component) -> None:
    """Run one check; raises :class:`AssertionError`, also for an error that the component raises.

    Torch's default dtype and gradient mode are put back.
    """
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        check(component)
    except AssertionError:
        raise
    except Exception as error:
        raise raised(component, error) from error
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def raised(component: Component, error: Exception, where: str = "") -> AssertionError:
    """The message for an error that came out of a component, with its last place; ``where`` follows it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name} line {last.lineno}, in {last.name}"
    return AssertionError(
        f"{type(component).__name__} raises {type(error).__name__}: {error} ({place}){where and f' {where}'}"
    )


def checks_of(component: type[Component] | Component) -> list[Check]:
    """The checks that apply, each a function of the component: for ``pytest.mark.parametrize``.

    Those that the component declares itself :attr:`~prunekit.registry.Component.exempt` from are left out.
    """
    cls = component if inspect.isclass(component) else type(component)
    return [check for check in _every(cls) if check.__name__ not in cls.exempt]


def _every(cls: type[Component]) -> list[Check]:
    roles = [
        role for role in ALL_ROLE_CHECKS if issubclass(cls, role) and not (role is Scorer and issubclass(cls, Chooser))
    ]
    return COMMON + [check for role in roles for check in ALL_ROLE_CHECKS[role]]


def built(component: type[Component] | Component) -> Component:
    """The component itself, or an object of the class with default options."""
    if isinstance(component, Component):
        return component
    required = [name for name, field in component.model_fields.items() if field.is_required()]
    expect(
        not required,
        component,
        f"cannot be made by its name alone, {', '.join(required)} has no default; add one, or check an object",
    )
    return component.model_validate({})


def check_declaration(component: Component) -> None:
    """It has a role, implements it, and declares its name as a literal."""
    roles = [role for role in ROLES.values() if isinstance(component, role)]
    expect(bool(roles), component, f"derives from none of {', '.join(role.__name__ for role in ROLES.values())}")
    found = complaint(type(component), roles[0])
    expect(found is None, component, str(found))
    known = {check.__name__ for check in _every(type(component))}
    for name in component.exempt:
        expect(name in known, component, f"is exempt from {name!r}, which is not a check of its{near(name, known)}")


def check_description(component: Component) -> None:
    """It has a docstring, whose first line ``prunekit list`` shows."""
    expect(bool(type(component).summary()), component, "has no docstring of its own; its first line is shown by list")


def check_options_are_frozen(component: Component) -> None:
    """Options cannot be changed, and are hashable."""
    try:
        component.name = "another"
    except ValidationError:
        pass
    else:
        expect(False, component, "can be changed after it is made; keep the frozen model_config of Component")
    try:
        hash(component)
    except TypeError as error:
        expect(False, component, f"is not hashable ({error}); use tuples instead of lists in options")


def check_unknown_option(component: Component) -> None:
    """Unknown options are refused."""
    try:
        type(component).model_validate({**dict(component), "surely_no_option": 1})
    except ValidationError:
        return
    expect(False, component, 'takes options it does not have; keep extra="forbid"')


def check_round_trip(component: Component) -> None:
    """Written to JSON and read again it is equal, with its parts: results can be rerun from ``resolved.yaml``."""
    try:
        # Every part is written by its own class, as in resolved.yaml, and read by it, as the catalog does.
        data = json.loads(json.dumps(component.model_dump(mode="json", serialize_as_any=True)))
        again = _read_like(component, data)
    except (TypeError, ValueError) as error:
        expect(False, component, f"cannot be written to JSON and read again: {error}")
    expect(again == component, component, f"reads {again!r} from what it writes, {data}")


def _read_like(original: Any, data: Any) -> Any:
    """``data`` as an object like ``original``, every component by its own class."""
    if isinstance(original, Component):
        options = type(original).model_fields
        written = data if isinstance(data, dict) else {}
        # An option that is newer than stored results may be left out where it has its default.
        absent = [key for key in options if key not in written]
        lost = [key for key in absent if not written or getattr(original, key) != options[key].default]
        expect(not lost, original, f"does not write its options {', '.join(lost)}")
        read = {key: _read_like(getattr(original, key), written[key]) for key in options if key in written}
        return type(original).model_validate(read)
    if isinstance(original, tuple) and any(isinstance(part, Component) for part in original):
        return tuple(_read_like(part, item) for part, item in zip(original, data, strict=True))
    return data


def check_strategy_ratio(strategy: Strategy) -> None:
    """The ratio is a share of less than 1, and can be set on a strategy."""
    options = dict(strategy)
    for ratio in (-0.1, 1.0, math.nan):
        try:
            type(strategy).model_validate({**options, "ratio": ratio})
        except ValidationError:
            continue
        expect(False, strategy, f"takes a ratio of {ratio}")
    expect(type(strategy).model_validate({**options, "ratio": 0.4}).ratio == 0.4, strategy, "does not take a ratio")


def check_strategy_parts(strategy: Strategy) -> None:
    """Every part passes its own checks."""
    for part in (value for _, value in strategy if isinstance(value, Component)):
        for check in checks_of(part):
            check(part)
    expect(strategy.dynamic == (strategy.merger is not None), strategy, "has a selector without a merger")


def check_rows(evaluator: Evaluator) -> None:
    """``row_option`` is one of its options, and ``longest_row`` is a number of tokens within the context, or None."""
    option = evaluator.row_option
    known = option is None or option in type(evaluator).model_fields
    expect(known, evaluator, f"has row_option {option!r}, which is none of its options")
    for context in (None, 1, 4096):
        row = evaluator.longest_row(context)
        fits = row is None or (isinstance(row, int) and 1 <= row <= (context or row))
        expect(fits, evaluator, f"has a longest row of {row!r} tokens on a model of {context} positions")


def check_evaluation(evaluator: Evaluator, subject: Subject) -> None:
    """On ``subject`` it returns finite numbers with their protocol, and leaves everything as it was.

    That is weights, buffers, hooks and modes of the model, and torch's default dtype, gradient mode and random state.
    No row is longer than ``longest_row`` says. Hooks, modes and torch's settings are put back in any case.
    """
    values = {name: parameter.detach().clone() for name, parameter in subject.model.named_parameters()}
    before, drawn = ModelState(subject.model), torch.get_rng_state()
    rows: list[int] = []

    def look(model: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows.extend([] if ids is None else [ids.shape[-1]])

    watch = subject.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        found = evaluator.evaluate(subject)
        watch.remove()
        left = before.left()
    except PrunekitError:
        raise
    except Exception as error:
        raise raised(evaluator, error) from error
    finally:
        watch.remove()
        before.restore()
    if not torch.equal(drawn, torch.get_rng_state()):
        left.append("changes torch's random state; draw from a torch.Generator of its own")
    stated = evaluator.longest_row(context_length(subject.model))
    longest = max(rows, default=0)
    fits = stated is None or longest <= stated
    expect(fits, evaluator, f"runs rows of {longest} tokens, and its longest_row is {stated}")
    try:
        found = checked(evaluator, found)
    except PluginError as error:
        expect(False, evaluator, f"breaks a rule: {error}")
    expect(bool(found.values) and bool(found.protocol), evaluator, "must return values and the protocol behind them")
    for name, value in found.values.items():
        finite = value is None or math.isfinite(value)
        expect(finite, evaluator, f"measures {name!r} as {value!r}, which is not finite")
    try:
        json.dumps([found.protocol, found.notes, found.details], allow_nan=False)
    except (TypeError, ValueError) as error:
        expect(False, evaluator, f"has a protocol, notes or details that JSON cannot hold ({error})")
    after = dict(subject.model.named_parameters())
    changed = [name for name, value in values.items() if name in after and not torch.equal(value, after[name])]
    left = [f"changes {name}" for name in [*changed, *before.weights()]] + left
    expect(not left, evaluator, f"{left and left[0]}; a measurement must leave all as it was")


COMMON: list[Check] = [
    check_declaration,
    check_description,
    check_options_are_frozen,
    check_unknown_option,
    check_round_trip,
]
ALL_ROLE_CHECKS: dict[type[Component], Sequence[Check]] = {
    Scorer: [check_arguments, check_scores, check_channel_order, check_score_cost, check_statistic, check_observation],
    ProbeSelector: [check_selection, check_real_tokens],
    HistoryMerger: [check_merge, check_merge_order, check_merge_scale, check_update, check_update_entries],
    MaskApplier: [check_application],
    SparsityAllocator: [
        check_arguments,
        check_allocation,
        check_budget,
        check_block_statistic,
        check_weight_statistic,
    ],
    Architecture: [check_model_types],
    Chooser: CHOOSER_CHECKS,
    GradientScorer: GRADIENT_CHECKS,
    FittedScorer: FITTING_CHECKS,
    Compensator: COMPENSATOR_CHECKS,
    Policy: POLICY_CHECKS,
    Grouping: GROUPING_CHECKS,
    Strategy: [check_strategy_ratio, check_strategy_parts],
    Evaluator: [check_rows],
    ExportFormat: EXPORT_CHECKS,
}
