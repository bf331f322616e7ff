"""vLLM's plugin: what it registers, and that layers get their own shapes. vLLM's classes are stand-ins here."""

import importlib
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import transformers
from prunekit.compress.export import vllm_plugin
from prunekit.registry import ModelError, SpecError

MODELS = vllm_plugin.MODELS
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=50,
)
CUT = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 70}


class Registry:
    """vLLM's ModelRegistry, which keeps what it is given."""

    def __init__(self):
        self.models = {"LlamaForCausalLM": "its own"}
        self.calls = []

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, name, model):
        self.calls.append(name)
        self.models[name] = model


class Linear:
    def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix=""):
        self.input_size, self.output_size, self.prefix = input_size, output_size, prefix
        self.bias = "a bias" if bias else None


def fill(layer, config, prefix, output_bias):
    """Give a layer what the tests look at."""
    heads, width = config.num_attention_heads, config.intermediate_size
    layer.config, layer.heads, layer.kv_heads = config, heads, config.num_key_value_heads
    output = Linear(heads * config.head_dim, config.hidden_size, output_bias, prefix=f"{prefix}.self_attn.o_proj")
    layer.self_attn = SimpleNamespace(o_proj=output)
    down = Linear(width, config.hidden_size, getattr(config, "mlp_bias", False), prefix=f"{prefix}.mlp.down_proj")
    layer.mlp = SimpleNamespace(down_proj=down)


class LlamaDecoderLayer:
    def __init__(self, vllm_config, prefix="", config=None):
        self.inputs_bias = getattr(config, "qkv_bias", getattr(config, "attention_bias", False))
        fill(self, config, prefix, getattr(config, "attention_bias", False))


class Qwen3DecoderLayer:
    def __init__(self, config, cache_config=None, quant_config=None, prefix="", per_layer_sliding_window=None):
        self.inputs_bias, self.window = config.attention_bias, per_layer_sliding_window
        fill(self, config, prefix, output_bias=False)


class LlamaForCausalLM:
    def __init__(self, *, vllm_config, prefix="", layer_type=LlamaDecoderLayer):
        count = vllm_config.model_config.hf_config.num_hidden_layers
        self.layers = [layer_type(vllm_config=vllm_config, prefix=f"model.layers.{i}") for i in range(count)]


@pytest.fixture
def vllm(monkeypatch):
    """A package with the names of vLLM that the plugin uses."""

    def module(name, **names):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(names)

    registry = Registry()
    module("vllm", ModelRegistry=registry)
    module("vllm.config", VllmConfig=object)
    for package in ("vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.models"):
        module(package)
    module("vllm.model_executor.layers.linear", RowParallelLinear=Linear)
    models = "vllm.model_executor.models"
    module(f"{models}.llama", LlamaDecoderLayer=LlamaDecoderLayer, LlamaForCausalLM=LlamaForCausalLM)
    module(f"{models}.opt", OPTForCausalLM=type("OPTForCausalLM", (), {}))
    module(f"{models}.qwen3", Qwen3DecoderLayer=Qwen3DecoderLayer)
    module(f"{models}.utils", extract_layer_index=lambda prefix: int(prefix.split(".")[2]))
    monkeypatch.delitem(sys.modules, MODELS, raising=False)
    yield registry
    # The classes made of stand-ins are gone with them.
    sys.modules.pop(MODELS, None)


def build(family, per_layer, ranks=1, arch=None, **overrides):
    """A model of the family, as vLLM would build it."""
    from prunekit.compress.models.exported import classes

    classes.register()
    config = transformers.AutoConfig.for_model(
        f"prunekit_{family}", **{**SIZES, **overrides}, per_layer_config=per_layer
    )
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=config, model_arch_config=arch or SimpleNamespace(per_layer_overrides=None)
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        cache_config=None,
        quant_config=None,
    )
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "opt": "OPT"}
    return getattr(importlib.import_module(MODELS), f"Prunekit{names[family]}ForCausalLM")(vllm_config=vllm_config)


def test_register_gives_vllm_names_and_imports_no_model(vllm):
    vllm_plugin.register()
    assert vllm.calls == list(vllm_plugin.ARCHITECTURES)
    assert vllm.models["PrunekitLlamaForCausalLM"] == f"{MODELS}:PrunekitLlamaForCausalLM"
    assert MODELS not in sys.modules
    for family in ("llama", "mistral", "qwen2", "qwen3", "opt"):
        assert transformers.AutoConfig.for_model(f"prunekit_{family}").model_type == f"prunekit_{family}"


def test_registered_names_are_the_exported_architectures_and_have_classes(vllm):
    from prunekit.compress.models.exported.modeling_prunekit import MODELS as exported

    assert {model.__name__ for model in exported} == set(vllm_plugin.ARCHITECTURES)
    module = importlib.import_module(MODELS)
    assert all(isinstance(getattr(module, name), type) for name in vllm_plugin.ARCHITECTURES)


