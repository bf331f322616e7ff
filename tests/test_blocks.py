"""Statistics of blocks for allocators: of every site and every layer, on the dense model, without padding, once."""

from typing import ClassVar, Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.registry import BlockInfluence, BlockStatistic, NonFiniteError, SparsityAllocator
from prunekit.registry.checks import check_component
from torch.nn import functional


class Angle(BlockStatistic):
    """The angle between what enters and leaves, as a share of half a turn."""

    name: Literal["angle"] = "angle"

    def measure(self, entering, leaving):
        return functional.cosine_similarity(entering, leaving, dim=-1).clamp(-1, 1).arccos() / torch.pi


class Looking(SparsityAllocator):
    """Keeps everything, and notes what it was given."""

    exempt: ClassVar[dict[str, str]] = {"check_budget": "it keeps everything"}
    name: Literal["looking"] = "looking"
    by: BlockStatistic = BlockInfluence()
    given: ClassVar[list] = []

    @property
    def block_statistic(self):
        return self.by

    def allocate(self, sites, ratio):
        self.given[:] = sites
        return [scores.site.units for scores in sites]


def seen(model, batches, by=None, use="magnitude", **options):
    """What an allocator gets of every block and layer."""
    allocator = Looking() if by is None else Looking(by=by)
    with prune(model, use, ratio=0.1, calibration=batches, allocator=allocator, **options):
        return {(s.site.layer, s.site.kind): (s.block_statistic, s.layer_statistic) for s in Looking.given}


@torch.no_grad()
def streams(model, batches):
    """The residual stream of all tokens: before the first layer, and after every attention and every layer."""
    layers = model.get_decoder().layers
    found = {}

    def keep(place):
        return lambda _, args: found.setdefault(place, []).append(args[0].flatten(0, -2))

    handles = []
    for number, layer in enumerate(layers):
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        handles += [norm.register_forward_pre_hook(keep(2 * number + i)) for i, norm in enumerate(norms)]
    handles.append(model.get_decoder().norm.register_forward_pre_hook(keep(2 * len(layers))))
    for batch in batches:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(found[place]) for place in sorted(found)]


def influence(entering, leaving):
    return float((1 - functional.cosine_similarity(entering, leaving, dim=-1)).mean())


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_an_allocator_sees_what_blocks_and_layers_do(make_model, batches, family):
    model = make_model(family)
    x = streams(model, batches)
    found = seen(model, batches)
    for layer in range(3):
        whole = influence(x[2 * layer], x[2 * layer + 2])
        for place, kind in enumerate(("attention", "mlp"), 2 * layer):
            assert found[layer, kind] == pytest.approx((influence(x[place], x[place + 1]), whole), abs=1e-5)
    assert len({round(block, 4) for block, _ in found.values()}) == 6  # no two are alike


def test_skipped_layers_are_left_out(make_model, batches):
    whole = seen(make_model("opt"), batches)
    found = seen(make_model("opt"), batches, skip_layers=[0])
    assert found == {place: values for place, values in whole.items() if place[0]}


def test_padding_does_not_count(make_model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    padded = [{"input_ids": ids, "attention_mask": mask}]
    other = [{"input_ids": ids.masked_fill(mask == 0, 50), "attention_mask": mask}]
    for family in ("llama-gqa", "opt"):
        model = make_model(family)
        known, again = seen(model, padded), seen(model, other)
        assert all(known[place] == pytest.approx(again[place], abs=1e-6) for place in known)
        assert known != seen(model, [{"input_ids": ids}])


def test_another_statistic_and_a_measurement_that_is_shared(make_counting, batches, tmp_path):
    model, shared = make_counting(), SharedStatistics()
    found = seen(model, batches, statistics=shared)
    passes = model.passes
    assert seen(model, batches, statistics=shared) == found and model.passes == passes
    angles = seen(model, batches, by=Angle(), statistics=shared)
    assert angles != found and model.passes > passes
    file = tmp_path / "statistics.safetensors"
    assert seen(model, batches, statistics=file) == found
    passes = model.passes
    assert seen(model, batches, use="wanda_sp", skip_layers=[1], statistics=file).items() <= found.items()
    assert model.passes == passes + len(batches)  # channels are calibrated, blocks are known


def test_what_is_not_finite_is_refused_by_its_place(make_model, batches):
    class Broken(BlockStatistic):
        name: Literal["broken"] = "broken"

        def measure(self, entering, leaving):
            return torch.full((len(entering),), torch.nan)

    with pytest.raises(NonFiniteError, match="layer 0: broken of what enters and leaves this block"):
        seen(make_model("llama-gqa"), batches, by=Broken())


class Wide(BlockStatistic):
    """Gives a number for every channel."""

    name: Literal["wide"] = "wide"

    def measure(self, entering, leaving):
        return leaving - entering


class Mixing(BlockStatistic):
    """Looks at other tokens."""

    name: Literal["mixing"] = "mixing"

    def measure(self, entering, leaving):
        return (leaving - entering).norm(dim=1) / leaving.norm()


class Writing(BlockStatistic):
    """Writes into what it is given."""

    name: Literal["writing"] = "writing"

    def measure(self, entering, leaving):
        return entering.mul_(2).sum(1)


class NoStatistic(Looking):
    """Has a number for a statistic."""

    name: Literal["no_statistic"] = "no_statistic"

    @property
    def block_statistic(self):
        return 0.5


def test_the_check_of_block_statistics():
    check_component(Looking())
    check_component(Looking(by=Angle()))
    for broken, message in ((Wide(), "the statistic of tokens"), (Mixing(), "other tokens"), (Writing(), "changes")):
        with pytest.raises(AssertionError, match=message):
            check_component(Looking(by=broken))
    with pytest.raises(AssertionError, match=r"must have a BlockStatistic or None, found 0\.5"):
        check_component(NoStatistic())
