"""Numbers that no check can take as they are: left out, rescaled from the ends of floating point, or put in words."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps

from curvlab.crosscheck.evidence import power_of_two, usable
from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Item, Part, Role

SAFE = 1e100  # sums of squares and products of two factors stay within float64
SIDES: tuple[tuple[Role, Role], ...] = (("A", "values_in"), ("S", "values_out"))


def is_count(n: float) -> bool:
    """Whether N can count samples: finite, at least 1, below what float64 counts one by one."""
    return 1 <= n <= 2.0**53


def sound(part: Part) -> Part:
    """The part with what can be computed with: real numbers, all finite; whole ones for a mask alone."""
    kept = {
        role: item for role, item in part.items.items()
        if usable(item.tensor) and (item.tensor.is_floating_point() or role == "mask")
    }  # fmt: skip
    return replace(part, items=kept)


def moderate(part: Part) -> Part:
    """A part whose statistics have entries far from the ends of float64 (a factor and its eigenvalues by one power of
    two, which no finding depends on)."""
    items: dict[Role, Item] = dict(part.items)
    for roles in (*SIDES, ("eigenvalues",)):
        own = [role for role in roles if role in items and usable(items[role].tensor)]
        tops = [float(items[role].tensor.abs().max()) for role in own if items[role].tensor.is_floating_point()]
        top = max(tops, default=0.0)
        if top == 0 or 1 / SAFE <= top <= SAFE:
            continue
        scale = next(power_of_two(items[role].tensor) for role, one in zip(own, tops, strict=True) if one == top)
        for role in own:
            items[role] = replace(items[role], tensor=items[role].tensor.double() / scale)
    return part if all(items[role] is part.items[role] for role in items) else replace(part, items=items)


def finite(finding: Finding) -> Finding:
    """With "nan" and "inf" as words: JSON has no such numbers."""

    def plain(value: float | str | None) -> float | str | None:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return replace(finding, measured=plain(finding.measured), bound=plain(finding.bound))


def guarded(check: Callable[[Part, float | None], list[Finding]]) -> Callable[..., list[Finding]]:
    """A check of a part that sees moderate numbers and says finite ones."""

    @wraps(check)
    def guarding(part: Part, gamma: float | None = None) -> list[Finding]:
        return [finite(finding) for finding in check(moderate(part), gamma)]

    return guarding
