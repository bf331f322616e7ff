"""Parts of a strategy that return other shapes than they must: the error names part, method, place and site."""

import re

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ModelError, Selection, SpecError
from prunekit.strategies.allocation import Uniform
from prunekit.strategies.application import Slice, Zero
from prunekit.strategies.pp import ImportanceScaled, ResidualNorm


class Rows(Slice):
    def producer(self, weight, bias, rows):
        return (weight.index_select(0, rows)[1:] if len(weight) > 1 else weight), bias


class Bias(Slice):
    def producer(self, weight, bias, rows):
        return Selection(weight, rows), bias


class Columns(Slice):
    def consumer(self, weight, columns):
        return Selection(weight, columns[:-1], dim=1)


class Transposed(Zero):
    def consumer(self, weight, columns):
        return super().consumer(weight, columns).t()


class Merge(ImportanceScaled):
    def merge(self, probe, history, site):
        return super().merge(probe, history, site).sum(0)


class Update(ImportanceScaled):
    def update(self, known, observed):
        return super().update(known, observed)[:1]


class Positions(ResidualNorm):
    def select(self, states, valid, generator):
        rows, positions = super().select(states, valid, generator)
        return rows, positions.expand(len(rows) + 1, -1)


class Counts(Uniform):
    def allocate(self, sites, ratio):
        return super().allocate(sites, ratio)[1:]


@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
@pytest.mark.parametrize(
    ("family", "part", "says"),
    [
        ("llama-gqa", {"applier": Rows()}, "layer 0 attention: producer (weight of model.layers.0.self_attn.q_proj) of "
                                           "mask applier slice returned shape ("),
        ("opt", {"applier": Bias()}, "producer (bias of model.decoder.layers.0.self_attn.q_proj) of mask applier"),
        ("llama-gqa", {"applier": Columns()}, "layer 0 attention: consumer (weight of model.layers.0.self_attn.o_proj"),
        ("llama-gqa", {"applier": Transposed()}, "layer 0 mlp: consumer (weight of model.layers.0.mlp.down_proj) of "
                                                 "mask applier zero returned shape (192, 128), expected (128, 192)"),
        ("llama-gqa", {"merger": Merge()}, "layer 0 attention: merge of history merger importance_scaled returned "),
        ("llama-gqa", {"merger": Update()}, "layer 0 attention: update of history merger importance_scaled returned "),
        ("llama-gqa", {"selector": Positions()}, "layer 0 attention: select (positions) of probe selector "),
        ("llama-gqa", {"allocator": Counts()}, "allocator uniform returned 5 counts for 6 sites"),
    ],
)  # fmt: skip
def test_a_part_of_the_wrong_shape_is_named(make_model, batches, strategy, family, part, says):
    if strategy == "wanda_sp" and ("merger" in part or "selector" in part):
        pytest.skip("it has no such part")
    model, ids = make_model(family), batches[0]["input_ids"]
    before = [type(module) for module in model.modules()]
    with pytest.raises(SpecError, match=re.escape(says)) as raised:
        with prune(model, strategy, ratio=0.4, calibration=batches, **part), torch.no_grad():
            model(ids)
    assert str(raised.value).endswith("fix the plugin")
    assert [type(module) for module in model.modules()] == before


def test_wrappers_are_named_with_what_to_pass(make_model):
    model = make_model("llama-gqa")
    with pytest.raises(ModelError, match=r"a DataParallel is a wrapper; prune the model inside it, model\.module"):
        prune(torch.nn.DataParallel(model), "magnitude", ratio=0.4)
