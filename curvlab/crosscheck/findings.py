"""What a check found: a measured number, the bound it was held to, the likely cause and the remedy."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "deviation", "convention", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "deviation", "convention", "ok")  # the worst first


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at, in kebab case: "mask-energy", "factor-symmetry".
        severity: "error": wrong, edits are not what they seem. "deviation": off by more than round-off, with a
            limited effect. "convention": another choice than ours, harmless once known. "ok": as it should be.
        subject: which layer and file.
        measured: the number found; a string where it is no number ("d_in x d_out").
        bound: what it was held to, in the same unit; None where there is nothing to hold it to.
        cause: plain words: what was found, and what most likely led to it.
        remedy: what to do; "" where nothing needs doing.
        fault: name of the fault class that this names (see `curvlab.crosscheck.faults`), None else.
    """

    check: str
    severity: Severity
    subject: str
    measured: float | str | None
    bound: float | str | None
    cause: str
    remedy: str = ""
    fault: str | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {SEVERITIES}, got {self.severity!r}")

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it, which knows neither NaN nor infinity."""
        own = asdict(self)
        numbers = {name: own[name] for name in ("measured", "bound") if isinstance(own[name], float)}
        return own | {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, else in the order they came."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
