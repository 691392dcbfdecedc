"""Findings as text for a terminal and as Markdown."""

import textwrap
from collections.abc import Iterable, Sequence

from curvlab.crosscheck.findings import SEVERITIES, Finding, by_severity

MEANING = {
    "error": "edits are not what they seem",
    "deviation": "measurable, with a limited effect",
    "convention": "another choice than ours, harmless once known",
    "ok": "as it should be",
}


def number(value: float | str | None) -> str:
    """A measured number or a bound, short."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) and abs(value) < 1e6 else f"{value:.3g}"


def as_text(findings: Iterable[Finding], width: int = 110) -> str:
    """A block a finding, the worst first: what was measured against what, why, and what to do; passed checks a line."""
    lines = []
    for finding in by_severity(findings):
        compared = number(finding.measured) + (f" (bound {number(finding.bound)})" if finding.bound is not None else "")
        head = f"{finding.severity.upper():<10} {finding.check}: {compared}"
        if finding.severity == "ok":
            line = f"{head}   {finding.subject}"
            lines.append(line if len(line) <= width else f"{line[: width - 1]}…")
            continue
        lines.append(head)
        indented = {"initial_indent": " " * 11, "subsequent_indent": " " * 11, "width": width}
        lines += textwrap.wrap(finding.subject, **indented)  # type: ignore[arg-type]
        lines += textwrap.wrap(finding.cause, **indented)  # type: ignore[arg-type]
        if finding.remedy:
            lines += textwrap.wrap(f"→ {finding.remedy}", **indented)  # type: ignore[arg-type]
    return "\n".join(lines)


def as_markdown(findings: Sequence[Finding], title: str, unreadable: Sequence[str] = ()) -> str:
    """A page with one table a severity."""
    lines = [f"# {title}", ""]
    if unreadable:
        lines += ["## not readable", "", *(f"- {line}" for line in unreadable), ""]
    for severity in SEVERITIES:
        own = [finding for finding in findings if finding.severity == severity]
        if not own:
            continue
        lines += [f"## {severity} ({len(own)}): {MEANING[severity]}", ""]
        lines += ["| check | where | measured | bound | cause | remedy |", "|---|---|---|---|---|---|"]
        for finding in own:
            cells = (
                finding.check, finding.subject, number(finding.measured), number(finding.bound), finding.cause,
                finding.remedy,
            )  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
