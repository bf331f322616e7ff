"""Checks of a model family on a tiny random model: what is cut equals an independent zeroing of the dense model.

``check_family(model)`` is all that a test needs. The zeroing reads nothing of a site but the path of its consumer and
the number of its units: columns of the consumer's weight are set to zero in a copy of the dense model. So the rows of
the producers, the sizes that a forward reads, the norm and the probe are all judged by it.
"""

import copy
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from prunekit.compress import prune
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog
from torch import nn

STRATEGIES = ("wanda_sp", "flap", "pp", "full_batch_probing")
UNITS = ("kv_group", "query_head")
ATTENTIONS = ("eager", "sdpa")
PADDINGS = ("none", "left", "right")

ROWS, LENGTH, STEPS = 3, 10, 4
TOLERANCE = 2e-4
"""Largest difference of logits, relative to the largest logit."""


class Case(NamedTuple):
    """One way to cut a model, and to run it."""

    strategy: str
    unit: str
    attention: str
    padding: str


ALL = [Case(*parts) for parts in product(STRATEGIES, UNITS, ATTENTIONS, PADDINGS)]
"""All 48 combinations."""


def cover(turn: int = 0) -> list[Case]:
    """12 of the 48: every strategy under every padding. Units and attentions take turns, so that each strategy meets
    both of both; another ``turn`` gives the strategies other pairs, and four turns give all 48."""
    pairs = list(product(UNITS, ATTENTIONS))
    places = product(enumerate(STRATEGIES), enumerate(PADDINGS))
    return [
        Case(strategy, *pairs[(number + (0, 3, 1)[place] + turn) % 4], padding)
        for (number, strategy), (place, padding) in places
    ]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every weight of a model random, norms, biases and sinks too: with norms of 1, wrong sites pass every check.

    Returns the model in evaluation mode, without gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.4 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval().requires_grad_(False)


def masks(padding: str) -> torch.Tensor | None:
    """The attention mask (ROWS, LENGTH), with other numbers of real tokens in every row; None without padding."""
    if padding == "none":
        return None
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, -4:] = 0
    mask[2, -1:] = 0
    return mask.flip(1) if padding == "left" else mask


