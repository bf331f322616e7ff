"""Every strategy of the literature prunes every family by its name and a ratio alone."""

import pytest
import torch
from prunekit.compress import prune

FAMILIES = ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"]
BLOCKS = ("shortgpt", "sleb", "block_pruner")
"""Strategies that drop whole attentions, MLPs or layers, so that the ratio is met within the size of one."""
STRATEGIES = ["obs", "llm_pruner", "lora_prune", "gisp", "cfsp", "two_ssp", *BLOCKS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use", STRATEGIES)
def test_every_family_by_the_name_alone(make_model, batches, family, use):
    model = make_model(family, num_hidden_layers=4 if use in BLOCKS else 3)  # sleb keeps the first and the last
    dense = model(**batches[0]).logits
    steps = {"steps": 2} if use == "gisp" else {}  # 112 take long
    with prune(model, use, ratio=0.4, calibration=batches[:1], **steps) as pruned:
        found = model(**batches[0]).logits
        assert found.isfinite().all() and not torch.equal(found, dense)
        assert pruned.ratio.prunable_parameters_cut == pytest.approx(0.4, abs=0.2 if use in BLOCKS else 0.02)
    assert torch.equal(model(**batches[0]).logits, dense)
