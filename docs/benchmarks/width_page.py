"""The page that compensation_width.py writes."""

from __future__ import annotations

from typing import Any

from prunekit.compress.output.formatting import table
from prunekit.compress.runs.provenance import versions
from width_sizes import RIDGE, Sizes

NAMES = {"mlp": "MLP", "attention": "heads"}
CHEAP, DEAR = 0.1, 0.5
"""Shares of the saved time up to which compensation is called affordable, and affordable at a price."""
LIMIT = 8 * 2**30
"""Bytes that one site may use."""


def page(sizes: Sizes, found: dict[str, list[dict[str, Any]]], machine: str, command: str, seconds: float) -> str:
    """The whole page as markdown."""
    sections = {"A": _static, "B": _accuracy, "C": _per_batch, "D": _swaps}
    lines = [
        f"# Least squares at C = {sizes.channels:,} and {sizes.outputs:,}",
        "",
        "The cost of the compensator `least_squares` in one layer of that width: once for a static cut, in every batch",
        "for a cut made per batch. Letters: C channels entering the consumer, k kept, d dropped.",
        "",
        *_protocol(sizes, machine, command, seconds),
    ]
    for part in sorted(found):
        lines += ["", *sections[part](sizes, found[part])]
    return "\n".join(lines) + "\n"


def _protocol(sizes: Sizes, machine: str, command: str, seconds: float) -> list[str]:
    versioned = ", ".join(f"{name} {number}" for name, number in versions().items())
    rows = [
        ("command", f"`{command}`"),
        ("machine", f"{machine}, {sizes.threads} threads"),
        ("versions", versioned),
        ("dtype", "float32 (part B: also float64)"),
        (
            "model",
            f"one LLaMA layer with random weights: hidden {sizes.outputs:,}, 32 heads, intermediate {sizes.channels:,}",
        ),
        ("ridge", f"{RIDGE} of the mean variance"),
        ("operations", "two for each multiply-add; matrix products, linear systems and attention, as evaluator `cost`"),
        ("took", f"{seconds / 60:.1f} minutes"),
    ]
    return table(("", ""), rows)


def _static(sizes: Sizes, found: list[dict]) -> list[str]:
    head = ("site", "C", "d", "pass without", "pass with covariance", "solve", "fold", "peak: gather", "solve", "fold")
    rows, said = [], []
    for cut in found:
        kind, grown = NAMES[cut["kind"]], cut["memory"]
        times = (f"{cut[name]:.2f} s" for name in ("plain_pass", "gather", "solve", "fold"))
        sizes_in_gib = (_gib(grown[name]) for name in ("gather", "solve", "fold"))
        rows.append((kind, f"{cut['channels']:,}", f"{cut['dropped']:,}", *times, *sizes_in_gib))
        worst, whole = max(grown.values()), sum(cut[name] for name in ("gather", "solve", "fold"))
        said.append(
            f"- {kind}: {whole:.1f} s in all and at most {_gib(worst)} in addition to the model, "
            f"{'within' if worst < LIMIT else 'not within'} 8 GiB; the whole process took {_gib(cut['process'])}. "
            f"Checked in advance: {_gib(cut['stated'])} for covariance and solving."
        )
    return [
        "## A. A cut made once",
        "",
        f'`prune(model, "wanda_sp", compensate="least_squares")`, {found[0]["ratio"]:.0%} of one site cut, the other',
        f"not pruned, {found[0]['tokens']:,} random tokens in batches of {sizes.calibration_rows} x {sizes.length:,}.",
        "A pass runs the layer over all of them: first for the scores, then for the covariance. Solve: from then",
        "until `prune` returns. Fold: the weight and the bias, in the first forward pass afterwards.",
        "Memory: growth of the process over what it held with the model loaded and one batch",
        "run, sampled every 5 ms; gathering holds a batch's activations too.",
        "",
        *table(head, rows),
        "",
        *said,
    ]


def _accuracy(sizes: Sizes, found: list[dict]) -> list[str]:
    keys = ("covariance", "uncentred", "slope", "output")
    rows = [
        (f"{one['channels']:,}", *(f"{one[key]:.1e}" for key in keys), f"{one['left']:.3f}", f"{one['bare']:.3f}")
        for one in found
    ]
    head = (
        "C",
        "covariance",
        "the same, uncentred",
        "slope",
        "folded weight's output",
        "left by least squares",
        "left by the mean",
    )
    return [
        "## B. float32 against float64",
        "",
        f"The same {sizes.tokens:,} activations through `ChannelMoments` in float32, as calibration gathers them, and",
        f"in float64 about the exact mean; then {found[0]['ratio']:.0%} of the channels, drawn at random, are dropped.",
        "The activations have C / 8 common factors, and lognormal sizes of tokens (sigma 0.7), of channels and of",
        "means relative to the spread (sigma 1.5 each: one channel in 60 has a mean of 20 times its spread or more).",
        "Relative errors in the Frobenius norm; the output is that of fresh activations without their mean. Uncentred:",
        "float32 sums of products, the mean's part subtracted last. Left: the share of the dense output about its",
        "mean that least squares (in float64) and the mean alone do not restore.",
        "",
        *table(head, rows),
    ]