class Oracle:
    """A copy of the dense model whose dropped units weigh nothing where they are read."""

    def __init__(self, model: nn.Module, sites: list):
        self.model, self.sites = copy.deepcopy(model), sites
        self.consumers = {place(site): self.model.get_submodule(site.consumer) for site in sites}
        self.weights = {where: columns_of(linear).clone() for where, linear in self.consumers.items()}
        self.biases = {
            where: linear.bias.clone() for where, linear in self.consumers.items() if linear.bias is not None
        }

    def zero(self, kept: dict) -> None:
        """Set the columns of all units but ``kept`` to zero; a site that keeps nothing adds nothing."""
        for site in self.sites:
            where, chosen = place(site), chosen_of(site, kept)
            columns = columns_of(self.consumers[where])
            columns.copy_(self.weights[where] * chosen.repeat_interleave(columns.shape[1] // site.units))
            if where in self.biases:
                self.consumers[where].bias.copy_(self.biases[where] * chosen.any())

    def read(self, **call) -> tuple[torch.Tensor, dict]:
        """Logits, and by site what its consumer read: (ROWS, LENGTH, C)."""
        seen = {}

        def note(where, linear, given):
            seen[where] = given[0].reshape(ROWS, LENGTH, -1)

        hooks = [each.register_forward_pre_hook(partial(note, where)) for where, each in self.consumers.items()]
        try:
            return self.model(**call).logits, seen
        finally:
            for hook in hooks:
                hook.remove()


def chosen_of(site, kept: dict) -> torch.Tensor:
    """(U,) bool: the kept units of a site."""
    chosen = torch.zeros(site.units, dtype=torch.bool)
    chosen[list(kept[place(site)])] = True
    return chosen


def columns_of(linear: nn.Module) -> torch.Tensor:
    """The weight with a column for each channel that is read; (O, C). Some layers store it the other way round."""
    return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight


def place(site) -> tuple[int, str]:
    """Layer and kind of a site."""
    return site.layer, site.kind


def check_family(
    model: nn.Module, cases: list[Case] | None = None, catalog: Catalog | None = None, ratio: float = 0.4, **options
) -> None:
    """Check every case (:func:`cover` by default) on a model, whose weights are made random first.

    Routed experts are left out: tests/test_experts.py checks them.

    Sliced equals zeroed, and one wrong unit does not. Full-batch probing's decisions are computed again from what the
    dense consumers read. Generated tokens are the oracle's. Blocks that keep nothing add nothing. After removal the
    model is bit-identical, and no key of the state dict has changed. ``options`` are those of ``prune``.
    """
    catalog = Catalog.discover(block="") if catalog is None else catalog
    randomise(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(1)
    ids, *texts = (torch.randint(3, vocabulary, (ROWS, LENGTH), generator=generator) for _ in range(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    oracles = {
        unit: Oracle(model, find_sites(model, catalog, unit, "keep")[1])
        for unit in {case.unit for case in cases or ALL}
    }
    for number, case in enumerate(cover() if cases is None else cases):
        oracle = oracles[case.unit]
        for each in (model, oracle.model):  # some classes have eager attention alone
            each.set_attn_implementation(case.attention if each._supports_sdpa else "eager")
        call = dict(input_ids=ids, attention_mask=masks(case.padding), use_cache=False)
        with torch.no_grad():
            dense = model(**call).logits
            with prune(
                model, case.strategy, ratio=ratio, calibration=texts, catalog=catalog, trace=True,
                attention_unit=case.unit, compensate="none", experts="keep", **options,
                **({"merger": "probe_only"} if case.strategy == "full_batch_probing" else {}),
            ) as pruned:  # fmt: skip
                assert list(model.state_dict()) == list(before), f"{case}: keys of the state dict changed"
                check_logits(case, number, pruned, oracle, call)
                if case.padding != "right":
                    check_generation(case, pruned, oracle, ids, call["attention_mask"])
            assert torch.equal(model(**call).logits, dense), f"{case}: the model computes otherwise after removal"
    with torch.no_grad():
        check_absent(case, model, oracle, ids, catalog, **options)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def check_logits(case: Case, number: int, pruned, oracle: Oracle, call: dict) -> None:
    """Sliced equals zeroed on the real tokens, and does not where one unit of one site, in turn, is another one."""
    logits, mask = pruned.model(**call).logits, call["attention_mask"]
    kept = kept_of(pruned)
    assert any(len(kept[place(site)]) < site.units for site in oracle.sites), f"{case}: nothing was cut"
    oracle.zero(kept)
    expected, seen = oracle.read(**call)
    real = slice(None) if mask is None else mask.bool()
    allowed = TOLERANCE * float(expected[real].abs().max())
    difference = float((logits - expected)[real].abs().max())
    assert difference <= allowed, (
        f"{case}: logits are {difference:.2g} off the zeroed model's, allowed is {allowed:.2g}"
    )
    if case.strategy == "full_batch_probing":
        check_decisions(case, kept, oracle, seen, mask)
    cut = [site for site in oracle.sites if 0 < len(kept[place(site)]) < site.units]
    site = cut[number % len(cut)]
    swapped = [unit for unit in range(site.units) if unit not in kept[place(site)]][:1]
    oracle.zero(kept | {place(site): [*kept[place(site)][1:], *swapped]})
    moved = float((oracle.model(**call).logits - expected)[real].abs().max())
    assert moved > 5 * allowed, f"{case}: a wrong unit in {site.label} moves the logits by {moved:.2g} alone"


def check_absent(case: Case, model: nn.Module, oracle: Oracle, ids: torch.Tensor, catalog: Catalog, **options) -> None:
    """A model without its first attention and its last MLP computes as if these added nothing."""
    places = [place(site) for site in oracle.sites]
    attentions, mlps = ([each for each in places if each[1] == kind] for kind in ("attention", "mlp"))
    gone, layers = [*attentions[:1], *mlps[-1:]], 1 + places[-1][0]
    shares = {kind: [float((layer, kind) in gone) for layer in range(layers)] for kind in ("attention", "mlp")}
    allocator = {"name": "explicit", **shares}
    options |= dict(allocator=allocator, attention_unit=case.unit, catalog=catalog, trace=True, experts="keep")
    with prune(model, "magnitude", **options) as pruned:
        assert [where for where, count in pruned.counts.items() if not count] == sorted(gone)
        call = dict(input_ids=ids, use_cache=False)
        oracle.zero(kept_of(pruned))
        expected = oracle.model(**call).logits
        difference, allowed = (pruned.model(**call).logits - expected).abs().max(), TOLERANCE * expected.abs().max()
        assert difference <= allowed, f"without {gone}: logits are {difference:.2g} off, allowed is {allowed:.2g}"
        check_generation(case, pruned, oracle, ids, None)


def kept_of(pruned) -> dict:
    """The units that every site computed with in the last batch, by layer and kind."""
    last = [record for record in pruned.trace if record["batch"] == pruned.trace[-1]["batch"]]  # or none at all
    return {**{place(site): range(site.units) for site in pruned.all_sites}, **pruned.sites_kept} | {
        (record["layer"], record["kind"]): record["kept"] for record in last
    }


def check_decisions(case: Case, kept: dict, oracle: Oracle, seen: dict, mask: torch.Tensor | None) -> None:
    """The kept units are those with the highest scores: energy of the channels times the norm of squared weights."""
    real = torch.ones(ROWS, LENGTH, 1) if mask is None else mask[..., None]
    for site in oracle.sites:
        energy = ((seen[place(site)].square() * real).sum(0) / real.sum(0).clamp(min=1)).sum(0)
        channels = energy * oracle.weights[place(site)].pow(4).sum(0).sqrt()
        scores, chosen = channels.view(site.units, -1).norm(dim=1), chosen_of(site, kept)
        if not chosen.all():
            low, high = float(scores[chosen].min()), float(scores[~chosen].max())
            assert low >= high * (1 - 1e-4), f"{case}: {site.label} keeps a score of {low:.3g}, drops {high:.3g}"


def check_generation(case: Case, pruned, oracle: Oracle, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Greedy tokens, one after another through the key/value cache, are those of the zeroed model."""
    pruned.reset()
    tokens = greedy(pruned.model, ids, mask)
    oracle.zero(kept_of(pruned))
    assert torch.equal(tokens, greedy(oracle.model, ids, mask)), f"{case}: other tokens than the zeroed model's"


def greedy(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(ROWS, LENGTH + STEPS) tokens."""
    options = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
