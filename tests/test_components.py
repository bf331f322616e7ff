"""Every catalogued component passes the checks that plugin authors run on theirs."""

import pytest
import torch
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource
from prunekit.compress.pruning.prune import prune
from prunekit.compress.runs.measuring import Measuring
from prunekit.registry import ROLES, Architecture, Catalog, Evaluator, SiteScores, SpecError
from prunekit.registry.checks import built, check_evaluation, check_sites, checks_of
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.allocation import Explicit, Uniform
from prunekit.strategies.compensation import LeastSquares, LowRankLeastSquares
from prunekit.strategies.flap.scorer import FluctuationScorer
from prunekit.strategies.pp.mergers import FixedRatio, ImportanceScaled
from prunekit.strategies.pp.selectors import ResidualNorm, SpreadProbe
from prunekit.strategies.reference.pp_flap import PPReferenceFlap, PPReferenceFlapAllocator

OURS = [entry.component for entry in Catalog.discover(block="").entries if entry.provider.startswith("prunekit ")]
WITH_OPTIONS = {
    Explicit: Explicit(attention=(0.5, 0.0), mlp=(0.25, 0.99)),
    # The sites of the checks have 24 channels, not n x 128.
    PPReferenceFlapAllocator: PPReferenceFlapAllocator(group=8, mlp_multiple=4),
    PPReferenceFlap: PPReferenceFlap(allocator=PPReferenceFlapAllocator(group=8, mlp_multiple=4)),
}
VARIANTS = [
    FixedRatio(probe=0.3),
    FluctuationScorer(square_attention=True, weighted=False),
    ImportanceScaled(momentum=1.0),
    LeastSquares(per_batch="solve", probe=1.0, ridge=1e-4),
    LeastSquares(per_batch="usual", singular="mean", memory_gib=0.5),
    LowRankLeastSquares(rank=3, seed=7),
    ResidualNorm(positions=1.0, rows=1.0),
    ResidualNorm(positions=0.01, rows=0.01),
    SpreadProbe(positions=1.0),
    Uniform(mlp_multiple=8),
    Uniform(rounding="down", mlp_multiple=8),
    Uniform(rounding="to_channels"),
]
COMPONENTS = [WITH_OPTIONS.get(cls, cls) for cls in OURS] + VARIANTS
CASES = [
    pytest.param(component, check, id=f"{getattr(component, '__name__', None) or repr(component)}-{check.__name__}")
    for component in COMPONENTS
    for check in checks_of(component)
]


@pytest.mark.parametrize(("component", "check"), CASES)
def test_component(component, check):
    check(built(component))


def test_all_roles_are_here():
    missing = [name for name, role in ROLES.items() if not any(issubclass(cls, role) for cls in OURS)]
    assert missing == ["export_formats"]  # prunekit's own formats are profiles


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"])
def test_architectures_fit_their_models(make_model, family, unit):
    model = make_model(family)
    served = [cls() for cls in OURS if issubclass(cls, Architecture) and model.config.model_type in cls().model_types]
    assert len(served) == 1
    check_sites(served[0], model, unit)


@pytest.fixture(scope="module")
def measuring():
    """The bundled model, pruned, before its evaluators."""
    loaded = load(ModelSource())
    ids = torch.randint(5, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    with prune(loaded.model, "pp", ratio=0.4, calibration=[ids]) as pruned:
        yield Measuring(loaded, pruned, no_progress, {})


SMALL = {"batch_size": 2, "length": 16, "window": 64, "limit": 2, "pairs": 1, "warmup": 0, "decode_steps": 2}
SMALL |= {"breakdown": False, "batches": 2, "max_length": 64}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [cls for cls in OURS if issubclass(cls, Evaluator)], ids=lambda cls: cls.__name__)
def test_evaluators_measure(cls, measuring):
    subject, catalog = measuring, Catalog.discover(block="")

    def measured(evaluator):
        named = small(catalog.get("evaluators", evaluator)) if isinstance(evaluator, str) else evaluator
        return named.evaluate(subject)

    subject.measure = measured
    check_evaluation(small(cls), subject)


def small(cls):
    """An evaluator whose measurement takes no time."""
    return cls(**{key: value for key, value in SMALL.items() if key in cls.model_fields})


def test_groups_that_do_not_fit_the_channels_are_refused():
    scores = [SiteScores(some_site("attention"), torch.rand(24), torch.rand(6))]
    with pytest.raises(SpecError, match=r"layer 0 attention has 24 channels.*groups of 128"):
        PPReferenceFlapAllocator().allocate(scores, 0.4)