def test_register_twice_changes_nothing(vllm):
    vllm_plugin.register()
    vllm_plugin.register()
    assert len(vllm.calls) == len(vllm_plugin.ARCHITECTURES)


def test_register_without_vllm_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SpecError, match="pip install vllm"):
        vllm_plugin.register()


def test_old_transformers_leaves_vllm_alone(vllm, monkeypatch, caplog):
    from prunekit.compress.models.exported import classes

    def refuse():
        raise ModelError("transformers is too old")

    monkeypatch.setattr(classes, "register", refuse)
    vllm_plugin.register()
    assert not vllm.calls
    assert "transformers is too old" in caplog.text


def test_importing_the_plugin_imports_no_vllm():
    code = "import sys, prunekit.compress.export.vllm_plugin; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_have_their_own_shapes(vllm, family):
    first, second, third = build(family, {"1": CUT}).layers
    assert [(x.heads, x.kv_heads, x.mlp.down_proj.input_size) for x in (first, third)] == [(8, 4, 96)] * 2
    assert (second.heads, second.kv_heads, second.mlp.down_proj.input_size) == (6, 3, 70)
    assert (second.self_attn.o_proj.input_size, second.self_attn.o_proj.output_size) == (48, 64)
    assert second.inputs_bias == (family == "qwen2")
    assert all(x.self_attn.o_proj.bias is None and x.mlp.down_proj.bias is None for x in (first, second, third))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_output_projections_get_compensation_biases(vllm, family):
    first, second, third = build(
        family, {"0": {"attention_output_bias": True}, "1": {**CUT, "mlp_output_bias": True}}
    ).layers
    assert first.self_attn.o_proj.bias and not first.mlp.down_proj.bias
    assert second.mlp.down_proj.bias and not second.self_attn.o_proj.bias
    down = second.mlp.down_proj
    assert (down.input_size, down.output_size, down.prefix) == (70, 64, "model.layers.1.mlp.down_proj")
    assert not third.self_attn.o_proj.bias and not third.mlp.down_proj.bias


def test_biases_of_the_family_stay(vllm):
    llama = build("llama", {"1": CUT}, attention_bias=True).layers[1]
    qwen3 = build("qwen3", {"1": CUT}, attention_bias=True).layers[1]
    assert llama.inputs_bias and llama.self_attn.o_proj.bias
    assert qwen3.inputs_bias and qwen3.self_attn.o_proj.bias


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("cut", "what"),
    [({"num_attention_heads": 0, "num_key_value_heads": 0}, "attention"), ({"intermediate_size": 0}, "MLP")],
)
def test_a_layer_without_attention_or_mlp_is_refused_by_name(vllm, family, cut, what):
    with pytest.raises(SpecError, match=f"layer 1 has no {what}, which vLLM's layers cannot leave out"):
        build(family, {"1": cut})


def test_a_model_without_cuts_keeps_its_configuration(vllm):
    model = build("qwen2", None)
    assert [x.heads for x in model.layers] == [8, 8, 8]
    assert len({id(x.config) for x in model.layers}) == 3  # what is set for one layer is not set for the others


def test_qwen3_windows_stay_with_their_layers(vllm):
    layers = build("qwen3", {"1": CUT}, use_sliding_window=True, sliding_window=16, max_window_layers=1).layers
    assert [x.window for x in layers] == [None, 16, 16]


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ({**CUT, "intermediate_size": 71}, 2),
        ({**CUT, "num_attention_heads": 3}, 2),
        (CUT, 2),
        ({**CUT, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 72}, 6),
    ],
)
def test_a_layer_that_ranks_cannot_share_is_named(vllm, shape, ranks):
    with pytest.raises(SpecError, match=f"layer 1 has .* tensor_parallel_size={ranks}; set it to 1"):
        build("llama", {"0": {**CUT, "num_key_value_heads": 6, "intermediate_size": 72}, "1": shape}, ranks)


def test_ranks_share_layers_of_which_each_divides(vllm):
    one_kv_head = {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 70}
    assert build("llama", {"1": one_kv_head}, ranks=2).layers[1].kv_heads == 1


def test_vllm_without_per_layer_heads_is_refused(vllm):
    with pytest.raises(SpecError, match=r"install vllm 0\.33\.0 or newer"):
        build("llama", {"1": CUT}, arch=SimpleNamespace(total_num_attention_heads=8))


def test_opt_is_refused(vllm):
    module = importlib.import_module(MODELS)
    with pytest.raises(SpecError, match="--profile padded"):
        module.PrunekitOPTForCausalLM(vllm_config=None)
