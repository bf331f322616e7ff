"""Before the first trial: what must fail on this machine is reported once, and nothing is started."""

import pytest
from prunekit.compress.ablation.mistakes import preflight
from prunekit.compress.ablation.study import Study
from prunekit.registry import SpecError

STUDY = "base: {{prune: {{use: pp, ratio: 0.4}}{base}}}\nvary: {{{vary}}}\n"


@pytest.fixture
def refused(tmp_path):
    """The message for a study with these axes, or None where nothing is found; ``due`` are numbers of trials."""

    def of(vary, base="", here=True, due=None):
        (tmp_path / "study.yaml").write_text(STUDY.format(vary=vary, base=base))
        study = Study.load(tmp_path / "study.yaml")
        keys = {trial.key for trial in study.trials if due is None or trial.number in due}
        try:
            study.refuse(preflight(study.trials, keys, here))
        except SpecError as error:
            return str(error)
        return None

    return of


def test_all_at_once_with_axis_values_and_trials(refused):
    said = refused('model.device: [cpu, gpu, "cuda:77"], prune.skip_layers: [[0], [99]]')
    assert "study.yaml: 3 mistakes" in said
    assert "line 2: vary.model.device.1: 'gpu' is not a device" in said
    assert "(trials 3-4)" in said
    assert "line 2: vary.model.device.2: cuda:77 was asked for" in said
    assert "vary.prune.skip_layers.1: [99]: the model has layers 0 to 7, found 99 (trials 2, 4, 6)" in said


def test_a_model_folder_that_is_not_there(refused):
    said = refused("model.name: [null, ./nope], seed: [0, 1]")
    assert "vary.model.name.1: folder ./nope does not exist" in said
    assert said.endswith("(trials 3-4)")


def test_what_is_wrong_everywhere_is_the_bases(refused):
    assert "line 1: base.model.device: 'gpu' is not a device" in refused("seed: [0, 1]", ", model: {device: gpu}")


def test_a_share_that_the_other_layers_cannot_lose(refused):
    said = refused("prune.skip_layers: [[0], [0, 1, 2, 3, 4, 5]]")
    assert "vary.prune.skip_layers.1: [0, 1, 2, 3, 4, 5]: prune: ratio 0.4 is out of reach" in said


def test_other_machines_have_other_devices(refused):
    assert refused("model.device: [cpu, gpu]", here=False) is None


def test_finished_trials_are_not_looked_at_again(refused):
    assert refused("model.device: [cpu, gpu]", due={1}) is None
    assert "(trials 3-4)" in refused("model.device: [cpu, gpu], seed: [0, 1]", due={4})


def test_options_of_evaluators(refused, monkeypatch):
    from prunekit.evaluators.perplexity import Perplexity

    def check_options(self):
        if self.window == 64:
            raise SpecError("perplexity.window: 64 is out of fashion")

    monkeypatch.setattr(Perplexity, "check_options", check_options)
    said = refused("evaluate.0.window: [32, 64], seed: [0, 1]", here=False)
    assert "vary.evaluate.0.window.1: 64: evaluate.0: perplexity.window: 64 is out of fashion (trials 3-4)" in said