def _per_batch(sizes: Sizes, found: list[dict]) -> list[str]:
    tokens = sizes.batch_rows * sizes.length
    lines = [
        "## C. A cut made per batch",
        "",
        f"One decision's slope, and its folding into the weight (`W_kept + W_cut @ slope`, {sizes.outputs:,} outputs):",
        f"seconds, median of {sizes.repeats}. Swapped: kept units that calibration alone would not keep; `pivot` costs",
        "more the more there are, `solve` and low rank cost the same for any units, `usual` leaves the correction",
        "out.",
        "",
        f"- Dense: the whole layer, attention and MLP, on a batch of {sizes.batch_rows} x {sizes.length:,} tokens,",
        f"  measured at {sizes.timed_rows} x {sizes.length:,} and scaled linearly by "
        f"{sizes.batch_rows / sizes.timed_rows:g}.",
        "- Saved: how much less a static cut of this site alone takes, without a probe, measured in turn with dense.",
        "- Break-even: tokens of a batch above which the cut saves more time than the compensation takes.",
        "- Held: memory of this one site while cuts are made; every layer needs the same.",
        f"- Affordable: yes up to {CHEAP:.0%} of the time saved, at a price up to {DEAR:.0%}, else no.",
    ]
    head = (
        "method",
        "slope",
        "fold",
        "both of dense's time",
        "operations",
        "of dense's",
        "of time saved",
        "break-even tokens",
    )
    said = []
    for case in found:
        dense, saved = case["dense"], case["saved"]
        rows, verdicts = [], {}
        for one in case["methods"]:
            seconds = one["slope"]["seconds"] + one["fold"]["seconds"]
            operations = one["slope"]["operations"] + one["fold"]["operations"]
            share = seconds / saved["seconds"] if saved["seconds"] > 0 else float("inf")
            verdict = "yes" if share <= CHEAP else "at a price" if share <= DEAR else "no"
            verdicts.setdefault(verdict, []).append(one["method"])
            rows.append(
                (
                    one["method"],
                    f"{one['slope']['seconds']:.3f} s",
                    f"{one['fold']['seconds']:.3f} s",
                    f"{seconds / dense['seconds']:.1%}",
                    f"{operations / 1e9:,.0f} G",
                    f"{operations / dense['operations']:.1%}",
                    f"{share:.0%}" if share < 10 else "more than all",
                    f"{tokens * share:,.0f}" if share < 10 else "none",
                    _gib(one["held"]),
                    verdict,
                )
            )
        name = f"{NAMES[case['kind']]}, {case['ratio']:.0%}"
        lines += [
            "",
            f"### {name}: C = {case['channels']:,}, k = {case['kept']:,}, d = {case['channels'] - case['kept']:,}",
            "",
            f"Dense {dense['seconds']:.1f} s and {dense['operations'] / 1e9:,.0f} G operations; this cut saves "
            f"{saved['seconds']:.1f} s and {saved['operations'] / 1e9:,.0f} G.",
            "",
            *table((*head, "held", "affordable"), rows),
        ]
        order = [key for key in ("yes", "at a price", "no") if key in verdicts]
        said.append(f"- {name}: " + "; ".join(f"{key}: {', '.join(verdicts[key])}" for key in order) + ".")
    return [*lines, "", "### Where it is affordable", "", *said]


def _swaps(sizes: Sizes, found: list[dict]) -> list[str]:
    rows = [
        (f"{one['ratio']:.0%}", NAMES[kind], f"{share['mean']:.1%}", f"{share['most']:.1%}")
        for one in found
        for kind, share in one["kinds"].items()
    ]
    return [
        "## D. How many units a batch swaps",
        "",
        "The share of the units that PP keeps in a batch and a static cut by the same score would not keep: the",
        f"bundled model, layer 0 whole, calibrated on {found[0]['sequences']} x {sizes.swap_length} tokens of",
        f"`docstrings-calibration`; {found[0]['batches']} batches of {sizes.swap_rows} x {sizes.swap_length} tokens of",
        "`reference-evaluation`. Heads are cut as key/value groups there, five in a layer.",
        "",
        *table(("cut", "site", "mean", "most of any layer and batch"), rows),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
