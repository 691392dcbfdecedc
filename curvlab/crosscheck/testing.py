"""For someone else's tests: `assert_agrees` fails with the table of what deviates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curvlab.crosscheck.findings import SEVERITIES, Severity
from curvlab.crosscheck.report import Report, crosscheck
from curvlab.crosscheck.tables import as_text


def assert_agrees(
    paths: str | Path | Sequence[str | Path],
    *,
    worst: Severity = "convention",
    known: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Assert that files agree with the reference.

        from curvlab.crosscheck import assert_agrees


        def test_factors():
            assert_agrees("out/wiki_stats", model=model, data=batches, gamma=0.9)

    Args:
        paths: see `crosscheck`, which takes the other `options` as well.
        worst: the worst severity that passes: "convention" by default, "ok" to hold conventions fixed as well.
        known: names of checks or fault classes that are let through, such as "unnormalised-sums".

    Returns:
        The report, where it agrees.

    Raises:
        AssertionError: findings worse than `worst`, an unreadable file, or nothing that could be checked; the message
            is the table of these findings.
        ValueError: what `crosscheck` refuses, or an unknown severity.
    """
    if worst not in SEVERITIES:
        raise ValueError(f"worst must be one of {SEVERITIES}, got {worst!r}")
    report = crosscheck(paths, **options)
    limit = SEVERITIES.index(worst)
    bad = [
        finding
        for finding in report.findings
        if SEVERITIES.index(finding.severity) < limit and finding.check not in known and finding.fault not in known
    ]
    if bad or report.unreadable:
        raise AssertionError("\n".join([report.verdict(), *report.unreadable, as_text(bad)]))
    return report
