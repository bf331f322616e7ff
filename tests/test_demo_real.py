"""``prunekit demo --model``: the table of a real model, here of a small GGUF."""

import json

import pytest
from prunekit.compress.demo import real
from prunekit.compress.output import printing

from tests.gguf_models import write_gguf

pytest.importorskip("gguf", reason="needs the gguf package")


@pytest.fixture
def small(tmp_path, monkeypatch, make_model):
    """A GGUF of nine layers; the demo measures little text on it."""
    monkeypatch.setattr(printing, "out", printing.Console(width=printing.PIPED_WIDTH))
    for name, value in {
        "STRATEGIES": {"flap": {}, "pp": real.WHOLE_HEADS, "pp_ls": {}},
        "RATIOS": (0.4,),
        "SEQUENCES": 2,
        "LENGTH": 48,
    }.items():
        monkeypatch.setattr(real, name, value)
    sizes = dict(vocab_size=288, hidden_size=64, num_hidden_layers=9, num_attention_heads=4)
    return write_gguf(tmp_path / "models" / "small.gguf", make_model("llama-gqa", **sizes))


def test_the_table_of_a_real_model(small, tmp_path, capsys, command):
    real.run(str(small), windows=3, out=tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert "float32, weights dequantised from GGUF Q4_1) on reference-evaluation" in shown
    assert "in 3 windows of 48, 10 in a batch" in shown and "2 sequences of 48 tokens" in shown
    assert "40%, other text:" in shown and "40%, same kind:" in shown and "layers 0, 1, 2" in shown
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["strategy"], row["ratio"]) for row in data["table"]] == [
        *(("dense", None), ("flap", 0.4), ("pp", 0.4), ("pp_ls", 0.4))
    ]
    assert all(row["other"] and row["same"] and row["flops"] <= 1 for row in data["table"])
    assert len(data["runs"]) == 6
    cut = [run["ratio"]["decoder_parameters_cut"] for run in data["runs"]]
    assert cut == pytest.approx([0.4] * 6, abs=0.005)
    (tmp_path / "out" / "results.json").unlink()
    real.run(str(small), windows=3, out=tmp_path / "out")  # all is stored, nothing runs again
    assert "Done in" in capsys.readouterr().out and (tmp_path / "out" / "results.json").is_file()


def test_what_the_command_refuses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, output = command("demo", "--windows", "3")
    assert code == 2 and "--model smollm2-135m" in output
    code, output = command("demo", "--model", "./nowhere")
    assert code == 2 and "folder ./nowhere does not exist" in output and not (tmp_path / "results").exists()
