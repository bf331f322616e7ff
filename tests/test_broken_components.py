"""Each of 66 broken components is caught by the checks of its role, and the message names it and what is wrong."""

import pytest
import torch
from prunekit.compress import check_architecture
from prunekit.registry import Architecture, Evaluator, PlainSubject
from prunekit.registry.checks import check_component, check_evaluation

from tests.broken_components import BROKEN, GOOD, known, model_of


@pytest.fixture(autouse=True)
def settings():
    """Torch's settings after every test are those before."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)


def check(component, model=""):
    check_component(component)
    if isinstance(component, Architecture):
        check_architecture(component, model_of(model))
    if isinstance(component, Evaluator):
        check_evaluation(component, PlainSubject(model_of.__wrapped__("llama")))


def test_there_are_66_of_them():
    assert len(BROKEN) == 66


@pytest.mark.parametrize("broken", BROKEN, ids=[f"{each.role} {each.what}" for each in BROKEN])
def test_a_broken_component_is_caught(broken):
    with pytest.raises(AssertionError) as caught:
        check(broken.component, broken.model)
    message = str(caught.value)
    names = {type(broken.component).__name__, type(getattr(broken.component, "statistic", None)).__name__}
    assert message.split()[0] in names
    assert broken.words in message


@pytest.mark.parametrize("component", GOOD, ids=repr)
def test_what_they_are_made_of_passes(component):
    check(component)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "stablelm"])
def test_the_architectures_that_they_are_made_of_pass(kind):
    check(known(kind)(), kind)
