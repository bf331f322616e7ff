"""Notes that differ in measured numbers are told once."""

from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.notes import notes

SHORT = "compensator least_squares: the covariance was gathered from {} tokens, fewer than 2 for each channel at layers {} mlp; a ridge of {} times the mean variance"  # noqa: E501


def noted(findings, *said):
    for trial, own in zip(findings.trials, said, strict=True):
        trial.data["notes"] = list(own)
    return notes(tabulate(findings))


def test_measured_numbers_are_merged_to_their_range(make_findings):
    findings = make_findings(["pp", "flap"], [0.4], seeds=(0, 1))
    said = noted(findings, *([SHORT.format(*values)] for values in (
        ("64", "1 to 7", "0.2 to 0.9"), ("1,024", "1 to 7", "0.15"), ("64", "1 to 7", "1.2e+03"), ("64", "1, 3", "0.5")
    )))  # fmt: skip
    assert said == [
        (SHORT.format("64 to 1,024", "1 to 7", "0.15 to 1.2e+03"), "PP; FLAP (1 of 2 trials)"),
        (SHORT.format("64", "1, 3", "0.5"), "FLAP (1 of 2 trials)"),
    ]


def test_what_was_asked_for_stays_apart_and_names_are_no_numbers(make_findings):
    asked = "{}% of the units were asked, {}% are cut"
    names = "llama-3-8b: version 0.1.{} is odd"
    findings = make_findings(["pp", "flap"], [0.4], seeds=(0, 1))
    said = noted(findings, [asked.format(20, 15.3), names.format(1)], [asked.format(20, 16.9), names.format(2)],
                 [asked.format(40, 36.9)], [])  # fmt: skip
    assert [note for note, _ in said] == [
        asked.format(20, "15.3 to 16.9"), names.format(1), names.format(2), asked.format(40, 36.9)
    ]  # fmt: skip


def test_many_configurations_are_counted(make_findings):
    findings = make_findings(ratios=(0.2, 0.4), seeds=(0, 1))  # 12 configurations
    said = noted(findings, *([f"a ridge of 0.{n % 9 + 1}"] if n % 2 else [] for n in range(24)))
    assert said == [("a ridge of 0.1 to 0.9", "12 of 12 configurations, 12 of 24 trials")]
    assert noted(findings, *([f"a ridge of 0.{n % 9 + 1}", "a ridge of 0.95"] for n in range(24))) == [
        ("a ridge of 0.1 to 0.95", "all configurations")
    ]
