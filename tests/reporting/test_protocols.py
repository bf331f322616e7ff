"""Notes and protocols, each listed once."""

from prunekit.compress.reporting.protocols import Protocols, notes, summary_facts
from prunekit.compress.reporting.summary import summarise

SHORT = "the covariance has {} tokens at layers {} mlp; a ridge of {} times the mean variance"


def noted(source, *notes_of_trials):
    for trial, own in zip(source.trials, notes_of_trials, strict=True):
        trial.result.notes[:] = own
    return notes(summarise(source))


def test_notes_that_differ_in_numbers_are_one_with_its_trials(make_study):
    source = make_study(["pp", "flap"], [0.4], seeds=(0, 1))
    values = (("64", "1 to 7", "0.2"), ("1,024", "1 to 7", "1.2e+03"), ("64", "1 to 9", "0.5"))
    assert noted(source, *([SHORT.format(*each)] for each in values), ["another"]) == [
        (SHORT.format(*values[0]), "PP; FLAP: 3 of 4 trials, 2 with other numbers"), ("another", "FLAP: 1 of 4 trials")
    ]  # fmt: skip


def test_many_configurations_are_counted(make_study):
    source = make_study(ratios=(0.2, 0.4), seeds=(0, 1))  # 12 configurations
    (note,) = noted(source, *([f"a ridge of 0.{n % 9 + 1}"] if n % 2 else [] for n in range(24)))
    assert note == ("a ridge of 0.2", "12 configurations: 12 of 24 trials, 8 with other numbers")


def test_values_that_differ_are_listed_and_many_are_counted(make_study):
    source = make_study(["pp"], [0.4], seeds=range(6))
    for trial in source.trials:
        trial.metric("overlap").protocol.update(sites=trial.number % 3, limit=trial.number)
    protocols = Protocols()
    assert protocols.of("overlap", source.trials) == protocols.of("overlap", source.trials)
    assert protocols.of("nothing", source.trials) is None
    found = protocols.by_label["overlap"]
    assert found["sites"] == "1 / 2 / 0" and found["limit"] == "6 different values" and found["batches"] == "4"


def test_a_protocol_inside_another_is_named_not_repeated(make_study):
    source = make_study(["pp"], [0.4])
    (trial,) = source.trials
    trial.metric("prr").protocol["perplexity"] = dict(trial.metric("perplexity").protocol)
    assert dict(Protocols().of("prr", source.trials).facts)["perplexity"] == "as listed for perplexity"


def test_the_facts_of_all_trials(make_study):
    facts = dict(summary_facts(make_study(["pp"], [0.4], seeds=(0, 1))))
    assert facts["Model"] == "bundled (LlamaForCausalLM, 5,800,000 parameters, float32)"
    assert facts["Measured on"] == ("bundled reference-evaluation, tokens 3839, windows 30, window 128, batch size 20")
    assert facts["Not pruned"] == "layer 0" and facts["Machine"] == "Some Processor, 2 threads, cpu"
    assert facts["Trials"] == "2 of 2 trials done, 25 s" and facts["Run"] == "2026-01-02"
