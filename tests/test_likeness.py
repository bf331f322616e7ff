"""Models of unknown types: the family that they look like, ``architecture: {like: ...}``, the lines of a new one."""

import json

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.models.small import RECIPE
from prunekit.compress.pruning.checking import check_family, cover, randomise
from prunekit.registry import Catalog, ModelError, SpecError

from tests.test_families import CATALOG, TYPES, tiny

DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_key_value_heads=None)


class Renamed(transformers.LlamaConfig):
    """A Llama under another name."""

    model_type = "renamed"


def renamed():
    torch.manual_seed(0)
    return randomise(transformers.LlamaForCausalLM(Renamed(**RECIPE)))


def biogpt():
    return randomise(tiny("biogpt", **DROPOUT))


def message_of(model) -> str:
    with pytest.raises(ModelError) as caught:
        prune(model, "magnitude", ratio=0.4, catalog=CATALOG)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            renamed,
            f"'renamed'; prunekit families lists the {len(TYPES)} that are served. It looks like llama; run",
        ),
        (biogpt, "It looks like opt; run with architecture: {like: opt, layers: biogpt.layers}, which is checked"),
    ],
)
def test_the_nearest_family_is_named_with_lines_that_work(make, said, tmp_path):
    model = make()
    message = message_of(model)
    assert said in message
    lines = message.split("(docs/architectures.md):\n\n")[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 12
    (tmp_path / "mine.py").write_text("\n".join(line.removeprefix("    ") for line in lines.splitlines()))
    catalog = Catalog.discover(files=[tmp_path / "mine.py"], block="")
    check_family(model, cover()[::4], catalog)


def test_what_a_layer_has_besides_is_named():
    model = renamed()
    for layer in model.model.layers:
        layer.self_attn.extra_norm = torch.nn.LayerNorm(7)
        layer.mlp.scale = torch.nn.Parameter(torch.ones(1))
    assert "It looks like llama with self_attn.extra_norm and mlp; run" in message_of(model)


def test_names_that_are_missing_are_named():
    model = renamed()
    for layer in model.model.layers:
        layer.mlp.last = layer.mlp.__dict__["_modules"].pop("down_proj")
    message = message_of(model)
    assert "Its layers have no mlp.down_proj, which llama has; write these lines" in message
    assert 'mlp={"consumer": "mlp.last"},' in message and "like:" not in message


def test_models_without_an_attention_get_no_lines():
    model = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16)))
    model.config.model_type = "unknown"
    assert message_of(model).endswith("with the model's names (docs/architectures.md)")


def test_a_module_that_is_no_language_model_is_refused():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

    assert "no architecture serves model type None" in message_of(Own())


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize(("make", "like"), [(renamed, {"like": "llama"}), (biogpt, {"like": "opt"})])
def test_a_model_is_pruned_like_a_known_one(make, like, unit):
    """It is proven first, and then equals what a family of its own gives."""
    model = make()
    if make is biogpt:
        like = {**like, "layers": "biogpt.layers"}
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    options = dict(ratio=0.4, calibration=[ids], attention_unit=unit, catalog=CATALOG, architecture=like)
    dense = model(ids).logits
    for strategy in ("wanda_sp", "pp"):
        with prune(model, strategy, applier="slice", **options):
            sliced = model(ids, use_cache=False).logits
        with prune(model, strategy, applier="zero", **options):
            zeroed = model(ids, use_cache=False).logits
        torch.testing.assert_close(sliced, zeroed, rtol=1e-4, atol=1e-4)
        assert (sliced - dense).abs().max() > 0.1
    assert torch.equal(model(ids).logits, dense)


def wrong_heads(model):
    """Llama whose heads are read in pairs: its names and shapes are Llama's, and what it computes is not."""
    for layer in model.model.layers:
        output = layer.self_attn.o_proj
        output.register_forward_pre_hook(lambda _, args: (args[0] + args[0].roll(8, -1),))
    return model


def with_sinks(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _, args, made: made + torch.ones(64))
    return model


