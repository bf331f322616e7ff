"""The plugin keeps the rules of its roles, and computes what prunekit's own llm_pruner computes."""

from pathlib import Path

import prunekit_taylor
import pytest
import torch
import transformers
from prunekit.compress import Pipeline, PipelineSpec, prune
from prunekit.registry import Catalog
from prunekit.registry.checks import check_component

PIPELINE = Path(__file__).resolve().parents[1] / "pipeline.yaml"


@pytest.fixture
def model():
    """A Llama of two layers with grouped-query attention; its norms are random, too."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    found = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return found


@pytest.fixture
def batches():
    """Two batches of text; the second has padding on both sides."""
    ids = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[0, :5] = mask[1, 12:] = 0
    return [{"input_ids": ids[:3]}, {"input_ids": ids[3:], "attention_mask": mask}]


def scores(model, batches, use, **options):
    """The scores of the units of every site, and the units that stay."""
    with prune(model, use, ratio=0.5, calibration=batches, **options) as pruned:
        return [pruned.calibrated_scores(cut).units for cut in pruned.cuts], pruned.sites_kept


@pytest.mark.parametrize("component", [prunekit_taylor.TaylorScorer, prunekit_taylor.Taylor])
def test_it_keeps_the_rules(component):
    check_component(component)


def test_prunekit_finds_it():
    catalog = Catalog.discover()
    assert catalog.get("scorers", "taylor") is prunekit_taylor.TaylorScorer
    assert catalog.get("strategies", "taylor") is prunekit_taylor.Taylor


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_scores_are_those_of_llm_pruner(model, batches, unit):
    found, kept = scores(model, batches, "taylor", attention_unit=unit)
    expected, also_kept = scores(model, batches, "llm_pruner", attention_unit=unit)
    assert kept == also_kept
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
    for other in (batches[:1], [{"input_ids": batch["input_ids"]} for batch in batches]):  # padding counts
        assert not torch.allclose(scores(model, other, "taylor", attention_unit=unit)[0][0], found[0], rtol=1e-3)


def test_the_pipeline_runs():
    record = Pipeline(PipelineSpec.load(PIPELINE)).measure().record
    (perplexity,) = record.metrics
    assert perplexity.pruned["perplexity"] > perplexity.dense["perplexity"]
