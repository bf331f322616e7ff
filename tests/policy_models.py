"""A small model whose tokens vary, and what its generation must equal: the dense model, zeroed call by call."""

import copy

import torch

from tests.conftest import build_model

SMALL = dict(hidden_size=64, num_hidden_layers=2, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)


def small_model(family="llama-gqa", **options):
    """Two layers; all 1-D weights are random."""
    sizes = {**SMALL, "intermediate_size": 96}
    if family == "opt":
        sizes = {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}
        del sizes["num_key_value_heads"]
    model = build_model(family, **{**sizes, **options})
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if "bias" in name else 1.0))
        else:
            parameter.mul_(2)
    return model


def prompts(rows=1, length=12, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


class ByCall:
    """A copy of a dense model whose dropped units count nothing: what enters their consumers is zero there.

    ``kept`` lists, for every call of its decoder, the kept units by layer and kind; those of the last serve all later
    ones. ``seen`` is what entered every consumer in every call, with all channels.
    """

    def __init__(self, dense, sites, kept):
        self.model, self.kept, self.call, self.seen = copy.deepcopy(dense), kept, -1, {}
        getattr(self.model.model, "decoder", self.model.model).register_forward_pre_hook(self._begin)
        for site in sites:
            consumer = self.model.get_submodule(site.consumer)
            consumer.register_forward_pre_hook(lambda _, args, site=site: self._zero(site, args[0]))

    def _begin(self, *_):
        self.call += 1

    def _zero(self, site, x):
        self.seen[self.call, site.layer, site.kind] = x.clone()
        units = self.kept[min(self.call, len(self.kept) - 1)].get((site.layer, site.kind))
        if units is None:
            return (x,)
        kept = torch.zeros(site.channels).index_fill(0, site.columns(torch.tensor(units)), 1)
        return (x * kept,)


def kept_by_call(policy, records, length):
    """The kept units of every call of one generation, from the trace of its decisions; ``length`` is the prompt's."""
    now, calls = {}, {}
    for record in records:
        call = max(record["positions"]) + 1 - length if record["batch"] != records[0]["batch"] else 0
        calls.setdefault(call, {})[record["layer"], record["kind"]] = record["kept"]
    first = calls.pop(0)
    made = [first if policy.prunes_prompt else {}]
    now = first if policy.prunes_steps else {}
    for call in range(1, max(calls, default=0) + 1):
        now = now | calls.get(call, {})
        made.append(now)
    return made if len(made) > 1 else [*made, now]
