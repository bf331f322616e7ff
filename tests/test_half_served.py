"""Families of which a large part is never cut: named everywhere, and a ratio that is one of the decoder."""

from typing import Literal

import pytest
import torch
from prunekit.compress import Exporter, Pipeline, PipelineSpec, prune
from prunekit.compress.models.architectures import Llama, MlpNames
from prunekit.registry import Catalog, Entry, PruneWarning, SpecError


class AttentionAlone(Llama):
    """Llama, of which the MLPs stay whole."""

    name: Literal["attention_alone"] = "attention_alone"
    model_types: tuple[str, ...] = ("llama",)
    mlp: MlpNames | None = None
    leaves: str = "the MLPs"


@pytest.fixture(scope="module")
def catalog():
    found = Catalog.discover(block="")
    others = [entry for entry in found.entries if entry.component is not Llama]
    return Catalog([*others, Entry("architectures", "attention_alone", AttentionAlone, "tests", "tests")])


def linears(modules):
    return sum(p.numel() for m in modules.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters())


def test_it_is_said_in_python(make_model, catalog):
    model = make_model("llama-gqa")
    with pytest.warns(PruneWarning, match="left whole: the MLPs"):
        pruned = prune(model, "magnitude", ratio=0.5, catalog=catalog)
    with pruned:
        layers = model.model.layers
        lost = 0.5 * sum(linears(layer.self_attn) for layer in layers)
        ratio = pruned.ratio
        assert ratio.left_whole == "the MLPs" and ratio.units_cut == 0.5
        assert ratio.decoder_parameters_cut == pytest.approx(lost / linears(layers), abs=1e-6)
        assert ratio.model_parameters_cut == pytest.approx(lost / sum(p.numel() for p in model.parameters()), abs=1e-6)
        decoder, whole = (f"{100 * cut:.1f}%" for cut in (ratio.decoder_parameters_cut, ratio.model_parameters_cut))
        assert pruned.notes[0] == (
            f"left whole: the MLPs. The cut is 50.0% of the units, {decoder} of the decoder's parameters and {whole} "
            "of the model's; with of: decoder the ratio is a share of the decoder's parameters"
        )
    with prune(model, "magnitude", ratio=0.5, catalog=Catalog.discover(block="")) as whole:
        assert whole.ratio.left_whole is None and not any("left whole" in note for note in whole.notes)


def test_a_ratio_of_the_decoder(make_model, catalog):
    model = make_model("llama-gqa", num_key_value_heads=8, num_hidden_layers=8)
    with prune(model, "magnitude", ratio=0.125, of="decoder", catalog=catalog) as pruned:
        assert pruned.ratio.decoder_parameters_cut == pytest.approx(0.125, abs=0.005)
        assert pruned.ratio.units_cut > 0.25 and "with of: decoder" not in pruned.notes[0]


def test_a_ratio_that_is_out_of_reach_is_refused_before_anything_is_computed(make_counting, catalog, batches):
    model = make_counting()
    attention = sum(linears(layer.self_attn) for layer in model.model.layers)
    most = f"{100 * attention / linears(model.model.layers):.1f}% of them are in blocks that can be cut"
    with pytest.raises(
        SpecError, match=f"0.6 of the decoder's parameters is out of reach: {most}; left whole: the MLPs"
    ):
        prune(model, "wanda_sp", ratio=0.6, of="decoder", catalog=catalog, calibration=batches)
    assert not model.passes
    with pytest.raises(SpecError, match="of: a ratio is one of units or decoder, found 'model'"):
        prune(model, "magnitude", ratio=0.1, of="model", catalog=catalog)


def test_it_is_said_in_results_and_on_the_card(small_pipeline, tmp_path):
    plugin = tmp_path / "alone.py"
    plugin.write_text(
        "from typing import Literal\n"
        "from prunekit.compress.models.architectures import Llama, MlpNames\n"
        "from prunekit.registry import hookimpl\n\n\n"
        "class Alone(Llama):\n"
        '    name: Literal["alone"] = "alone"\n'
        '    model_types: tuple[str, ...] = ("llama_alone",)\n'
        "    mlp: MlpNames | None = None\n"
        '    leaves: str = "the MLPs"\n\n\n'
        "@hookimpl\ndef architectures():\n    return [Alone]\n"
    )
    content = small_pipeline(use="wanda_sp", ratio=0.133, of="decoder") | {"plugins": [str(plugin)]}
    spec = PipelineSpec.of(content | {"architecture": {"like": "alone"}})
    assert spec.match == "parameters"
    results = Pipeline(spec).measure()
    assert results.record.ratio.left_whole == "the MLPs" and results.record.ratio.matched is not None
    assert any(note.startswith("left whole: the MLPs") for note in results.record.notes)
    assert "match: parameters" in results.resolved and "of:" not in results.resolved
    Exporter(spec, "padded", tmp_path / "out").export()
    assert "Left whole: the MLPs. 13" in (tmp_path / "out" / "README.md").read_text()


def test_what_a_ratio_cannot_be_of(small_pipeline):
    content = small_pipeline(use="wanda_sp", of="decoder")
    with pytest.raises(SpecError, match=r"prune\.of: decoder counts parameters, and match another cost"):
        PipelineSpec.of(content | {"match": "flops"})
    with pytest.raises(SpecError, match=r"prune.of: a ratio is one of units or decoder \(found 'model'\)"):
        PipelineSpec.of(small_pipeline(use="wanda_sp", of="model"))
