"""Run results made without running a model."""

from prunekit.compress.runs.records import RunResult


def run_record(**changes) -> RunResult:
    """A small run result, with these parts in place of its own."""
    made = {
        "format": 1,
        "started": "2026-01-02T03:04:05+00:00",
        "strategy": "pp",
        "ratio": {"asked": 0.4, "units_cut": 0.375, "prunable_parameters_cut": 0.39},
        "metrics": [{"evaluator": "perplexity", "label": "perplexity", "pruned": {"loss": 1.0}}],
        "model": {"name": "bundled", "parameters": 5_000_000, "dtype": "float32", "device": "cpu"},
        "attention_unit": "kv_group",
        "layers": [],
        "seconds": {"total": 2.5},
    }
    return RunResult.model_validate({**made, **changes})
