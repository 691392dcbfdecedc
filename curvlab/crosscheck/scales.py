"""The factor between two conventions, named: which product of powers of known counts a measured ratio is.

Libraries differ in what they divide by: a sum for a mean (× examples), a mean-reduced loss whose gradients enter
squared (÷ examples²), a convolution's output positions, √(C − 1) that nngeometry moves from one Kronecker factor to the
other. A ratio is explained only by counts that are known beforehand, never by a fitted number.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import combinations

POWERS = (1.0, -1.0, 0.5, -0.5, 2.0, -2.0)  # the simplest first
LOOSEST = 0.02  # of the relative tolerance: beyond it some formula fits almost any number by chance


def explain(ratio: float, counts: Mapping[str, float], rtol: float = 1e-6) -> str | None:
    """Names a ratio as a product of powers of at most two counts; the simplest formula wins.

    Args:
        ratio: theirs / ours, above 0.
        counts: numbers by name in the plural, such as {"tokens": 960, "batches": 4, "classes": 10}.
            "classes" also stands for classes − 1. Counts of 1 explain nothing and are left out.
        rtol: relative tolerance, at most 0.02.

    Returns:
        "1: the same scale", "× tokens = 960: a sum over tokens where ours is a mean", …; formulas that fit equally
        well are joined by " or "; None where no formula fits.

    Raises:
        ValueError: a ratio that is not positive and finite, counts below 1, or a tolerance that explains anything.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"a ratio of scales must be positive and finite, got {ratio}")
    if not 0 < rtol <= LOOSEST:
        raise ValueError(f"rtol must lie above 0 and be at most {LOOSEST}, or some formula fits by chance; got {rtol}")
    wrong = {name: n for name, n in counts.items() if not (math.isfinite(n) and n >= 1)}
    if wrong:
        raise ValueError(f"counts must be at least 1, got {wrong}")
    if abs(ratio - 1) <= rtol:
        return "1: the same scale"
    best, fitting = math.inf, []
    for formula, complexity in _formulas({name: n for name, n in counts.items() if n > 1}):
        if complexity > best:
            break
        value = math.prod(n**power for _, n, power in formula)
        if abs(ratio / value - 1) <= rtol:
            best = complexity
            fitting.append(f"{_text(formula)} = {value:.6g}{_meaning(formula)}")
    return " or ".join(fitting) or None


Formula = tuple[tuple[str, float, float], ...]  # (name, count, power)


def _formulas(counts: dict[str, float]) -> Iterator[tuple[Formula, int]]:
    """With their complexities, ascending: one count before two, ± 1 before ½ and 2."""
    known = dict(counts)
    if counts.get("classes", 0) > 2:
        known["(classes − 1)"] = counts["classes"] - 1
    single = [((name, n, power), POWERS.index(power)) for name, n in known.items() for power in POWERS]
    found: list[tuple[Formula, int]] = [((factor,), cost) for factor, cost in single]
    for (one, cost), (two, more) in combinations(single, 2):
        if one[0] != two[0] and {one[0], two[0]} != {"classes", "(classes − 1)"}:
            found.append(((one, two), 2 * len(POWERS) + cost + more))
    for name, n in counts.items():  # an unbiased covariance divides by n − 1
        found.append((((name, n, 1.0), (f"({name} − 1)", n - 1, -1.0)), len(POWERS)))
    yield from sorted(found, key=lambda entry: entry[1])


def _text(formula: Formula) -> str:
    parts = []
    for name, _, power in formula:
        amount = {0.5: f"√{name}", 1.0: name, 2.0: f"{name}²"}[abs(power)]
        parts.append(("× " if power > 0 else "÷ ") + amount)
    return " ".join(parts)


def _meaning(formula: Formula) -> str:
    """In words, where the formula has a usual reason."""
    if len(formula) == 2 and formula[1][0] == f"({formula[0][0]} − 1)":
        return f": divided by {formula[0][0]} − 1, as an unbiased covariance is"
    if len(formula) > 1:
        return ""
    ((name, _, power),) = formula
    reasons = {
        1.0: f": a sum over {name} where ours is a mean",
        -1.0: f": a mean over {name} where ours is not",
        -2.0: f": gradients of a loss that is a mean over {name}, each of which enters twice",
        2.0: f": gradients of a loss that is a sum over {name}, each of which enters twice",
    }
    return reasons.get(power, "")
