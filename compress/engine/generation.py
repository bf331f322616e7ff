"""Ways to generate in which a pruned model would give other tokens than with generate() alone, or none: refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...registry import SpecError
from .hooks import Hooks

REMEDY = "or choose the units once for all texts with pruned.freeze()"


def drafting(hooks: Hooks, *args: Any, **kwargs: Any) -> str | None:
    """Why drafted tokens cannot be checked: the first pass holds the prompt and a draft, and chooses from both."""
    if hooks.shared.running.mode != "prune" or not hooks.depends_on_batch:
        return None
    strategy = hooks.decider.strategy.name
    return (
        f"assisted generation (assistant_model, prompt_lookup_num_tokens): {strategy} would choose units from the "
        f"prompt and the drafted tokens, which may be rejected; generate without drafts, {REMEDY}"
    )


def batching(hooks: Hooks, *args: Any, **kwargs: Any) -> str | None:
    """Why requests cannot be batched continuously: they share one row, one size of the cache, and another thread."""
    what = "continuous batching (generate_batch, cache_implementation='paged')"
    running = hooks.shared.running
    if running.usual == "prune" and hooks.depends_on_batch:
        strategy = hooks.decider.strategy.name
        return f"{what}: {strategy} would choose the same units for all requests; use generate(), {REMEDY}"
    if running.usual == "prune" and hooks.shared.applier.resizes:
        for cut in hooks.cuts:
            if cut.site.kind == "attention" and not cut.whole:
                return (
                    f"{what} needs as many attention heads in every layer as the configuration says, and this pruning "
                    f"cut {cut.site.label} to {cut.count} of {cut.site.units}; use generate(), or export with profile "
                    "hf-uniform"
                )
    if running.usual != running.mode:
        return f"{what} computes in a thread of its own, where the model is pruned; use pruned.suspended(), not dense()"
    return None


def stepping(hooks: Hooks, generation_config: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why a generation is refused for its steps: without a cache they look like prompts, and beams change rows."""
    policy, beams = hooks.policy, generation_config.num_beams or 1
    if hooks.shared.running.mode != "prune":
        return None
    if hooks.groups and beams > 1:
        return (
            f"generate(num_beams={beams}): group_by: {hooks.decider.strategy.group_by.name} chooses units for each "
            "row, and beams move from row to row; use num_beams=1, or group_by: batch"
        )
    if policy.is_plain or generation_config.use_cache is not False:
        return None
    return (
        f"generate(use_cache=False): policy {policy.name} treats decode steps otherwise than prompts, and without a "
        "key/value cache every step is a prompt; leave use_cache out, or use policy: per_prompt"
    )


REFUSED: dict[str, Callable[..., str | None]] = {
    "_get_candidate_generator": drafting,
    "init_continuous_batching": batching,
    "_prepare_cache_for_generation": stepping,
}
"""Methods of transformers that are called first, and why a pruned model may refuse a call of them."""


class Refusing:
    """Replaces a method of a pruned model; raises :class:`SpecError` where there is a reason to."""

    def __init__(self, method: Callable, reason: Callable[..., str | None], hooks: Hooks):
        self.method, self.reason, self.hooks = method, reason, hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if reason := self.reason(self.hooks, *args, **kwargs):
            raise SpecError(reason)
        return self.method(*args, **kwargs)


def refuse(model: Any, hooks: Hooks) -> list[Callable[[], None]]:
    """Have the model refuse these methods; returns functions that undo it."""
    undo: list[Callable[[], None]] = []
    for name, reason in REFUSED.items():
        if hasattr(model, name):
            undo.append(partial(_restore, model, name, vars(model).get(name)))
            vars(model)[name] = Refusing(getattr(model, name), reason, hooks)
    return undo


def _restore(model: Any, name: str, own: Any) -> None:
    if own is None:
        vars(model).pop(name, None)
    else:
        vars(model)[name] = own