@pytest.mark.parametrize(
    ("break_it", "like", "found"),
    [
        (wrong_heads, "llama", "llama does not fit this LlamaForCausalLM .without half of its units it computes"),
        (with_sinks, "llama", "llama does not fit this LlamaForCausalLM .The size of tensor a"),
        (lambda model: model, "gemma2", "gemma2 does not fit .* no attribute `pre_feedforward_layernorm`"),
        (lambda model: model, "cohere", "cohere does not fit .* does not read what model.layers.0.input_layernorm"),
        (lambda model: model, "opt", "opt does not fit .* no attribute `decoder`"),
    ],
)
def test_a_family_that_does_not_fit_is_refused(break_it, like, found):
    model = break_it(renamed())
    before = model(torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(ModelError, match=rf"architecture\.like: {found}"):
        prune(model, "magnitude", ratio=0.4, catalog=CATALOG, architecture={"like": like})
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)


def test_names_that_are_not_known_are_refused():
    with pytest.raises(SpecError, match=r"no family is called 'lama' \(did you mean 'llama'\?\); prunekit families"):
        prune(renamed(), "magnitude", ratio=0.4, catalog=CATALOG, architecture={"like": "lama"})
    with pytest.raises(SpecError, match=r"architecture\.lik: unknown key \(did you mean 'like'\?\)"):
        prune(renamed(), "magnitude", ratio=0.4, catalog=CATALOG, architecture={"lik": "llama"})


def test_a_pipeline_file_and_its_export(tmp_path, make_tokenizer, command):
    """A run and a dynamic export of a model of an unknown type; the export's recipe keeps the family."""
    biogpt().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 60}" for number in range(2000)))
    data = {
        "model": str(tmp_path / "model"),
        "architecture": {"like": "opt", "layers": "biogpt.layers"},
        "calibration": {"file": str(tmp_path / "text.txt"), "sequences": 4, "length": 16},
        "prune": {"use": "pp", "ratio": 0.4},
        "evaluate": [{"name": "perplexity", "text": {"file": str(tmp_path / "text.txt")}, "window": 16, "limit": 2}],
    }
    (tmp_path / "pp.yaml").write_text(json.dumps(data))
    code, output = command("run", tmp_path / "pp.yaml", "--out", tmp_path / "run")
    assert code == 0, output
    code, output = command("export", tmp_path / "run", "--profile", "dynamic", "--out", tmp_path / "export")
    assert code == 0, output
    code, output = command("verify", tmp_path / "export")
    assert code == 0, output
    wrong = data | {"architecture": {"like": "otp"}}
    (tmp_path / "wrong.yaml").write_text(json.dumps(wrong))
    code, output = command("validate", tmp_path / "wrong.yaml")
    assert code == 2 and "architecture.like: no family is called 'otp' (did you mean 'opt'?)" in output


def test_experts_of_a_model_like_another_have_the_names_of_that_very_type():
    """phimoe shares its row of the table with mixtral, and not the name of its router."""
    model = randomise(tiny("phimoe"))
    model.config.model_type = "unknown"
    with prune(
        model, "reap", ratio=0.5, calibration=[torch.ones(1, 8, dtype=int)], architecture={"like": "phimoe"}
    ) as cut:
        assert {site.router for site in cut.sites} == {f"model.layers.{layer}.mlp.router" for layer in (0, 1)}


def test_validate_is_short_and_families_prints_the_lines(command, tmp_path):
    folder = tmp_path / "model"
    biogpt().config.save_pretrained(folder)
    (tmp_path / "p.yaml").write_text(f"model: {{name: {folder}}}\nprune: {{use: magnitude, ratio: 0.3}}\n")
    pointer = f"(docs/architectures.md); prunekit families --model {folder} prints them"
    code, output = command("validate", tmp_path / "p.yaml")
    assert code == 2 and "It looks like opt" in output and "def architectures" not in output
    assert pointer in output
    code, output = command("families", "--model", folder)
    assert code == 2 and "It looks like opt" in output and "def architectures(): return [Mine]" in output
    transformers.LlamaConfig(**RECIPE, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    code, output = command("families", "--model", folder)
    assert code == 0 and output == f"{folder}: architecture llama"
